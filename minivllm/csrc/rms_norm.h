// Launchers of rms_norm.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. They return null or an error text.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace minivllm {

// Row r lies at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct RmsNormRows {
  int64_t inner, outer_stride, inner_stride;
};

const char* launch_rms_norm(const void* x, RmsNormRows x_rows, const void* weight, void* out, int64_t num_rows, int64_t hidden,
                            float eps, DtypeCode dtype, void* stream);

const char* launch_fused_add_rms_norm(void* x, RmsNormRows x_rows, void* residual, RmsNormRows residual_rows,
                                      const void* weight, int64_t num_rows, int64_t hidden, float eps, DtypeCode dtype,
                                      void* stream);

}  // namespace minivllm
