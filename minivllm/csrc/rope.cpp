// apply_rope on the CPU: each head's rotary part is widened to float32, turned, and rounded back.
#include "common/check.h"
#include "common/cpu.h"

#include <vector>

namespace minivllm {
namespace {

// x: the rotary part of one head, in place; cs: half cosines, then half sines. Adjacent pairs if interleaved, else halves.
void rotate(float* x, const float* cs, int64_t half, bool interleaved) {
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

void rotate_head(float* head, const float* cs, int64_t half, bool interleaved, float*) {
  rotate(head, cs, half, interleaved);
}

template <typename T>
void rotate_head(T* head, const float* cs, int64_t half, bool interleaved, float* wide) {
  to_float(head, wide, 2 * half);
  rotate(wide, cs, half, interleaved);
  from_float(wide, head, 2 * half);
}

template <typename T>
void rotate_heads(const Tensor& x, int64_t token, const float* cs, int64_t half, bool interleaved, float* wide) {
  T* head = static_cast<T*>(x.data_ptr()) + token * x.stride(0);
  const int64_t heads = x.size(1), stride = x.stride(1);
  for (int64_t h = 0; h < heads; ++h) rotate_head(head + h * stride, cs, half, interleaved, wide);
}

int64_t position(const Tensor& positions, int64_t token) {
  if (positions.scalar_type() == ScalarType::Int) return static_cast<const int32_t*>(positions.data_ptr())[token];
  return static_cast<const int64_t*>(positions.data_ptr())[token];
}

void check_rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin_cache) {
  Check check("apply_rope", q);
  check.tensor("q", q, {"num_tokens", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check.tensor("k", k, {"num_tokens", "num_kv_heads", "head_dim"}, {q.scalar_type()});
  check.tensor("positions", positions, {"num_tokens"}, {ScalarType::Int, ScalarType::Long});
  check.tensor("cos_sin_cache", cos_sin_cache, {"max_position", "rotary_dim"}, {ScalarType::Float});
  const int64_t rotary_dim = check["rotary_dim"], head_dim = check["head_dim"];
  if (rotary_dim % 2 != 0 || rotary_dim > head_dim)
    check.fail("cos_sin_cache has rotary_dim=" + std::to_string(rotary_dim) +
               ", expected an even number up to head_dim=" + std::to_string(head_dim));
  const int64_t num_tokens = check["num_tokens"], max_position = check["max_position"];
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t p = position(positions, t);
    if (p < 0 || p >= max_position)
      check.fail("positions holds " + std::to_string(p) + ", expected 0 to " + std::to_string(max_position - 1) +
                 " (the rows of cos_sin_cache)");
  }
}

void apply_rope_cpu(Tensor q, Tensor k, const Tensor& positions, const Tensor& cos_sin_cache, bool interleaved) {
  check_rope(q, k, positions, cos_sin_cache);
  const int64_t rotary_dim = cos_sin_cache.size(1), row_stride = cos_sin_cache.stride(0);
  const float* table = static_cast<const float*>(cos_sin_cache.data_ptr());
  const int64_t cost = (q.size(1) + k.size(1)) * rotary_dim;
  dispatch_float(q.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    parallel_items(q.size(0), cost, [&](int64_t begin, int64_t end) {
      std::vector<float> wide(rotary_dim);
      for (int64_t t = begin; t < end; ++t) {
        const float* cs = table + position(positions, t) * row_stride;
        rotate_heads<T>(q, t, cs, rotary_dim / 2, interleaved, wide.data());
        rotate_heads<T>(k, t, cs, rotary_dim / 2, interleaved, wide.data());
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("apply_rope", TORCH_BOX(&apply_rope_cpu)); }

}  // namespace minivllm
