// Launcher of copy_blocks.cu, torch-free: raw pointers, strides and lengths in bytes, a cudaStream_t as void*. It returns null or an
// error text.
#pragma once

#include <cstdint>

namespace minivllm {

struct CopyBlocksCache {
  void* data;
  int64_t block_stride;
};

// Bytes of scratch memory that a call needs; 0 for up to about a thousand pairs.
int64_t copy_blocks_workspace(int64_t num_pairs, int64_t block_bytes);

const char* launch_copy_blocks(CopyBlocksCache k, CopyBlocksCache v, int64_t block_bytes, const int64_t* sources,
                               const int64_t* targets, int64_t num_pairs, void* workspace, void* stream);

}  // namespace minivllm
