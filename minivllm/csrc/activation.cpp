// silu_and_mul and gelu_and_mul: argument checks, CPU kernels (one row at a time, gate and up widened to float32), and the
// border to the CUDA kernels of activation.cu.
#include "activation.h"
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/new_tensor.h"

#include <vector>

namespace minivllm {
namespace {

inline float silu(float x) { return x / (1.0f + fast_exp(-x)); }

// x / 2 * (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline float gelu_tanh(float x) { return x / (1.0f + fast_exp(-1.595769122f * (x + 0.044715f * x * x * x))); }

// x times the distribution function of the normal distribution: 1 - tail or tail of |x|, tail = e^(-x^2 / 2) times a polynomial
// in 1 / (1 + 0.35 |x|) (the form of Hastings 1955, Abramowitz and Stegun 26.2.17; coefficients fitted by us, relative error
// 4e-8).
inline float gelu(float x) {
  const float t = 1.0f / (1.0f + 0.35f * std::fabs(x));
  float p = -0.0291514887f;
  p = p * t + 0.143996437f;
  p = p * t - 0.255760426f;
  p = p * t + 0.159221072f;
  p = p * t - 0.0231380097f;
  p = p * t + 0.105518157f;
  p = p * t + 0.119830746f;
  p = p * t + 0.139862102f;
  p = p * t + 0.139621394f;
  const float tail = p * t * fast_exp(-0.5f * x * x);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

template <Activation kActivation>
inline float activate(float x) {
  if constexpr (kActivation == Activation::kGelu) return gelu(x);
  else if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh(x);
  else return silu(x);
}

template <Activation kActivation>
void gated_row(const float* gate, const float* up, float* out, int64_t d, float*) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) out[i] = activate<kActivation>(gate[i]) * up[i];
}

// scratch: 2 * d floats. The activation is rounded to T before the product, as Hugging Face does.
template <Activation kActivation, typename T>
void gated_row(const T* gate, const T* up, T* out, int64_t d, float* scratch) {
  float *wide = scratch, *wide_up = scratch + d;
  to_float(gate, wide, d);
  to_float(up, wide_up, d);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) wide[i] = activate<kActivation>(wide[i]);
  round_to(wide, d, static_cast<const T*>(nullptr));
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) wide[i] *= wide_up[i];
  from_float(wide, out, d);
}

struct Call {
  Rows rows;
  int64_t d;
  Tensor out;
};

Call prepare(const char* op, const Tensor& x) {
  Check check(op, x);
  check.tensor("x", x, {"...", "width"}, MINIVLLM_FLOATS);
  const int64_t width = check["width"], d = width / 2;
  check.require(width % 2 == 0, "x has a last dimension of " + std::to_string(width) +
                                    ", expected an even last dimension (gate and up side by side)");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = d;
  return {collapse_rows(check, "x", x), d, new_tensor(x, shape, x.scalar_type())};
}

template <Activation kActivation>
Tensor gated_cpu(const char* op, const Tensor& x) {
  const Call call = prepare(op, x);
  dispatch_float(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* in = static_cast<const T*>(x.data_ptr());
    T* result = static_cast<T*>(call.out.data_ptr());
    constexpr int64_t kCost = 4;  // an exponential and a division for each element
    const int64_t d = call.d;
    parallel_items(call.rows.count, kCost * d, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(std::is_same_v<T, float> ? 0 : 2 * d);
      for (int64_t r = begin; r < end; ++r) {
        const T* row = in + call.rows.offset(r);
        gated_row<kActivation>(row, row + d, result + r * d, d, scratch.data());
      }
    });
  });
  return call.out;
}

Tensor silu_and_mul_cpu(const Tensor& x) { return gated_cpu<Activation::kSilu>("silu_and_mul", x); }

Tensor gelu_and_mul_cpu(const Tensor& x, bool tanh) {
  return tanh ? gated_cpu<Activation::kGeluTanh>("gelu_and_mul", x) : gated_cpu<Activation::kGelu>("gelu_and_mul", x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) {
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul_cpu));
  m.impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul_cpu));
}

#ifdef MINIVLLM_CUDA
namespace {

Tensor gated_cuda(const char* op, Activation activation, const Tensor& x) {
  const CudaScope scope(x);
  const Call call = prepare(op, x);
  check_launch(op, launch_gated_activation(activation, x.data_ptr(),
                                           {call.rows.inner, call.rows.outer_stride, call.rows.inner_stride},
                                           call.out.data_ptr(), call.rows.count, call.d, dtype_code(x), scope.stream()));
  return call.out;
}

Tensor silu_and_mul_cuda(const Tensor& x) { return gated_cuda("silu_and_mul", Activation::kSilu, x); }

Tensor gelu_and_mul_cuda(const Tensor& x, bool tanh) {
  return gated_cuda("gelu_and_mul", tanh ? Activation::kGeluTanh : Activation::kGelu, x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) {
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul_cuda));
  m.impl("gelu_and_mul", TORCH_BOX(&gelu_and_mul_cuda));
}
#endif

}  // namespace minivllm
