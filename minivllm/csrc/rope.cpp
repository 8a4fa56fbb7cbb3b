// apply_rope: argument checks, the CPU kernel (each head's rotary part is widened to float32, turned, and rounded back), and
// the border to the CUDA kernel of rope.cu.
#include "common/cuda_border.h"
#include "common/rope_row.h"
#include "rope.h"

#include <vector>

namespace minivllm {
namespace {

template <typename T>
void rotate_heads(const Tensor& x, int64_t token, const float* cs, int64_t half, bool interleaved, float* wide) {
  T* head = static_cast<T*>(x.data_ptr()) + token * x.stride(0);
  const int64_t heads = x.size(1), stride = x.stride(1);
  for (int64_t h = 0; h < heads; ++h) rotate_head(head + h * stride, cs, half, interleaved, wide);
}

Check check_rope(const Tensor& q, const Tensor& k, const Tensor& positions, const Tensor& cos_sin_cache) {
  Check check("apply_rope", q);
  check.tensor("q", q, {"num_tokens", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check.tensor("k", k, {"num_tokens", "num_kv_heads", "head_dim"}, {q.scalar_type()});
  check_table(check, positions, cos_sin_cache);
  return check;
}

void apply_rope_cpu(Tensor q, Tensor k, const Tensor& positions, const Tensor& cos_sin_cache, bool interleaved) {
  check_positions(check_rope(q, k, positions, cos_sin_cache), positions);
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

#ifdef MINIVLLM_CUDA
namespace {

void apply_rope_cuda(Tensor q, Tensor k, const Tensor& positions, const Tensor& cos_sin_cache, bool interleaved) {
  check_rope(q, k, positions, cos_sin_cache);
  const CudaScope scope(q);
  check_launch("apply_rope",
               launch_apply_rope(head_layout(q), head_layout(k), positions.data_ptr(),
                                 positions.scalar_type() == ScalarType::Long,
                                 static_cast<const float*>(cos_sin_cache.data_ptr()), cos_sin_cache.stride(0),
                                 cos_sin_cache.size(1), q.size(0), interleaved, dtype_code(q), scope.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("apply_rope", TORCH_BOX(&apply_rope_cuda)); }
#endif

}  // namespace minivllm
