// Launcher of attention/decode.cu: attention of decode rows over the paged cache, following a plan (attention/plan.h). Torch-free.
#pragma once

#include <cstdint>

#include "attention/plan.h"
#include "common/dtype.h"

namespace minivllm::attention {

struct DecodeCall {
  const void* q;
  int64_t q_token_stride, q_head_stride;
  const void *k_cache, *v_cache;
  int64_t k_block_stride, v_block_stride;  // elements; within a block [num_kv_heads, block_size, head_dim] is contiguous
  const int32_t* block_tables;
  int64_t table_stride;
  int block_shift;  // log2 of the block size
  int32_t* plan;    // also holds the counters and the states of split rows
  void* out;        // [num_tokens, num_heads, head_dim]
  float* lse;       // [num_tokens, num_heads], or null
  float scale, softcap;
  int window;
  DecodeShape shape;
};

// Whether this kernel takes decode rows of such tensors; if not, the general kernel must take them.
bool can_decode(const DecodeCall& call, DtypeCode dtype);

// Thread blocks of the persistent grid on the current device, for DecodeShape::num_ctas; 0 if the device cannot run it.
int decode_grid(const DecodeShape& shape);

const char* launch_decode(const DecodeCall& call, DtypeCode dtype, void* stream);

}  // namespace minivllm::attention
