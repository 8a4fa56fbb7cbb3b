// sample on CUDA, the second kernel: one block a row. It puts together the parts of a row that several blocks have read, and for a
// row with filters it finds the one threshold that stands for top-k, top-p and min-p and draws from the tokens that reach it.
//
// With top-k the k-th largest chunk maximum bounds the k-th largest logit from below, so a few hundred candidates in shared memory
// are enough for all that follows. Without it top-p needs the mass of the whole row: up to three passes over it, which lies in L2.
#include <cuda_runtime.h>

#include "sampling/plan.h"
#include "sampling/search.cuh"
#include "sampling/select.cuh"

namespace minivllm {
namespace {

__device__ void combine_parts(const SamplePlan& plan, int64_t r, const RowOptions& options) {
  if (plan.splits == 1 || threadIdx.x >= 32) return;
  const double inverse_temperature = options.greedy() ? 1.0 : 1.0 / static_cast<double>(options.temperature);
  const Candidate* parts = plan.candidates + r * plan.splits;
  Candidate best{-INFINITY, 0.0f, -1, 0};
  for (int i = threadIdx.x; i < plan.splits; i += 32)
    if (beats(parts[i], best, inverse_temperature)) best = parts[i];
  best = warp_best(best, inverse_temperature);
  if (threadIdx.x == 0) plan.a.out[r] = best.index < 0 ? -1 : best.index;
}

struct Kept {
  uint32_t limit;  // key of the last token kept
  int gathered;    // candidates in shared memory, all that the limit keeps and maybe more; -1: none are there
};

template <typename T, bool kAligned>
__device__ uint32_t select(SelectShared& s, const SelectRow<T, kAligned>& row, const Kept& kept, const Target& target) {
  if (kept.gathered >= 0) return select_gathered(s, kept.gathered, kept.limit, target);
  return row.select_in_row(s, kept.limit == kLastFinite ? -kLargestFloat : row.least_logit(kept.limit), target);
}

// Options are read where they are used, which keeps registers free.
template <typename T, bool kAligned>
__device__ Kept apply_filters(SelectShared& s, const SelectRow<T, kAligned>& row, const SampleArguments& a, int64_t r) {
  Kept kept{kLastFinite, -1};
  if (const int top_k = a.top_k[r]; top_k > 0 && top_k < row.layout.vocab) {
    kept.limit = row.bound_of_count(s, top_k);
    kept.gathered = row.gather(s, kept.limit);
    kept.limit = min(kept.limit, select(s, row, kept, of_count(top_k)));
  }
  if (const float top_p = a.top_p[r]; top_p < 1.0f) kept.limit = min(kept.limit, select(s, row, kept, of_share(top_p)));
  if (const float min_p = a.min_p[r]; min_p > 0.0f) kept.limit = min(kept.limit, distance_key(logf(fminf(min_p, 1.0f))));
  return kept;
}

template <typename T, bool kAligned>
__device__ Candidate draw_kept(SelectShared& s, float* bound, const SelectRow<T, kAligned>& row, const Kept& kept,
                               uint64_t seed) {
  Search<T> search(row.logits, row.layout.vocab, seed, row.temperature, bound);
  search.origin = row.largest;
  if (kept.gathered >= 0) {
    for (int i = threadIdx.x; i < kept.gathered; i += kSelectThreads) {
      if (s.keys[i] > kept.limit) continue;
      const int token = s.tokens[i];
      const uint4 words = philox(static_cast<uint32_t>(token) / 4, seed);
      const Candidate candidate{s.logits[i], gumbel(word_of(words, token % 4)), token, 0};
      if (beats(candidate, search.best, search.inverse_temperature)) search.best = candidate;
    }
    return search.best;
  }
  search.least = row.least_logit(kept.limit);
  row.each_tile(search.least, [&](int v, const Logits<T>(&vectors)[kVectors<T>], const bool(&wanted)[kVectors<T>]) {
    float largest[kVectors<T>];
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u) largest[u] = wanted[u] ? largest_of(vectors[u]) : -INFINITY;
    search.visit(v, kSelectThreads, largest);
  });
  return search.best;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kSelectThreads, 2) finish_kernel(SamplePlan plan) {
  __shared__ SelectShared s;
  __shared__ Candidate bests[kSelectWarps];
  __shared__ float bound;
  const int64_t r = blockIdx.x;
  if (const RowOptions options(plan.a, r); !options.filtered(plan.layout.vocab)) return combine_parts(plan, r, options);
  SelectRow<T, kAligned> row{static_cast<const T*>(plan.a.logits) + r * plan.a.stride,
                             plan.maxima + r * plan.layout.num_chunks(), plan.layout, 0.0f, plan.a.temperature[r]};
  if (threadIdx.x == 0) bound = -INFINITY;
  row.find_largest(s);
  Candidate best{-INFINITY, 0.0f, -1, 0};
  if (fabsf(row.largest) <= kLargestFloat) {  // false for NaN
    const Kept kept = apply_filters(s, row, plan.a, r);
    best = draw_kept(s, &bound, row, kept, static_cast<uint64_t>(plan.a.seeds[r]));
  }
  const double inverse_temperature = 1.0 / static_cast<double>(row.temperature);
  best = warp_best(best, inverse_temperature);
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  best = warp_best(bests[threadIdx.x % kSelectWarps], inverse_temperature);
  if (threadIdx.x == 0) plan.a.out[r] = best.index;
}

template <typename T>
const char* launch(const SamplePlan& plan, cudaStream_t stream) {
  auto* kernel = vectors_aligned<T>(plan.a.logits, plan.a.stride) ? finish_kernel<T, true> : finish_kernel<T, false>;
  kernel<<<static_cast<unsigned>(plan.a.num_rows), kSelectThreads, 0, stream>>>(plan);
  return launch_error();
}

}  // namespace

const char* launch_finish(const SamplePlan& plan, void* stream) {
  return dispatch_dtype(plan.a.dtype, [&](auto* tag) {
    return launch<std::remove_pointer_t<decltype(tag)>>(plan, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace minivllm
