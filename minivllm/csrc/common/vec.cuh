// Device helpers shared by the row kernels: 16-byte vectors of a storage dtype, conversion to float32, sums over a warp; error texts.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace minivllm {

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }

template <typename T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) { return v; }
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ __forceinline__ __half narrow<__half>(float v) { return __float2half_rn(v); }

// N elements that move as one load or store; N * sizeof(T) is 16 for the fast path, sizeof(T) for odd sizes and addresses.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T data[N];
};

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// Calls f with a null pointer whose type is the storage dtype.
template <typename F>
const char* dispatch_dtype(DtypeCode dtype, const F& f) {
  switch (dtype) {
    case DtypeCode::kFloat32: return f(static_cast<float*>(nullptr));
    case DtypeCode::kBFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DtypeCode::kFloat16: return f(static_cast<__half*>(nullptr));
  }
  return "unknown dtype code";
}

// Null for success: what launchers return.
inline const char* error_text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

inline const char* launch_error() { return error_text(cudaGetLastError()); }

}  // namespace minivllm
