// One vector register of float32 and the few operations that the CPU kernels write by hand, for AVX-512, AVX2 and plain SSE.
// Products that are summed go through multiply_add: where the compiler could fuse in one copy of a kernel and not in another, the
// fusion is written out, so that results are the same to the bit whatever the blocking.
#pragma once

#include "common/cpu.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace minivllm {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectorRegisters = 16;
#else
constexpr int kLanes = 4, kVectorRegisters = 16;
#endif

// A vector of the compiler (GCC and Clang): arithmetic operators work on it.
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  float wide[kLanes];
  to_float(p, wide, kLanes);
  return load(wide);
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec multiply_add(float a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c);
#elif defined(__AVX__) && defined(__FMA__)
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#else
  return a * b + c;  // there is nothing to fuse with
#endif
}

}  // namespace minivllm
