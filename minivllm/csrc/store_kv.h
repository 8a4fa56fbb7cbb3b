// Launcher of store_kv.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. It returns null or an error text.
#pragma once

#include <cstdint>

namespace minivllm {

// Where the keys (or values) of new tokens come from, and the cache they go to.
struct StoreKvSide {
  const void* from;
  int64_t token_stride, head_stride;
  void* cache;
  int64_t block_stride;
};

struct StoreKvSizes {
  int64_t num_tokens, num_kv_heads, block_size, head_dim, element_bytes;
};

const char* launch_store_kv(const StoreKvSide& k, const StoreKvSide& v, const int64_t* slots, const StoreKvSizes& sizes,
                            void* stream);

}  // namespace minivllm
