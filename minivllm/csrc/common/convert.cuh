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

// A bfloat16 is the upper half of a float32; said in words, because otherwise the compiler takes three instructions for two.
__device__ __forceinline__ void widen_two(const __nv_bfloat16* source, float* target) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(source);
  target[0] = __uint_as_float(pair << 16), target[1] = __uint_as_float(pair & 0xffff0000u);
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

// A vector loaded at once, and in the order of the program among such loads: that is what `relaxed` asks of the compiler. An
// ordinary load it takes apart where only elements are used, and puts behind others whose addresses have to be waited for.
template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_in_order(const T* place) {
  if constexpr (sizeof(Vec<T, N>) != 16) {
    return *reinterpret_cast<const Vec<T, N>*>(place);
  } else {
    uint4 words;
    asm volatile("ld.relaxed.cta.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(place));
    return *reinterpret_cast<const Vec<T, N>*>(&words);
  }
}

// Products rounded to the storage dtype. One of two 16-bit values is exact in float32, so rounding it once is what computing in
// float32 would give.
__device__ __forceinline__ void multiply_two(float* v, const float* w) { v[0] *= w[0], v[1] *= w[1]; }

__device__ __forceinline__ void multiply_two(__nv_bfloat16* v, const __nv_bfloat16* w) {
  auto* pair = reinterpret_cast<__nv_bfloat162*>(v);
  *pair = __hmul2(*pair, *reinterpret_cast<const __nv_bfloat162*>(w));
}

__device__ __forceinline__ void multiply_two(__half* v, const __half* w) {
  auto* pair = reinterpret_cast<__half2*>(v);
  *pair = __hmul2(*pair, *reinterpret_cast<const __half2*>(w));
}

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> multiply_all(Vec<T, N> v, const Vec<T, N>& w) {
  if constexpr (N == 1) {
    v.data[0] = narrow<T>(widen(v.data[0]) * widen(w.data[0]));
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 2) multiply_two(v.data + j, w.data + j);
  }
  return v;
}

}  // namespace minivllm
