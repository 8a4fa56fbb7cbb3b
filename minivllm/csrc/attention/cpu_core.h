// What the CPU's core of flash_attention and paged_attention is told (cpu_core.cpp computes): where rows lie, and who sees what.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace minivllm::attention {

// One sequence of the batch. table is null for packed keys, which begin at row kv_begin.
struct Sequence {
  int64_t q_begin, len_q, kv_begin, len_k;
  const int32_t* table;
};

// Keys or values; strides in elements. Packed rows have no blocks.
struct Side {
  const void* data;
  int64_t block_stride, head_stride, row_stride;
};

struct Call {
  const void* q;
  int64_t q_token_stride, q_head_stride;
  void* out;   // [num_tokens, num_heads, head_dim], contiguous
  float* lse;  // [num_tokens, num_heads], or null: not asked for
  int64_t num_heads, num_kv_heads, head_dim;
  Side k, v;
  int block_shift;  // log2 of the block size
  float scale, softcap;  // softcap 0: off
  int64_t window;        // keys that a causal query sees at most; 0: all
  bool causal, far;      // far: keys and values come from beyond the L2 cache
  std::vector<Sequence> sequences;

  int64_t group() const { return num_heads / num_kv_heads; }
  // A query sees the keys [first_visible, visible): causal queries are aligned to the end of the sequence.
  int64_t visible(const Sequence& s, int64_t query) const {
    return causal ? std::clamp<int64_t>(query + 1 + s.len_k - s.len_q, 0, s.len_k) : s.len_k;
  }
  int64_t first_visible(const Sequence& s, int64_t query) const {
    return window > 0 ? std::max<int64_t>(visible(s, query) - window, 0) : 0;
  }
};

// Computes all sequences of a call; dtype: of queries, keys, values and the output.
void run(torch::headeronly::ScalarType dtype, Call call);

}  // namespace minivllm::attention
