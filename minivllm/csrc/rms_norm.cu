// rms_norm and fused_add_rms_norm on CUDA. A row is one pass over memory: each thread keeps its 16-byte vectors in registers between
// the sum of squares and the scaling. Short rows take one warp each and share a block, long rows take up to 1024 threads.
// Floor: bytes / bandwidth (2 x row for rms_norm, 4 x row fused), or the launch for few rows.
#include <cuda_runtime.h>

#include "common/vec.cuh"
#include "rms_norm.h"

namespace minivllm {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kBlockThreads = 128;  // rows shorter than this many vectors share a block
constexpr int kRegisterVectors = 4;  // vectors a thread keeps; longer rows are read a second time (from L2)

__device__ __forceinline__ int64_t row_offset(const RmsNormRows& rows, int64_t r) {
  if (rows.outer_stride == 0) return r * rows.inner_stride;
  return (r / rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride;
}

// One row a threadIdx.y. kFused adds x into the residual first and normalises the rounded sum.
template <typename T, int N, bool kFused>
__global__ void __launch_bounds__(kMaxThreads)
    rms_norm_kernel(T* x, RmsNormRows x_rows, T* residual, RmsNormRows residual_rows, const T* weight, T* out, int64_t num_rows,
                    int num_vectors, float inverse_hidden, float eps) {
  using V = Vec<T, N>;
  __shared__ float partial[32 * (kBlockThreads / 32)];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < num_rows;  // idle rows of the last block still take part in __syncthreads
  V* x_row = live ? reinterpret_cast<V*>(x + row_offset(x_rows, row)) : nullptr;
  V* r_row = live && kFused ? reinterpret_cast<V*>(residual + row_offset(residual_rows, row)) : nullptr;
  const int end = live ? num_vectors : 0;

  V kept[kRegisterVectors];
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < kRegisterVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < end) kept[k] = x_row[i];
  }
  const auto take = [&](V& v, int i) {
    if (kFused) {
      const V r = r_row[i];
#pragma unroll
      for (int j = 0; j < N; ++j) v.data[j] = narrow<T>(widen(v.data[j]) + widen(r.data[j]));
      r_row[i] = v;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum += widen(v.data[j]) * widen(v.data[j]);
  };
#pragma unroll
  for (int k = 0; k < kRegisterVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (i < end) take(kept[k], i);
  }
  for (int i = threadIdx.x + kRegisterVectors * blockDim.x; i < end; i += blockDim.x) {
    V v = x_row[i];
    take(v, i);
  }

  const float scale = rsqrtf(row_sum(sum, partial) * inverse_hidden + eps);
  V* out_row = kFused ? x_row : reinterpret_cast<V*>(out) + row * num_vectors;
  const V* w = reinterpret_cast<const V*>(weight);
  const auto put = [&](const V& v, int i) {
    const V weights = w[i];
    V result;
#pragma unroll
    for (int j = 0; j < N; ++j)
      result.data[j] = narrow<T>(widen(narrow<T>(widen(v.data[j]) * scale)) * widen(weights.data[j]));
    out_row[i] = result;
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
  RmsNormRows x_rows;
  void* residual;  // null: plain rms_norm
  RmsNormRows residual_rows;
  const void* weight;
  void* out;
  int64_t num_rows, hidden;
  float eps;
};

template <typename T, int N>
const char* launch(const Problem& p, cudaStream_t stream) {
  const int num_vectors = static_cast<int>(p.hidden / N);
  // Two vectors a thread where the row is long enough: both loads are in flight before the first sum.
  int threads = 32;
  while (threads < kMaxThreads && threads * 2 < num_vectors) threads *= 2;
  const int rows_per_block = threads >= kBlockThreads ? 1 : kBlockThreads / threads;
  const int64_t blocks = (p.num_rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks of rows";
  const dim3 block(threads, rows_per_block);
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  auto* kernel = p.residual ? rms_norm_kernel<T, N, true> : rms_norm_kernel<T, N, false>;
  kernel<<<static_cast<unsigned>(blocks), block, 0, stream>>>(
      static_cast<T*>(p.x), p.x_rows, static_cast<T*>(p.residual), p.residual_rows, static_cast<const T*>(p.weight),
      static_cast<T*>(p.out), p.num_rows, num_vectors, inverse_hidden, p.eps);
  return launch_error();
}

bool aligned(const void* pointer, const RmsNormRows& rows, int64_t elements, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && rows.outer_stride % elements == 0 &&
         rows.inner_stride % elements == 0;
}

const char* dispatch(const Problem& p, DtypeCode dtype, void* stream) {
  if (p.num_rows == 0 || p.hidden == 0) return nullptr;
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int N = 16 / sizeof(T);
    const RmsNormRows packed{1, 0, p.hidden};
    const bool wide = p.hidden % N == 0 && aligned(p.x, p.x_rows, N, 16) && aligned(p.weight, packed, N, 16) &&
                      aligned(p.residual, p.residual_rows, N, 16) && aligned(p.out, packed, N, 16);
    const auto s = static_cast<cudaStream_t>(stream);
    return wide ? launch<T, N>(p, s) : launch<T, 1>(p, s);
  });
}

}  // namespace

const char* launch_rms_norm(const void* x, RmsNormRows x_rows, const void* weight, void* out, int64_t num_rows, int64_t hidden,
                            float eps, DtypeCode dtype, void* stream) {
  return dispatch({const_cast<void*>(x), x_rows, nullptr, {1, 0, 0}, weight, out, num_rows, hidden, eps}, dtype, stream);
}

const char* launch_fused_add_rms_norm(void* x, RmsNormRows x_rows, void* residual, RmsNormRows residual_rows,
                                      const void* weight, int64_t num_rows, int64_t hidden, float eps, DtypeCode dtype,
                                      void* stream) {
  return dispatch({x, x_rows, residual, residual_rows, weight, nullptr, num_rows, hidden, eps}, dtype, stream);
}

}  // namespace minivllm
