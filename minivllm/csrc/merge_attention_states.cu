// merge_attention_states on CUDA: a thread merges one 16-byte vector of a row; its two loads and those of the row's two
// log-sum-exps, which come from the L1 for all but the first thread of a row, are under way together. Floor: 3 x bytes of out /
// bandwidth, or the launch for few rows.
#include <algorithm>

#include "common/convert.cuh"
#include "common/copy.cuh"
#include "common/launch.cuh"
#include "merge_attention_states.h"

namespace minivllm {
namespace {

constexpr int kThreads = 256;

// threadIdx: vector of a row, row = token * num_heads + head.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ AttentionState a, const __grid_constant__ AttentionState b, unsigned num_rows,
                 unsigned num_heads, int vectors, T* out, float* lse) {
  using V = Vec<T, N>;
  const unsigned row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const unsigned token = row / num_heads, head = row % num_heads;
  const float *lse_at_a = a.lse + token * a.lse_stride + head, *lse_at_b = b.lse + token * b.lse_stride + head;
  const T* from_a = static_cast<const T*>(a.out) + token * a.token_stride + head * a.head_stride + threadIdx.x * N;
  const T* from_b = static_cast<const T*>(b.out) + token * b.token_stride + head * b.head_stride + threadIdx.x * N;
  V* target = reinterpret_cast<V*>(out) + static_cast<int64_t>(row) * vectors;
  prefetch_early(from_a), prefetch_early(from_b), prefetch_early(lse_at_a), prefetch_early(lse_at_b);
  wait_for_predecessors();
  let_dependents_launch();

  const float lse_a = *lse_at_a, lse_b = *lse_at_b;
  V va, vb;
  if (vectors > 0) va = load_in_order<T, N>(from_a), vb = load_in_order<T, N>(from_b);
  const float largest = fmaxf(lse_a, lse_b), shift = largest == -INFINITY ? 0.0f : largest;
  // The larger mass is 1. The fast exponential errs by some |x| 2^-24 of e^x, which for x <= 0 is less than a rounding of that 1.
  const float mass_a = __expf(lse_a - shift), mass_b = __expf(lse_b - shift), mass = mass_a + mass_b;
  const float inverse = mass == 0.0f ? 0.0f : __fdividef(1.0f, mass), share_a = mass_a * inverse, share_b = mass_b * inverse;
  if (threadIdx.x == 0) lse[row] = shift + logf(mass);
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    if (i >= static_cast<int>(blockDim.x)) {
      const int skipped = (i - static_cast<int>(threadIdx.x)) * N;
      va = load_in_order<T, N>(from_a + skipped), vb = load_in_order<T, N>(from_b + skipped);
    }
    // An empty side may hold NaN.
    if (lse_a == -INFINITY) va = V{};
    if (lse_b == -INFINITY) vb = V{};
    float wide_a[N], wide_b[N];
    widen_all(va, wide_a);
    widen_all(vb, wide_b);
#pragma unroll
    for (int j = 0; j < N; ++j) wide_a[j] = fmaf(share_a, wide_a[j], share_b * wide_b[j]);
    target[i] = narrow_all<T, N>(wide_a);
  }
}

template <typename T, int N>
const char* launch(const AttentionState& a, const AttentionState& b, const MergedSizes& sizes, void* out, float* lse,
                   cudaStream_t stream) {
  const int64_t rows = sizes.num_tokens * sizes.num_heads, vectors = sizes.head_dim / N;
  if (rows > 2147483647) return "more than 2^31 - 1 rows (num_tokens * num_heads)";
  const int x = static_cast<int>(std::max<int64_t>(std::min<int64_t>(vectors, kThreads), 1)), y = kThreads / x;
  const unsigned ctas = static_cast<unsigned>((rows + y - 1) / y);
  return launch_overlapped(merge_kernel<T, N>, ctas, dim3(x, y), 0, stream, a, b, static_cast<unsigned>(rows),
                           static_cast<unsigned>(sizes.num_heads), static_cast<int>(vectors), static_cast<T*>(out), lse);
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
