// Launcher of qk_norm_rope_store.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. It returns null or
// an error text.
#pragma once

#include "common/dtype.h"
#include "common/rows.h"

namespace minivllm {

struct QkNormRopeStore {
  HeadLayout q, k, v;               // [num_tokens, count, head_dim]; q is written
  const void *q_weight, *k_weight;  // [head_dim]; null: no norm
  const void* positions;            // [num_tokens]
  bool wide_positions;              // int64, else int32
  const float* table;               // [max_position, rotary_dim]
  int64_t table_stride;
  void *k_cache, *v_cache;  // blocks of [num_kv_heads, block_size, head_dim]
  int64_t k_block_stride, v_block_stride;
  const int64_t* slots;  // [num_tokens]; negative: not stored
  int block_size, head_dim, rotary_dim;
  float eps;
  bool interleaved;
};

const char* launch_qk_norm_rope_store(const QkNormRopeStore& x, int64_t num_tokens, DtypeCode dtype, void* stream);

}  // namespace minivllm
