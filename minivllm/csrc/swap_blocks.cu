// swap_blocks on CUDA: a kernel that reads or writes pinned host memory through the bus, because the block ids lie on the device,
// where a copy engine cannot look them up. Over the bus a few CTAs keep enough bytes in flight and leave the other SMs to the
// model. Floor: bytes / PCIe bandwidth, or 2 x bytes / memory bandwidth on one device.
#include "common/copy.cuh"
#include "common/vec.cuh"
#include "swap_blocks.h"

namespace minivllm {
namespace {

constexpr int64_t kBusCtas = 16;  // 16 KiB in flight each; on an H200 with PCIe 5 8 are as fast as 1056, 4 are slower
constexpr int64_t kDeviceCtas = 1 << 20;

}  // namespace

void* pinned_address(const void* host) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, host) != cudaSuccess) {
    cudaGetLastError();  // drivers before CUDA 11 call plain host memory an error
    return nullptr;
  }
  return attributes.type == cudaMemoryTypeUnregistered ? nullptr : attributes.devicePointer;
}

const char* launch_swap_blocks(const SwapBlocksCache& source, const SwapBlocksCache& target, int64_t num_pairs,
                               int64_t block_bytes, bool over_bus, void* stream) {
  if (num_pairs == 0 || block_bytes == 0) return nullptr;
  const uint64_t bytes =
      address(source.data) | address(target.data) | source.block_stride | target.block_stride | block_bytes;
  return dispatch_width(bytes, [&](auto* tag) -> const char* {
    using V = std::remove_pointer_t<decltype(tag)>;
    constexpr int64_t kBytes = sizeof(V);
    const Blocks<V> from{static_cast<V*>(source.data), source.block_stride / kBytes, source.ids};
    const Blocks<V> to{static_cast<V*>(target.data), target.block_stride / kBytes, target.ids};
    move_blocks<V>(from, to, num_pairs, block_bytes / kBytes, over_bus ? kBusCtas : kDeviceCtas,
                   static_cast<cudaStream_t>(stream));
    return launch_error();
  });
}

}  // namespace minivllm
