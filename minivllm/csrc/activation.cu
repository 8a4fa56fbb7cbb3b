// silu_and_mul and gelu_and_mul on CUDA: each thread takes one or two 16-byte vectors of the gate and the same of the up half,
// all loaded before the first is used. Floor: 3 * d * bytes / bandwidth a row, or the launch for few rows.
#include "activation.h"
#include "common/convert.cuh"
#include "common/launch.cuh"

namespace minivllm {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMinThreads = 128;  // shorter rows share a block

// e^x and a / b: for 16-bit results the hardware's approximations, whose few units of the last float32 place no rounding shows.
template <typename T>
__device__ __forceinline__ float exponential(float x) { return sizeof(T) == 4 ? expf(x) : __expf(x); }

template <typename T>
__device__ __forceinline__ float quotient(float a, float b) { return sizeof(T) == 4 ? a / b : __fdividef(a, b); }

// The distribution function of the normal distribution: 1 - tail or tail of |x|, tail = e^(-x^2 / 2) times a polynomial in 1 /
// (1 + 0.35 |x|) (the form of Hastings 1955, Abramowitz and Stegun 26.2.17; coefficients fitted by us, relative error 4e-8).
template <typename T>
__device__ __forceinline__ float normal_distribution(float x) {
  const float t = quotient<T>(1.0f, fmaf(0.35f, fabsf(x), 1.0f));
  float p = -0.0291514887f;
  p = fmaf(p, t, 0.143996437f);
  p = fmaf(p, t, -0.255760426f);
  p = fmaf(p, t, 0.159221072f);
  p = fmaf(p, t, -0.0231380097f);
  p = fmaf(p, t, 0.105518157f);
  p = fmaf(p, t, 0.119830746f);
  p = fmaf(p, t, 0.139862102f);
  p = fmaf(p, t, 0.139621394f);
  const float tail = p * t * exponential<T>(-0.5f * x * x);
  return x < 0.0f ? tail : 1.0f - tail;
}

template <Activation kActivation, typename T>
__device__ __forceinline__ float activate(float x) {
  if (kActivation == Activation::kGelu) return x * normal_distribution<T>(x);
  // x / 2 * (1 + tanh(u)) = x / (1 + e^(-2u)): no cancellation for negative x, and silu's own form.
  float u = x;  // 2u for gelu: 2 sqrt(2 / pi) (x + 0.044715 x^3)
  if (kActivation == Activation::kGeluTanh) u = 1.595769122f * fmaf(0.044715f * x * x, x, x);
  return quotient<T>(x, 1.0f + exponential<T>(-u));
}

// Block (x, y): a chunk blockIdx.y of kPerThread * blockDim.x vectors of the row blockIdx.x * blockDim.y + threadIdx.y.
template <typename T, int N, Activation kActivation, int kPerThread>
__global__ void __launch_bounds__(kMaxThreads)
    gated_kernel(const T* x, RowLayout x_rows, T* out, int64_t num_rows, int64_t num_vectors) {
  using V = Vec<T, N>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= num_rows) return;
  const V* gate = reinterpret_cast<const V*>(x + row_offset(x_rows, row));
  const V* up = gate + num_vectors;
  V* target = reinterpret_cast<V*>(out) + row * num_vectors;
  const int64_t stride = static_cast<int64_t>(gridDim.y) * blockDim.x * kPerThread;
  int64_t first = static_cast<int64_t>(blockIdx.y) * blockDim.x * kPerThread + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = first + k * blockDim.x;
    if (i < num_vectors) prefetch_early(gate + i), prefetch_early(up + i);
  }
  wait_for_predecessors();
  let_dependents_launch();
  for (; first < num_vectors; first += stride) {
    V gates[kPerThread], ups[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = first + k * blockDim.x;
      if (i < num_vectors) gates[k] = gate[i], ups[k] = up[i];
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t i = first + k * blockDim.x;
      float wide[N];
      widen_all(gates[k], wide);
#pragma unroll
      for (int j = 0; j < N; ++j) wide[j] = activate<kActivation, T>(wide[j]);
      // The activation is rounded before the product, as Hugging Face does.
      if (i < num_vectors) target[i] = multiply_all(narrow_all<T, N>(wide), ups[k]);
    }
  }
}

struct Problem {
  const void* x;
  RowLayout x_rows;
  void* out;
  int64_t num_rows, d;
};

template <typename T, int N, Activation kActivation>
const char* launch(const Problem& p, cudaStream_t stream) {
  const int64_t num_vectors = p.d / N;
  const int per_thread = p.num_rows * num_vectors < kFewThreads ? 1 : 2;  // vectors: of few one, to use more of the GPU
  const int64_t per_block = static_cast<int64_t>(kMaxThreads) * per_thread;
  int64_t chunks = (num_vectors + per_block - 1) / per_block;
  if (chunks > 65535) chunks = 65535;
  const int64_t wanted = (num_vectors + chunks * per_thread - 1) / (chunks * per_thread);  // threads, chunks of equal length
  const int threads = wanted >= kMaxThreads ? kMaxThreads : static_cast<int>((wanted + 31) / 32 * 32);
  const int rows_per_block = threads >= kMinThreads ? 1 : kMinThreads / threads;
  const int64_t blocks = (p.num_rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks of rows";
  auto* kernel = per_thread == 1 ? gated_kernel<T, N, kActivation, 1> : gated_kernel<T, N, kActivation, 2>;
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(chunks)),
                           dim3(threads, rows_per_block), 0, stream, static_cast<const T*>(p.x), p.x_rows,
                           static_cast<T*>(p.out), p.num_rows, num_vectors);
}

template <typename T, int N>
const char* dispatch_activation(Activation activation, const Problem& p, cudaStream_t stream) {
  switch (activation) {
    case Activation::kSilu: return launch<T, N, Activation::kSilu>(p, stream);
    case Activation::kGelu: return launch<T, N, Activation::kGelu>(p, stream);
    case Activation::kGeluTanh: return launch<T, N, Activation::kGeluTanh>(p, stream);
  }
  return "unknown activation";
}

}  // namespace

const char* launch_gated_activation(Activation activation, const void* x, RowLayout x_rows, void* out, int64_t num_rows,
                                    int64_t d, DtypeCode dtype, void* stream) {
  if (num_rows == 0 || d == 0) return nullptr;
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int N = 16 / sizeof(T);
    const Problem p{x, x_rows, out, num_rows, d};
    const auto s = static_cast<cudaStream_t>(stream);
    const bool wide = d % N == 0 && rows_aligned(x, x_rows, N, 16) && rows_aligned(out, {1, 0, d}, N, 16);
    return wide ? dispatch_activation<T, N>(activation, p, s) : dispatch_activation<T, 1>(activation, p, s);
  });
}

}  // namespace minivllm
