// merge_attention_states: argument checks, the CPU kernel, and the border to the CUDA kernel of merge_attention_states.cu.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/new_tensor.h"
#include "merge_attention_states.h"

#include <algorithm>
#include <tuple>
#include <vector>

namespace minivllm {
namespace {

struct Merged {
  Tensor out, lse;
};

Merged check_and_allocate(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  Check check("merge_attention_states", out_a);
  check.tensor("out_a", out_a, {"num_tokens", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check.tensor("lse_a", lse_a, {"num_tokens", "num_heads"}, {ScalarType::Float});
  check.tensor("out_b", out_b, {"num_tokens", "num_heads", "head_dim"}, {out_a.scalar_type()});
  check.tensor("lse_b", lse_b, {"num_tokens", "num_heads"}, {ScalarType::Float});
  return {new_tensor(out_a, out_a.sizes(), out_a.scalar_type()), new_tensor(lse_a, lse_a.sizes(), ScalarType::Float)};
}

template <typename T>
struct State {
  const T* out;
  const float* lse;
  int64_t token_stride, head_stride, lse_stride;

  State(const Tensor& out, const Tensor& lse)
      : out(static_cast<const T*>(out.data_ptr())),
        lse(static_cast<const float*>(lse.data_ptr())),
        token_stride(out.stride(0)),
        head_stride(out.stride(1)),
        lse_stride(lse.stride(0)) {}

  const T* row(int64_t token, int64_t head) const { return out + token * token_stride + head * head_stride; }
};

// The share of each side in a row, and the row's log-sum-exp; an empty side has none.
struct Shares {
  float a = 0.0f, b = 0.0f, lse = -INFINITY;

  Shares(float lse_a, float lse_b) {
    if (lse_a == -INFINITY && lse_b == -INFINITY) return;
    const float largest = lse_a > lse_b ? lse_a : lse_b;
    const float mass_a = lse_a == -INFINITY ? 0.0f : std::exp(lse_a - largest);
    const float mass_b = lse_b == -INFINITY ? 0.0f : std::exp(lse_b - largest);
    const float mass = mass_a + mass_b;
    a = mass_a / mass, b = mass_b / mass, lse = largest + std::log(mass);
  }
};

template <typename T>
void merge_rows(const State<T>& a, const State<T>& b, int64_t heads, int64_t dim, T* out, float* lse, int64_t begin,
                int64_t end) {
  std::vector<float> buffer(2 * dim);
  float *wide_a = buffer.data(), *wide_b = wide_a + dim;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t token = r / heads, head = r % heads;
    const float lse_a = a.lse[token * a.lse_stride + head], lse_b = b.lse[token * b.lse_stride + head];
    const Shares shares(lse_a, lse_b);
    lse[r] = shares.lse;
    // An empty side may hold NaN: zeros stand for it.
    lse_a == -INFINITY ? static_cast<void>(std::fill_n(wide_a, dim, 0.0f)) : to_float(a.row(token, head), wide_a, dim);
    lse_b == -INFINITY ? static_cast<void>(std::fill_n(wide_b, dim, 0.0f)) : to_float(b.row(token, head), wide_b, dim);
#pragma omp simd
    for (int64_t i = 0; i < dim; ++i) wide_a[i] = shares.a * wide_a[i] + shares.b * wide_b[i];
    from_float(wide_a, out + r * dim, dim);
  }
}

std::tuple<Tensor, Tensor> merge_cpu(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  Merged merged = check_and_allocate(out_a, lse_a, out_b, lse_b);
  const int64_t heads = out_a.size(1), dim = out_a.size(2);
  dispatch_float(out_a.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const State<T> a(out_a, lse_a), b(out_b, lse_b);
    parallel_items(out_a.size(0) * heads, 2 * dim, [&](int64_t begin, int64_t end) {
      merge_rows(a, b, heads, dim, static_cast<T*>(merged.out.data_ptr()), static_cast<float*>(merged.lse.data_ptr()), begin,
                 end);
    });
  });
  return {merged.out, merged.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("merge_attention_states", TORCH_BOX(&merge_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

AttentionState cuda_state(const Tensor& out, const Tensor& lse) {
  return {out.data_ptr(), out.stride(0), out.stride(1), static_cast<const float*>(lse.data_ptr()), lse.stride(0)};
}

std::tuple<Tensor, Tensor> merge_cuda(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b, const Tensor& lse_b) {
  Merged merged = check_and_allocate(out_a, lse_a, out_b, lse_b);
  const CudaScope scope(out_a);
  check_launch("merge_attention_states",
               launch_merge_attention_states(cuda_state(out_a, lse_a), cuda_state(out_b, lse_b),
                                             {out_a.size(0), out_a.size(1), out_a.size(2)}, merged.out.data_ptr(),
                                             static_cast<float*>(merged.lse.data_ptr()), dtype_code(out_a), scope.stream()));
  return {merged.out, merged.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("merge_attention_states", TORCH_BOX(&merge_cuda)); }
#endif

}  // namespace minivllm
