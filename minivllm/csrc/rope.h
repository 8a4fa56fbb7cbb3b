// Launcher of rope.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. It returns null or an error
// text.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace minivllm {

// Turns the first rotary_dim elements of every head of q and k in place.
const char* launch_apply_rope(HeadLayout q, HeadLayout k, const void* positions, bool wide_positions, const float* table,
                              int64_t table_stride, int64_t rotary_dim, int64_t num_tokens, bool interleaved, DtypeCode dtype,
                              void* stream);

}  // namespace minivllm
