// What the CUDA kernels of flash_attention and paged_attention are told, torch-free: raw pointers, strides in elements.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace minivllm::attention {

// Keys or values. Packed: row j of a sequence lies at its first row + j. Paged: in the block of the cache that holds it.
struct KvSide {
  const void* data;
  int64_t block_stride, head_stride, row_stride;
};

struct Prefill {
  const void* q;
  int64_t q_token_stride, q_head_stride;
  KvSide k, v;
  void* out;   // [num_tokens, num_heads, head_dim], contiguous
  float* lse;  // [num_tokens, num_heads], or null: not asked for
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* cu_seqlens_k;  // [batch + 1], packed only
  const int32_t* seq_lens;      // [batch], paged only
  const int32_t* block_tables;  // paged only
  int64_t table_stride;
  int block_shift;  // log2 of the block size
  int decoded_queries;  // sequences of so many queries or fewer are left to the decode kernel; 0: none
  int batch, num_tokens, num_heads, num_kv_heads, head_dim;
  float scale, softcap;  // softcap 0: off
  int64_t window;        // 0: off
  bool causal;
  DtypeCode dtype;
};

}  // namespace minivllm::attention
