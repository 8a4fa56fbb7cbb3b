// silu_and_mul on the CPU: one row at a time, gate and up widened to float32.
#include "common/check.h"
#include "common/cpu.h"

#include <vector>

namespace minivllm {
namespace {

void silu(float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] / (1.0f + fast_exp(-x[i]));
}

void silu_row(const float* gate, const float* up, float* out, int64_t d, float*) {
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) out[i] = gate[i] / (1.0f + fast_exp(-gate[i])) * up[i];
}

// scratch: 2 * d floats. silu is rounded to T before the product, as Hugging Face does.
template <typename T>
void silu_row(const T* gate, const T* up, T* out, int64_t d, float* scratch) {
  float *wide = scratch, *wide_up = scratch + d;
  to_float(gate, wide, d);
  to_float(up, wide_up, d);
  silu(wide, d);
  round_to(wide, d, static_cast<const T*>(nullptr));
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) wide[i] *= wide_up[i];
  from_float(wide, out, d);
}

Tensor silu_and_mul_cpu(const Tensor& x) {
  Check check("silu_and_mul", x);
  check.tensor("x", x, {"...", "width"}, MINIVLLM_FLOATS);
  const int64_t width = check["width"], d = width / 2, last = x.dim() - 1;
  check.require(width % 2 == 0, "x has a last dimension of " + std::to_string(width) +
                                    ", expected an even last dimension (gate and up side by side)");
  const Rows rows = collapse_rows(check, "x", x);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape[last] = d;
  Tensor out = torch::stable::new_empty(x, shape);
  dispatch_float(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const T* in = static_cast<const T*>(x.data_ptr());
    T* result = static_cast<T*>(out.data_ptr());
    constexpr int64_t kCost = 4;  // an exponential and a division for each element
    parallel_items(rows.count, kCost * d, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(2 * d);
      for (int64_t r = begin; r < end; ++r) {
        const T* row = in + rows.offset(r);
        silu_row(row, row + d, result + r * d, d, scratch.data());
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul_cpu)); }

}  // namespace minivllm
