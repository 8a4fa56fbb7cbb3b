// Launcher of merge_attention_states.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. It returns null or an
// error text.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace minivllm {

// One partial result: out [num_tokens, num_heads, head_dim], lse float32 [num_tokens, num_heads].
struct AttentionState {
  const void* out;
  int64_t token_stride, head_stride;
  const float* lse;
  int64_t lse_stride;
};

struct MergedSizes {
  int64_t num_tokens, num_heads, head_dim;
};

// out and lse are contiguous.
const char* launch_merge_attention_states(const AttentionState& a, const AttentionState& b, const MergedSizes& sizes, void* out,
                                          float* lse, DtypeCode dtype, void* stream);

}  // namespace minivllm
