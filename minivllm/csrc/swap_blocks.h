// Launcher of swap_blocks.cu, torch-free: raw pointers, strides and lengths in bytes, a cudaStream_t as void*. It returns null or an
// error text.
#pragma once

#include <cstdint>

namespace minivllm {

// The address under which the current device reaches host memory; null where the memory is not pinned.
void* pinned_address(const void* host);

struct SwapBlocksCache {
  void* data;
  int64_t block_stride;
  const int64_t* ids;
};

// over_bus: one of the two lies in host memory.
const char* launch_swap_blocks(const SwapBlocksCache& source, const SwapBlocksCache& target, int64_t num_pairs,
                               int64_t block_bytes, bool over_bus, void* stream);

}  // namespace minivllm
