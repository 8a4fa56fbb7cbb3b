// Launcher of embedding.cu, torch-free: raw pointers, the stride in elements, a cudaStream_t as void*. It returns null or an error text.
#pragma once

#include <cstdint>

namespace minivllm {

struct EmbeddingTable {
  const void* data;
  int64_t row_stride, num_rows, hidden, element_bytes;
};

const char* launch_embedding(const int64_t* token_ids, int64_t num_tokens, const EmbeddingTable& table, int64_t vocab_start,
                             void* out, void* stream);

}  // namespace minivllm
