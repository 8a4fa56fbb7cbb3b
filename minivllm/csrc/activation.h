// Launcher of activation.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. It returns null or an
// error text.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace minivllm {

enum class Activation : int { kSilu, kGelu, kGeluTanh };

// x: num_rows rows of 2 * d elements; out: [num_rows, d].
const char* launch_gated_activation(Activation activation, const void* x, RowLayout x_rows, void* out, int64_t num_rows,
                                    int64_t d, DtypeCode dtype, void* stream);

}  // namespace minivllm
