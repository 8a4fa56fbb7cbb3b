// What the two kernels of `sample` share: the first reads every row once (sample.cu), the second finishes the rows that were
// cut among several blocks and draws for those with filters (sample_filter.cu).
#pragma once

#include "sample.h"
#include "sampling/rows.cuh"

namespace minivllm {

// The best token of one part of a row: the logit itself, its noise, its index (-1: nothing finite; -2: NaN or +infinity).
struct alignas(16) Candidate {
  float logit, noise;
  int index, unused;
};
constexpr int kInvalidRow = -2;

constexpr int kFew = 1024;  // up to this top-k the candidates are gathered, and nothing is drawn before

struct SamplePlan {
  SampleArguments a;
  VocabLayout layout;
  int splits;             // blocks a row in the first kernel
  Candidate* candidates;  // [num_rows, splits], written unless top-k is small
  float* maxima;          // [num_rows, num_chunks], written for rows with a filter
  float* masses;          // the same, sums of exp((logit - the chunk's largest) / temperature), unless top-k is small
  float* scores;          // [num_rows, num_sixteens], the same: bounds of the scores of a thread's tokens of a tile (search)
};

struct RowOptions {
  float temperature, top_p, min_p;
  int top_k;

  __device__ RowOptions(const SampleArguments& a, int64_t row)
      : temperature(a.temperature[row]), top_p(a.top_p[row]), min_p(a.min_p[row]), top_k(a.top_k[row]) {}

  __device__ double inverse_temperature() const { return greedy() ? 1.0 : 1.0 / static_cast<double>(temperature); }
  __device__ bool greedy() const { return !(temperature > 0.0f); }
  __device__ bool by_rank(int vocab) const { return top_k > 0 && top_k < vocab; }
  __device__ bool filtered(int vocab) const {
    return !greedy() && (by_rank(vocab) || top_p < 1.0f || min_p > 0.0f);
  }
  __device__ bool few(int vocab) const { return !greedy() && by_rank(vocab) && top_k <= kFew; }
};

// Whether a beats b: by z + noise, where only differences of logits count, in float64, so that the answer does not hang on how
// a row was cut; by the lower index where that is the same.
__device__ __forceinline__ bool beats(const Candidate& a, const Candidate& b, double inverse_temperature) {
  if (a.index < 0 || b.index < 0) return b.index == kInvalidRow ? false : a.index == kInvalidRow || (a.index >= 0);
  const double lead = (static_cast<double>(a.logit) - b.logit) * inverse_temperature + (static_cast<double>(a.noise) - b.noise);
  return lead > 0.0 || (lead == 0.0 && a.index < b.index);
}

__device__ __forceinline__ Candidate warp_best(Candidate best, double inverse_temperature) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    Candidate other{};
    other.logit = __shfl_xor_sync(0xffffffffu, best.logit, lane);
    other.noise = __shfl_xor_sync(0xffffffffu, best.noise, lane);
    other.index = __shfl_xor_sync(0xffffffffu, best.index, lane);
    if (beats(other, best, inverse_temperature)) best = other;
  }
  return best;
}

const char* launch_finish(const SamplePlan& plan, void* stream);  // sample_filter.cu

}  // namespace minivllm
