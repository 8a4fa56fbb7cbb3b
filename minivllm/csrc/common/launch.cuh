// Launches whose start overlaps the end of the kernel before them (programmatic dependent launch, CUDA C++ Programming Guide;
// sm_90 and later; older GPUs launch as usual). The contract: every thread of such a kernel calls wait_for_predecessors()
// before its first access to global memory, which then holds everything that earlier kernels of the stream wrote; so only the
// launch itself is hidden.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "common/vec.cuh"

namespace minivllm {

__device__ __forceinline__ void wait_for_predecessors() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
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
