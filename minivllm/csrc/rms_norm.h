// Launchers of rms_norm.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. They return null or an
// error text.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace minivllm {

const char* launch_rms_norm(const void* x, RowLayout x_rows, const void* weight, void* out, int64_t num_rows, int64_t hidden,
                            float eps, DtypeCode dtype, void* stream);

const char* launch_fused_add_rms_norm(void* x, RowLayout x_rows, void* residual, RowLayout residual_rows,
                                      const void* weight, int64_t num_rows, int64_t hidden, float eps, DtypeCode dtype,
                                      void* stream);

}  // namespace minivllm
