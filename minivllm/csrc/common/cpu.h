// What every CPU kernel shares: rows converted between a storage dtype and float32, a vectorisable exp, and threads.
// Threads come from PyTorch's own OpenMP pool (torch::stable::parallel_for), so the kernels honour torch.set_num_threads and
// never fight a second pool; within a thread, `#pragma omp simd` loops over float32 are what the compiler vectorises.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace minivllm {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// Calls f with a null pointer whose type is the storage dtype: dispatch(dtype, [&](auto* tag) { using T = ...; }).
template <typename F>
void dispatch_float(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) f(static_cast<float*>(nullptr));
  else if (dtype == ScalarType::BFloat16) f(static_cast<BFloat16*>(nullptr));
  else f(static_cast<Half*>(nullptr));
}

// n consecutive elements to float32.
inline void to_float(const float* src, float* dst, int64_t n) { std::memcpy(dst, src, n * sizeof(float)); }

// The bits of floats go through memcpy: a store as uint32_t may be ordered after the loads of the float it makes, and was.
inline void to_float(const BFloat16* src, float* dst, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(src[i].x) << 16;
    std::memcpy(dst + i, &bits, sizeof bits);
  }
}

inline void to_float(const Half* src, float* dst, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
#endif
  for (; i < n; ++i) dst[i] = static_cast<float>(src[i]);
}

// n consecutive float32 elements rounded to nearest even.
inline void from_float(const float* src, float* dst, int64_t n) { std::memcpy(dst, src, n * sizeof(float)); }

inline void from_float(const float* src, BFloat16* dst, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, src + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    dst[i].x = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
  }
}

inline void from_float(const float* src, Half* dst, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
  for (; i < n; ++i) dst[i] = Half(src[i]);
}

// Rounds float32 values to T and back, as storing and loading them would.
inline void round_to(float*, int64_t, const float*) {}
template <typename T>
inline void round_to(float* values, int64_t n, const T*) {
  T narrow[64];
  for (int64_t i = 0; i < n; i += 64) {
    const int64_t m = n - i < 64 ? n - i : 64;
    from_float(values + i, narrow, m);
    to_float(narrow, values + i, m);
  }
}

// exp(x) within 2 ulp, vectorisable: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial for e^r (Cody and Waite's reduction), n added to
// the exponent. Below -87.3 the result is 0, above 88.3 it saturates at e^88.3; NaN stays NaN.
inline float fast_exp(float x) {
  const float y = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  const float n = std::nearbyint(y * 1.44269504f);
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(n) << 23;
  int32_t bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return x < -87.3f ? 0.0f : result;
}

// Runs f(begin, end) over [0, count) on PyTorch's threads; `cost` is about the elements touched for each item, and small work
// stays on the calling thread.
template <typename F>
void parallel_items(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kElementsPerThread = 16384;
  const int64_t grain = kElementsPerThread / (cost > 0 ? cost : 1) + 1;
  if (count <= grain) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace minivllm
