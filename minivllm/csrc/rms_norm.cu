// rms_norm and fused_add_rms_norm on CUDA. A row is one pass over memory: each thread keeps up to four 16-byte vectors in registers
// between the sum of squares and the scaling. Rows of up to 128 vectors take one warp each and share a block, so that nobody waits at a
// barrier; longer rows take up to 1024 threads. Floor: bytes / bandwidth (2 x row for rms_norm, 4 x row fused), or the launch for few
// rows.
#include "common/convert.cuh"
#include "common/launch.cuh"
#include "rms_norm.h"

namespace minivllm {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kBlockThreads = 128;   // rows of fewer threads share a block
constexpr int kRegisterVectors = 4;  // vectors a thread keeps; longer rows are read a second time (from L2)

// One row a threadIdx.y. kFused adds x into the residual first and normalises the rounded sum. The order of a row's sum (vectors of a
// thread one after the other, then the threads) depends on its length alone, not on its neighbours.
template <typename T, int N, bool kFused>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(T* x, RowLayout x_rows, T* residual, RowLayout residual_rows, const T* weight, T* out, int64_t num_rows,
                    int num_vectors, float inverse_hidden, float eps) {
  using V = Vec<T, N>;
  __shared__ float partial[32 * (kBlockThreads / 32)];
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < num_rows;  // idle rows of the last block still take part in __syncthreads
  V* x_row = live ? reinterpret_cast<V*>(x + row_offset(x_rows, row)) : nullptr;
  V* r_row = live && kFused ? reinterpret_cast<V*>(residual + row_offset(residual_rows, row)) : nullptr;
  const int end = live ? num_vectors : 0;

  V kept[kRegisterVectors], added[kRegisterVectors];
#pragma unroll
  for (int k = 0; k < kRegisterVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < end) kept[k] = x_row[i];
    if (kFused && i < end) added[k] = r_row[i];
  }
  float sum = 0.0f;
  const auto take = [&](V& v, const V& r, int i) {
    float wide[N], part = 0.0f;
    widen_all(v, wide);
    if (kFused) {
      float other[N];
      widen_all(r, other);
#pragma unroll
      for (int j = 0; j < N; ++j) wide[j] += other[j];
      v = narrow_all<T, N>(wide);
      widen_all(v, wide);
      r_row[i] = v;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) part = fmaf(wide[j], wide[j], part);
    sum += part;
  };
#pragma unroll
  for (int k = 0; k < kRegisterVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < end) take(kept[k], added[k], i);
  }
  for (int i = threadIdx.x + kRegisterVectors * blockDim.x; i < end; i += blockDim.x) {
    V v = x_row[i];
    take(v, kFused ? r_row[i] : v, i);
  }

  const float scale = rsqrtf(fmaf(row_sum(sum, partial), inverse_hidden, eps));
  V* out_row = kFused ? x_row : reinterpret_cast<V*>(out) + row * num_vectors;
  const V* w = reinterpret_cast<const V*>(weight);
  const auto put = [&](const V& v, int i) {
    float wide[N], weights[N];
    widen_all(v, wide);
    widen_all(w[i], weights);
#pragma unroll
    for (int j = 0; j < N; ++j) wide[j] *= scale;
    round_all<T, N>(wide);
#pragma unroll
    for (int j = 0; j < N; ++j) wide[j] *= weights[j];
    out_row[i] = narrow_all<T, N>(wide);
  };
#pragma unroll
  for (int k = 0; k < kRegisterVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < end) put(kept[k], i);
  }
  for (int i = threadIdx.x + kRegisterVectors * blockDim.x; i < end; i += blockDim.x) put(kFused ? r_row[i] : x_row[i], i);
}

struct Problem {
  void* x;
  RowLayout x_rows;
  void* residual;  // null: plain rms_norm
  RowLayout residual_rows;
  const void* weight;
  void* out;
  int64_t num_rows, hidden;
  float eps;
};

template <typename T, int N>
const char* launch(const Problem& p, cudaStream_t stream) {
  const int num_vectors = static_cast<int>(p.hidden / N);
  int threads = 32;
  while (threads < kMaxThreads && threads * kRegisterVectors < num_vectors) threads *= 2;
  const int rows_per_block = threads >= kBlockThreads ? 1 : kBlockThreads / threads;
  const int64_t blocks = (p.num_rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks of rows";
  const dim3 block(threads, rows_per_block);
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  auto* kernel = p.residual ? rms_norm_kernel<T, N, true> : rms_norm_kernel<T, N, false>;
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(blocks)), block, 0, stream, static_cast<T*>(p.x), p.x_rows,
                           static_cast<T*>(p.residual), p.residual_rows, static_cast<const T*>(p.weight), static_cast<T*>(p.out),
                           p.num_rows, num_vectors, inverse_hidden, p.eps);
}

const char* dispatch(const Problem& p, DtypeCode dtype, void* stream) {
  if (p.num_rows == 0 || p.hidden == 0) return nullptr;
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int N = 16 / sizeof(T);
    const RowLayout packed{1, 0, p.hidden};
    const bool wide = p.hidden % N == 0 && rows_aligned(p.x, p.x_rows, N, 16) && rows_aligned(p.weight, packed, N, 16) &&
                      rows_aligned(p.residual, p.residual_rows, N, 16) && rows_aligned(p.out, packed, N, 16);
    const auto s = static_cast<cudaStream_t>(stream);
    return wide ? launch<T, N>(p, s) : launch<T, 1>(p, s);
  });
}

}  // namespace

const char* launch_rms_norm(const void* x, RowLayout x_rows, const void* weight, void* out, int64_t num_rows, int64_t hidden,
                            float eps, DtypeCode dtype, void* stream) {
  return dispatch({const_cast<void*>(x), x_rows, nullptr, {1, 0, 0}, weight, out, num_rows, hidden, eps}, dtype, stream);
}

const char* launch_fused_add_rms_norm(void* x, RowLayout x_rows, void* residual, RowLayout residual_rows,
                                      const void* weight, int64_t num_rows, int64_t hidden, float eps, DtypeCode dtype,
                                      void* stream) {
  return dispatch({x, x_rows, residual, residual_rows, weight, nullptr, num_rows, hidden, eps}, dtype, stream);
}

}  // namespace minivllm
