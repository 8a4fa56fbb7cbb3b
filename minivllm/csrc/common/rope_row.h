// Rotation of one head on the CPU, and the arguments that choose its angle, shared by the ops that rotate.
#pragma once

#include "common/check.h"
#include "common/cpu.h"

namespace minivllm {

// x: the rotary part of one head, in place; cs: half cosines, then half sines. Adjacent pairs if interleaved, else halves.
inline void rotate(float* x, const float* cs, int64_t half, bool interleaved) {
  const float *cos = cs, *sin = cs + half;
  if (interleaved) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = a * cos[i] - b * sin[i];
      x[2 * i + 1] = b * cos[i] + a * sin[i];
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

inline void rotate_head(float* head, const float* cs, int64_t half, bool interleaved, float*) {
  rotate(head, cs, half, interleaved);
}

template <typename T>
inline void rotate_head(T* head, const float* cs, int64_t half, bool interleaved, float* wide) {
  to_float(head, wide, 2 * half);
  rotate(wide, cs, half, interleaved);
  from_float(wide, head, 2 * half);
}

inline int64_t position(const Tensor& positions, int64_t token) {
  if (positions.scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(positions.data_ptr())[token];
  return static_cast<const int64_t*>(positions.data_ptr())[token];
}

// Binds max_position and rotary_dim; head_dim is bound before.
inline void check_table(Check& check, const Tensor& positions, const Tensor& cos_sin_cache) {
  check.tensor("positions", positions, {"num_tokens"}, {ScalarType::Int, ScalarType::Long});
  check.tensor("cos_sin_cache", cos_sin_cache, {"max_position", "rotary_dim"}, {ScalarType::Float});
  const int64_t rotary_dim = check["rotary_dim"], head_dim = check["head_dim"];
  if (rotary_dim % 2 != 0 || rotary_dim > head_dim)
    check.fail("cos_sin_cache has rotary_dim=" + std::to_string(rotary_dim) +
               ", expected an even number up to head_dim=" + std::to_string(head_dim));
}

// On the CPU alone: to look at positions that lie on a GPU would stall it.
inline void check_positions(const Check& check, const Tensor& positions) {
  const int64_t num_tokens = check["num_tokens"], max_position = check["max_position"];
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t p = position(positions, t);
    if (p < 0 || p >= max_position)
      check.fail("positions holds " + std::to_string(p) + ", expected 0 to " + std::to_string(max_position - 1) +
                 " (the rows of cos_sin_cache)");
  }
}

}  // namespace minivllm
