// Launches whose start overlaps the end of the kernel before them (programmatic dependent launch, CUDA C++ Programming Guide;
// sm_90 and later; older GPUs launch as usual). The contract: every thread of such a kernel calls wait_for_predecessors()
// before its first access to global memory, which then holds everything that earlier kernels of the stream wrote; so only the
// launch itself is hidden.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "common/vec.cuh"

namespace minivllm {

// Row kernels are tuned for the 132 multiprocessors of an H100 or H200, where up to 2048 threads each run at a time.
constexpr unsigned kEarlyBlocks = 3 * 132, kLargeGrid = 8 * 132;
constexpr int64_t kFewThreads = 132 * 2048;

__device__ __forceinline__ void wait_for_predecessors() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// For use before wait_for_predecessors() with a place that is read after it. In a large grid the first blocks, which wait longest,
// have it brought into the L2 cache meanwhile, so memory is busy where one kernel ends and the next begins. That is no access: what
// a predecessor has yet to write there goes through the same cache, and a place that nobody reads in the end does no harm. And
// everywhere the address is computed before the wait, which the compiler would put behind it.
__device__ __forceinline__ void prefetch_early(const void* place) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (gridDim.x > kLargeGrid && blockIdx.x < kEarlyBlocks) asm volatile("prefetch.global.L2 [%0];" ::"l"(place));
#endif
}

// A hint: once every block has said so or ended, blocks of the next kernel may take free places and wait there.
__device__ __forceinline__ void let_dependents_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Null or the text of the error.
template <typename... Parameters, typename... Arguments>
const char* launch_overlapped(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared_bytes,
                              cudaStream_t stream, Arguments... arguments) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error_text(error);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = major >= 9 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();  // an error of the launch's arguments is not left for the next call to find
  return error_text(error);
}

}  // namespace minivllm
