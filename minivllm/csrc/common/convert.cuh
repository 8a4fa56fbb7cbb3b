// Vectors of a storage dtype to float32 registers and back, two elements an instruction where there are two.
#pragma once

#include "common/vec.cuh"

namespace minivllm {


__device__ __forceinline__ void narrow_two(float a, float b, float* target) { target[0] = a, target[1] = b; }

__device__ __forceinline__ void narrow_two(float a, float b, __nv_bfloat16* target) {
  *reinterpret_cast<__nv_bfloat162*>(target) = __floats2bfloat162_rn(a, b);
}

__device__ __forceinline__ void narrow_two(float a, float b, __half* target) {
  *reinterpret_cast<__half2*>(target) = __floats2half2_rn(a, b);
}

__device__ __forceinline__ void widen_two(const float* source, float* target) { target[0] = source[0], target[1] = source[1]; }

__device__ __forceinline__ void widen_two(const __nv_bfloat16* source, float* target) {
  const float2 wide = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(source));
  target[0] = wide.x, target[1] = wide.y;
}

__device__ __forceinline__ void widen_two(const __half* source, float* target) {
  const float2 wide = __half22float2(*reinterpret_cast<const __half2*>(source));
  target[0] = wide.x, target[1] = wide.y;
}

// wide: N floats in registers.
template <typename T, int N>
__device__ __forceinline__ void widen_all(const Vec<T, N>& v, float* wide) {
  if constexpr (N == 1) {
    wide[0] = widen(v.data[0]);
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 2) widen_two(v.data + j, wide + j);
  }
}

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> narrow_all(const float* wide) {
  Vec<T, N> v;
  if constexpr (N == 1) {
    v.data[0] = narrow<T>(wide[0]);
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 2) narrow_two(wide[j], wide[j + 1], v.data + j);
  }
  return v;
}

// Rounds to T, as storing and loading would.
template <typename T, int N>
__device__ __forceinline__ void round_all(float* wide) {
  widen_all(narrow_all<T, N>(wide), wide);
}

}  // namespace minivllm
