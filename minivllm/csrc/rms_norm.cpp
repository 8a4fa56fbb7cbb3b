// rms_norm and fused_add_rms_norm: argument checks, CPU kernels, and the border to the CUDA kernels of rms_norm.cu.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/new_tensor.h"
#include "common/norm_row.h"
#include "rms_norm.h"

#include <vector>

namespace minivllm {
namespace {

template <typename T>
void rms_norm_rows(const T* x, const Rows& rows, const T* weight, T* out, int64_t d, float eps) {
  parallel_items(rows.count, d, [&](int64_t begin, int64_t end) {
    if constexpr (std::is_same_v<T, float>) {
      for (int64_t r = begin; r < end; ++r) normalise_float(x + rows.offset(r), weight, out + r * d, d, eps);
      return;
    }
    std::vector<float> buffer(2 * d);
    for (int64_t r = begin; r < end; ++r) {
      to_float(x + rows.offset(r), buffer.data(), d);
      normalise(buffer.data(), weight, buffer.data() + d, out + r * d, d, eps);
    }
  });
}

template <typename T>
void fused_rows(T* x, const Rows& x_rows, T* residual, const Rows& r_rows, const T* weight, int64_t d, float eps) {
  parallel_items(x_rows.count, 2 * d, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(2 * d);
    float *sum = buffer.data(), *scratch = buffer.data() + d;
    for (int64_t r = begin; r < end; ++r) {
      T *x_row = x + x_rows.offset(r), *r_row = residual + r_rows.offset(r);
      if constexpr (std::is_same_v<T, float>) {
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) r_row[i] += x_row[i];
        normalise_float(r_row, weight, x_row, d, eps);
        continue;
      }
      to_float(x_row, sum, d);
      to_float(r_row, scratch, d);
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) sum[i] += scratch[i];
      from_float(sum, r_row, d);
      round_to(sum, d, static_cast<const T*>(nullptr));
      normalise(sum, weight, scratch, x_row, d, eps);
    }
  });
}

Rows check_rms_norm(const Tensor& x, const Tensor& weight) {
  Check check("rms_norm", x);
  check.tensor("x", x, {"...", "hidden"}, MINIVLLM_FLOATS);
  check.tensor("weight", weight, {"hidden"}, {x.scalar_type()});
  return collapse_rows(check, "x", x);
}

struct FusedRows {
  Rows x, residual;
};

FusedRows check_fused(const Tensor& x, const Tensor& residual, const Tensor& weight) {
  Check check("fused_add_rms_norm", x);
  check.tensor("x", x, {"...", "hidden"}, MINIVLLM_FLOATS);
  check.tensor("residual", residual, {"...", "hidden"}, {x.scalar_type()});
  check.tensor("weight", weight, {"hidden"}, {x.scalar_type()});
  check.same_shape("residual", residual, x);
  return {collapse_rows(check, "x", x), collapse_rows(check, "residual", residual)};
}

Tensor rms_norm_cpu(const Tensor& x, const Tensor& weight, double eps) {
  const Rows rows = check_rms_norm(x, weight);
  Tensor out = new_tensor(x, x.sizes(), x.scalar_type());
  dispatch_float(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    rms_norm_rows(static_cast<const T*>(x.data_ptr()), rows, static_cast<const T*>(weight.data_ptr()),
                  static_cast<T*>(out.data_ptr()), weight.size(0), static_cast<float>(eps));
  });
  return out;
}

void fused_add_rms_norm_cpu(Tensor x, Tensor residual, const Tensor& weight, double eps) {
  const FusedRows rows = check_fused(x, residual, weight);
  dispatch_float(x.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    fused_rows(static_cast<T*>(x.data_ptr()), rows.x, static_cast<T*>(residual.data_ptr()), rows.residual,
               static_cast<const T*>(weight.data_ptr()), weight.size(0), static_cast<float>(eps));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm_cpu));
}

#ifdef MINIVLLM_CUDA
namespace {

RowLayout cuda_rows(const Rows& rows) { return {rows.inner, rows.outer_stride, rows.inner_stride}; }

Tensor rms_norm_cuda(const Tensor& x, const Tensor& weight, double eps) {
  const Rows rows = check_rms_norm(x, weight);
  const CudaScope scope(x);
  Tensor out = new_tensor(x, x.sizes(), x.scalar_type());
  check_launch("rms_norm", launch_rms_norm(x.data_ptr(), cuda_rows(rows), weight.data_ptr(), out.data_ptr(), rows.count,
                                           weight.size(0), static_cast<float>(eps), dtype_code(x), scope.stream()));
  return out;
}

void fused_add_rms_norm_cuda(Tensor x, Tensor residual, const Tensor& weight, double eps) {
  const FusedRows rows = check_fused(x, residual, weight);
  const CudaScope scope(x);
  check_launch("fused_add_rms_norm",
               launch_fused_add_rms_norm(x.data_ptr(), cuda_rows(rows.x), residual.data_ptr(), cuda_rows(rows.residual),
                                         weight.data_ptr(), rows.x.count, weight.size(0), static_cast<float>(eps),
                                         dtype_code(x), scope.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm_cuda));
}
#endif

}  // namespace minivllm
