// apply_penalties and count_tokens on CUDA. A row of counts is read in 16-byte vectors, several blocks a row; a logit is touched only
// where its count is not 0, which is rare. Floor: the counts' bytes / bandwidth, or the launch for few rows.
#include "common/launch.cuh"
#include "penalties.h"

namespace minivllm {
namespace {

constexpr int kThreads = 128;
constexpr int kVectors = 4;  // of four counts, a thread; all are loaded before the first is looked at
constexpr int kBlockTokens = kThreads * kVectors * 4;

template <bool kAligned>
__device__ __forceinline__ Vec<int32_t, 4> load_counts(const int32_t* counts, int64_t first, int64_t vocab) {
  if (kAligned && first + 4 <= vocab) return *reinterpret_cast<const Vec<int32_t, 4>*>(counts + first);
  Vec<int32_t, 4> out;
#pragma unroll
  for (int j = 0; j < 4; ++j) out.data[j] = first + j < vocab ? counts[first + j] : 0;
  return out;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads) penalties_kernel(PenaltyArguments a, unsigned blocks_per_row) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t i = blockIdx.x / blocks_per_row;
  const int64_t start = static_cast<int64_t>(blockIdx.x % blocks_per_row) * kBlockTokens;
  const int32_t* counts = a.counts + a.count_indices[i] * a.counts_stride;
  T* logits = static_cast<T*>(a.logits) + a.row_indices[i] * a.logits_stride;
  const float presence = a.presence[i], frequency = a.frequency[i], repetition = a.repetition[i];
  Vec<int32_t, 4> v[kVectors];
#pragma unroll
  for (int u = 0; u < kVectors; ++u)
    v[u] = load_counts<kAligned>(counts, start + (u * kThreads + threadIdx.x) * 4, a.vocab);
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    const int32_t(&count)[4] = v[u].data;
    if ((count[0] | count[1] | count[2] | count[3]) == 0) continue;
    T* in_place = logits + start + (u * kThreads + threadIdx.x) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (count[j] == 0) continue;
      const float x = widen(in_place[j]);
      const int32_t generated = count[j] >> 1;
      const float repeated = x > 0.0f ? x / repetition : x * repetition;
      in_place[j] = narrow<T>(repeated - (frequency * static_cast<float>(generated) + (generated > 0 ? presence : 0.0f)));
    }
  }
}

template <typename T>
const char* launch(const PenaltyArguments& a, cudaStream_t stream) {
  const int64_t blocks_per_row = (a.vocab + kBlockTokens - 1) / kBlockTokens, blocks = a.n * blocks_per_row;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks";
  const bool aligned = reinterpret_cast<uintptr_t>(a.counts) % 16 == 0 && a.counts_stride % 4 == 0;
  auto* kernel = aligned ? penalties_kernel<T, true> : penalties_kernel<T, false>;
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a,
                           static_cast<unsigned>(blocks_per_row));
}

__global__ void __launch_bounds__(kThreads) count_kernel(int32_t* counts, int64_t stride, const int64_t* count_indices,
                                                         const int64_t* token_ids, int64_t n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t token = token_ids[i];
  if (token >= 0) atomicAdd(counts + count_indices[i] * stride + token, 2);
}

}  // namespace

const char* launch_apply_penalties(const PenaltyArguments& a, void* stream) {
  if (a.n == 0 || a.vocab == 0) return nullptr;
  return dispatch_dtype(a.dtype, [&](auto* tag) {
    return launch<std::remove_pointer_t<decltype(tag)>>(a, static_cast<cudaStream_t>(stream));
  });
}

const char* launch_count_tokens(int32_t* counts, int64_t counts_stride, const int64_t* count_indices, const int64_t* token_ids,
                                int64_t n, void* stream) {
  const int64_t blocks = (n + kThreads - 1) / kThreads;
  if (blocks == 0) return nullptr;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks";
  count_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(counts, counts_stride,
                                                                                                  count_indices, token_ids, n);
  return launch_error();
}

}  // namespace minivllm
