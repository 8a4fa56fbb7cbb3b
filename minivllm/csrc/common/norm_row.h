// RMSNorm of one row on the CPU, shared by the ops that normalise.
#pragma once

#include "common/cpu.h"

namespace minivllm {

// 1 / sqrt(mean of squares + eps); long rows are summed in parts, so that rounding does not grow with their length.
inline float inverse_rms(const float* row, int64_t d, float eps) {
  constexpr int64_t kPart = 1024;
  double total = 0.0;
  for (int64_t begin = 0; begin < d; begin += kPart) {
    const int64_t end = begin + kPart < d ? begin + kPart : d;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += row[i] * row[i];
    total += sum;
  }
  return 1.0f / std::sqrt(static_cast<float>(total / static_cast<double>(d)) + eps);
}

// A float32 row needs no copy; out may be the row itself.
inline void normalise_float(const float* row, const float* weight, float* out, int64_t d, float eps) {
  const float scale = inverse_rms(row, d, eps);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) out[i] = row[i] * scale * weight[i];
}

// wide: the row in float32; it is overwritten by the normalised row, rounded to T before the product as Hugging Face does.
template <typename T>
void normalise(float* wide, const T* weight, float* scratch, T* out, int64_t d, float eps) {
  const float scale = inverse_rms(wide, d, eps);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) wide[i] *= scale;
  round_to(wide, d, static_cast<const T*>(nullptr));
  to_float(weight, scratch, d);
#pragma omp simd
  for (int64_t i = 0; i < d; ++i) wide[i] *= scratch[i];
  from_float(wide, out, d);
}

}  // namespace minivllm
