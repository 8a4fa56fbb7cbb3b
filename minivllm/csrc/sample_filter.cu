// sample on CUDA, the second kernel: one block a row. It puts together the parts of a row that several blocks have read, and for a
// row with filters it finds the one threshold that stands for top-k, top-p and min-p and draws from the tokens that reach it.
//
// With top-k the k-th largest chunk maximum bounds the k-th largest logit from below, so a few hundred candidates in shared memory
// are enough for all that follows. Without it top-p needs the mass of the whole row: up to three passes over it, which lies in L2.
#include <cuda_runtime.h>

#include "sampling/noise.cuh"
#include "sampling/plan.h"
#include "sampling/select.cuh"

namespace minivllm {
namespace {

// A score and a token in 64 bits whose maximum has the largest score, of equals the lowest token. 0: none.
__device__ __forceinline__ unsigned long long packed(float score, int token) {
  const int bits = __float_as_int(score + 0.0f);
  const uint32_t ordered = static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
  return (static_cast<unsigned long long>(ordered) << 32) | (0xffffffffu - static_cast<uint32_t>(token));
}

__device__ __forceinline__ unsigned long long block_max(unsigned long long v, SelectShared& s) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = max(v, __shfl_xor_sync(0xffffffffu, v, lane));
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.partial[threadIdx.x / 32] = v;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) v = max(v, static_cast<unsigned long long>(s.partial[warp]));
  return v;
}

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

__device__ __forceinline__ uint32_t threshold_of_gathered(SelectShared& s, int n, uint32_t limit, const Target& target) {
  if (n <= kMaxRanked) return rank_key(s, n, limit, target);
  const auto keys = [&](uint32_t end, const auto& f) {
    for (int i = threadIdx.x; i < n; i += kSelectThreads)
      if (s.keys[i] <= end) f(s.keys[i]);
  };
  return select_key(s, keys, limit, target);
}

template <typename T, bool kAligned>
__device__ Kept apply_filters(SelectShared& s, const SelectRow<T, kAligned>& row, const RowOptions& options) {
  Kept kept{kLastFinite, -1};
  if (options.by_rank(row.layout.vocab)) {
    const Target target{static_cast<uint64_t>(options.top_k), 0.0f};
    const uint32_t bound = row.bound_of_count(s, target.count);
    kept.gathered = row.gather(s, bound);
    const uint32_t by_rank = kept.gathered >= 0 ? threshold_of_gathered(s, kept.gathered, bound, target)
                                                : select_key(s, row.keys_of_row(), bound, target);
    kept.limit = min(kept.limit, by_rank);
  }
  if (options.top_p < 1.0f) {
    const Target target{0, options.top_p};
    const uint32_t by_mass = kept.gathered >= 0 ? threshold_of_gathered(s, kept.gathered, kept.limit, target)
                                                : select_key(s, row.keys_of_row(), kept.limit, target);
    kept.limit = min(kept.limit, by_mass);
  }
  if (options.min_p > 0.0f) kept.limit = min(kept.limit, distance_key(logf(fminf(options.min_p, 1.0f))));
  return kept;
}

template <typename T, bool kAligned>
__device__ unsigned long long draw_kept(SelectShared& s, const SelectRow<T, kAligned>& row, const Kept& kept, uint64_t seed) {
  unsigned long long best = 0;
  if (kept.gathered >= 0) {
    for (int i = threadIdx.x; i < kept.gathered; i += kSelectThreads) {
      if (s.keys[i] > kept.limit) continue;
      const int token = s.tokens[i];
      const float noise = gumbel(word_of(philox(static_cast<uint32_t>(token) / 4, seed), token % 4));
      best = max(best, packed(noise - __uint_as_float(s.keys[i]), token));
    }
    return block_max(best, s);
  }
  float reached = -INFINITY;  // of this thread; a word above exp(z - reached) cannot beat it
  row.each_vector(kept.limit, [&](int first, const Logits<T>& v) {
#pragma unroll
    for (int j = 0; j < kVectorTokens<T>; j += 4) {
      uint32_t keys[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) keys[i] = row.key(widen(v.data[j + i]));
      const uint32_t nearest = min(min(keys[0], keys[1]), min(keys[2], keys[3]));
      if (nearest > kept.limit) continue;
      const uint4 words = philox(static_cast<uint32_t>(first + j) / 4, seed);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (keys[i] > kept.limit) continue;
        const float z = -__uint_as_float(keys[i]);
        const uint32_t word = word_of(words, i);
        if (static_cast<float>(word) > __expf(z - reached + 1e-3f) * 0x1p32f + 1.0f) continue;
        const float score = z + gumbel(word);
        reached = fmaxf(reached, score);
        best = max(best, packed(score, first + j + i));
      }
    }
  });
  return block_max(best, s);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kSelectThreads, 2) finish_kernel(SamplePlan plan) {
  __shared__ SelectShared s;
  const int64_t r = blockIdx.x;
  const RowOptions options(plan.a, r);
  if (!options.filtered(plan.layout.vocab)) return combine_parts(plan, r, options);
  SelectRow<T, kAligned> row{static_cast<const T*>(plan.a.logits) + r * plan.a.stride,
                             plan.maxima + r * plan.layout.num_chunks(), plan.layout, 0.0f, options.temperature};
  row.find_largest(s);
  unsigned long long best = 0;
  if (fabsf(row.largest) <= kLargestFloat) {  // false for NaN
    const Kept kept = apply_filters(s, row, options);
    __syncthreads();
    best = draw_kept(s, row, kept, static_cast<uint64_t>(plan.a.seeds[r]));
  }
  if (threadIdx.x == 0) plan.a.out[r] = best == 0 ? -1 : static_cast<int64_t>(0xffffffffu - static_cast<uint32_t>(best));
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
