// merge_attention_states on CUDA: a thread merges one 16-byte vector of a row; the two log-sum-exps of a row come from the L1 for all
// but the first of its threads. Floor: 3 x bytes of out / bandwidth.
#include <algorithm>

#include "common/copy.cuh"
#include "common/vec.cuh"
#include "merge_attention_states.h"

namespace minivllm {
namespace {

constexpr int kThreads = 256;

// threadIdx: vector of a row, row = token * num_heads + head.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) merge_kernel(AttentionState a, AttentionState b, unsigned num_rows, unsigned num_heads,
                                                         int vectors, T* out, float* lse) {
  using V = Vec<T, N>;
  const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const unsigned token = row / num_heads, head = row % num_heads;
  const float lse_a = a.lse[token * a.lse_stride + head], lse_b = b.lse[token * b.lse_stride + head];
  const V* from_a = reinterpret_cast<const V*>(static_cast<const T*>(a.out) + token * a.token_stride + head * a.head_stride);
  const V* from_b = reinterpret_cast<const V*>(static_cast<const T*>(b.out) + token * b.token_stride + head * b.head_stride);
  V* target = reinterpret_cast<V*>(out) + static_cast<int64_t>(row) * vectors;

  // The first vectors are on their way while the shares are computed; an empty side may hold NaN, so it is replaced and not scaled.
  V va{}, vb{};
  if (static_cast<int>(threadIdx.x) < vectors) va = from_a[threadIdx.x], vb = from_b[threadIdx.x];
  const bool has_a = lse_a != -INFINITY, has_b = lse_b != -INFINITY;
  const float largest = fmaxf(lse_a, lse_b);
  const float mass_a = has_a ? expf(lse_a - largest) : 0.0f, mass_b = has_b ? expf(lse_b - largest) : 0.0f;
  const float mass = mass_a + mass_b;
  const float share = has_a || has_b ? 1.0f / mass : 0.0f;
  if (threadIdx.x == 0) lse[row] = has_a || has_b ? largest + logf(mass) : -INFINITY;

  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    if (i >= static_cast<int>(blockDim.x)) va = from_a[i], vb = from_b[i];
    V merged;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float x = has_a ? widen(va.data[j]) : 0.0f, y = has_b ? widen(vb.data[j]) : 0.0f;
      merged.data[j] = narrow<T>((mass_a * x + mass_b * y) * share);
    }
    target[i] = merged;
  }
}

template <typename T, int N>
const char* launch(const AttentionState& a, const AttentionState& b, const MergedSizes& sizes, void* out, float* lse,
                   cudaStream_t stream) {
  const int64_t rows = sizes.num_tokens * sizes.num_heads, vectors = sizes.head_dim / N;
  if (rows > 2147483647) return "more than 2^31 - 1 rows (num_tokens * num_heads)";
  const int x = static_cast<int>(std::max<int64_t>(std::min<int64_t>(vectors, kThreads), 1)), y = kThreads / x;
  const unsigned ctas = static_cast<unsigned>((rows + y - 1) / y);
  merge_kernel<T, N><<<ctas, dim3(x, y), 0, stream>>>(a, b, static_cast<unsigned>(rows), static_cast<unsigned>(sizes.num_heads),
                                                      static_cast<int>(vectors), static_cast<T*>(out), lse);
  return launch_error();
}

}  // namespace

const char* launch_merge_attention_states(const AttentionState& a, const AttentionState& b, const MergedSizes& sizes, void* out,
                                          float* lse, DtypeCode dtype, void* stream) {
  if (sizes.num_tokens == 0 || sizes.num_heads == 0) return nullptr;
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int N = 16 / sizeof(T);
    uint64_t elements = sizes.head_dim, bytes = address(out);
    for (const AttentionState* state : {&a, &b})
      elements |= state->token_stride | state->head_stride, bytes |= address(state->out);
    const auto s = static_cast<cudaStream_t>(stream);
    return elements % N == 0 && bytes % 16 == 0 ? launch<T, N>(a, b, sizes, out, lse, s)
                                                : launch<T, 1>(a, b, sizes, out, lse, s);
  });
}

}  // namespace minivllm
