// The paged key-value cache as the compiled ops see it. ops/store_kv.py describes its layout.
#pragma once

#include "common/check.h"

namespace minivllm {

// Binds num_blocks (or `blocks`), num_kv_heads, block_size and head_dim, and makes sure that each block is contiguous.
inline void check_cache(Check& check, const char* name, const Tensor& cache, ScalarType dtype,
                        const char* blocks = "num_blocks") {
  check.tensor(name, cache, {blocks, "num_kv_heads", "block_size", "head_dim"}, {dtype});
  const int64_t heads = cache.size(1), block_size = cache.size(2), head_dim = cache.size(3);
  if (block_size < 8 || block_size > 256 || (block_size & (block_size - 1)) != 0)
    check.fail(std::string(name) + " has block_size=" + std::to_string(block_size) +
               ", expected a power of two from 8 to 256");
  if (cache.stride(2) != head_dim || (heads > 1 && cache.stride(1) != block_size * head_dim))
    check.fail(std::string(name) + " has strides [" + std::to_string(cache.stride(0)) + ", " +
               std::to_string(cache.stride(1)) + ", " + std::to_string(cache.stride(2)) + ", " +
               std::to_string(cache.stride(3)) + "], expected each block (dimensions 1 to 3) to be contiguous");
}

inline int64_t block_bytes(const Tensor& cache) {
  return cache.size(1) * cache.size(2) * cache.size(3) * static_cast<int64_t>(cache.element_size());
}

inline int64_t block_stride_bytes(const Tensor& cache) { return cache.stride(0) * static_cast<int64_t>(cache.element_size()); }

// slots: [num_tokens] int64, on the CPU; negative ones skip their token.
inline void check_slots(const Check& check, const Tensor& slots) {
  check_ids(check, "slot_mapping", slots, check["num_blocks"] * check["block_size"], INT64_MIN);
}

}  // namespace minivllm
