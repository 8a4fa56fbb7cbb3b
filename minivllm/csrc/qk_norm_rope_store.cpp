// qk_norm_rope_store: argument checks, the CPU kernel, and the border to the CUDA kernel of qk_norm_rope_store.cu. On the CPU
// each head goes through the very functions of rms_norm and apply_rope, keys on their way into the cache.
#include "common/cuda_border.h"
#include "common/kv_cache.h"
#include "common/norm_row.h"
#include "common/rope_row.h"
#include "qk_norm_rope_store.h"

#include <optional>
#include <vector>

namespace minivllm {
namespace {

struct Arguments {
  Tensor q, k, v;
  std::optional<Tensor> q_weight, k_weight;
  Tensor positions, cos_sin_cache, k_cache, v_cache, slots;
};

Check check_arguments(const Arguments& a) {
  Check check("qk_norm_rope_store", a.q);
  const ScalarType dtype = a.q.scalar_type();
  check.tensor("q", a.q, {"num_tokens", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check.tensor("k", a.k, {"num_tokens", "num_kv_heads", "head_dim"}, {dtype});
  check.tensor("v", a.v, {"num_tokens", "num_kv_heads", "head_dim"}, {dtype});
  if (a.q_weight) check.tensor("q_weight", *a.q_weight, {"head_dim"}, {dtype});
  if (a.k_weight) check.tensor("k_weight", *a.k_weight, {"head_dim"}, {dtype});
  check_table(check, a.positions, a.cos_sin_cache);
  check_cache(check, "k_cache", a.k_cache, dtype);
  check_cache(check, "v_cache", a.v_cache, dtype);
  check.tensor("slot_mapping", a.slots, {"num_tokens"}, {ScalarType::Long});
  return check;
}

template <typename T>
T* row(const Tensor& x, int64_t token, int64_t head) {
  return static_cast<T*>(x.data_ptr()) + token * x.stride(0) + head * x.stride(1);
}

template <typename T>
const T* weight_of(const std::optional<Tensor>& weight) {
  return weight ? static_cast<const T*>(weight->data_ptr()) : nullptr;
}

// Normalises (unless weight is null) and turns one head of d elements; target may be source. scratch: 2 * d floats.
template <typename T>
void norm_and_rotate(const T* source, const T* weight, T* target, int64_t d, float eps, const float* cs, int64_t half,
                     bool interleaved, float* scratch) {
  if (weight == nullptr) {
    if (target != source) std::memcpy(target, source, d * sizeof(T));
  } else if constexpr (std::is_same_v<T, float>) {
    normalise_float(source, weight, target, d, eps);
  } else {
    to_float(source, scratch, d);
    normalise(scratch, weight, scratch + d, target, d, eps);
  }
  rotate_head(target, cs, half, interleaved, scratch);
}

template <typename T>
void run(const Arguments& a, float eps, bool interleaved, int64_t begin, int64_t end) {
  const int64_t d = a.q.size(2), heads = a.q.size(1), kv_heads = a.k.size(1), block_size = a.k_cache.size(2);
  const T *q_weight = weight_of<T>(a.q_weight), *k_weight = weight_of<T>(a.k_weight);
  const auto* slots = static_cast<const int64_t*>(a.slots.data_ptr());
  const auto* table = static_cast<const float*>(a.cos_sin_cache.data_ptr());
  const int64_t half = a.cos_sin_cache.size(1) / 2;
  std::vector<float> scratch(2 * d);
  for (int64_t t = begin; t < end; ++t) {
    const float* cs = table + position(a.positions, t) * a.cos_sin_cache.stride(0);
    for (int64_t h = 0; h < heads; ++h) {
      T* q = row<T>(a.q, t, h);
      norm_and_rotate<T>(q, q_weight, q, d, eps, cs, half, interleaved, scratch.data());
    }
    if (slots[t] < 0) continue;
    const int64_t block = slots[t] / block_size, offset = slots[t] % block_size * d;
    for (int64_t h = 0; h < kv_heads; ++h) {
      norm_and_rotate<T>(row<T>(a.k, t, h), k_weight, row<T>(a.k_cache, block, h) + offset, d, eps, cs, half, interleaved,
                         scratch.data());
      std::memcpy(row<T>(a.v_cache, block, h) + offset, row<T>(a.v, t, h), d * sizeof(T));
    }
  }
}

void qk_norm_rope_store_cpu(Tensor q, const Tensor& k, const Tensor& v, std::optional<Tensor> q_weight,
                            std::optional<Tensor> k_weight, const Tensor& positions, const Tensor& cos_sin_cache,
                            Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping, double eps, bool interleaved) {
  const Arguments a{q, k, v, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, slot_mapping};
  const Check check = check_arguments(a);
  check_positions(check, positions);
  check_slots(check, slot_mapping);
  const int64_t cost = 2 * (q.size(1) + 2 * k.size(1)) * q.size(2);
  dispatch_float(q.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    parallel_items(q.size(0), cost,
                   [&](int64_t begin, int64_t end) { run<T>(a, static_cast<float>(eps), interleaved, begin, end); });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("qk_norm_rope_store", TORCH_BOX(&qk_norm_rope_store_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

void qk_norm_rope_store_cuda(Tensor q, const Tensor& k, const Tensor& v, std::optional<Tensor> q_weight,
                             std::optional<Tensor> k_weight, const Tensor& positions, const Tensor& cos_sin_cache,
                             Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping, double eps, bool interleaved) {
  check_arguments({q, k, v, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, slot_mapping});
  const CudaScope scope(q);
  QkNormRopeStore p{};
  p.q = head_layout(q), p.k = head_layout(k), p.v = head_layout(v);
  p.q_weight = q_weight ? q_weight->data_ptr() : nullptr, p.k_weight = k_weight ? k_weight->data_ptr() : nullptr;
  p.positions = positions.data_ptr(), p.wide_positions = positions.scalar_type() == ScalarType::Long;
  p.table = static_cast<const float*>(cos_sin_cache.data_ptr()), p.table_stride = cos_sin_cache.stride(0);
  p.k_cache = k_cache.data_ptr(), p.k_block_stride = k_cache.stride(0);
  p.v_cache = v_cache.data_ptr(), p.v_block_stride = v_cache.stride(0);
  p.slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  p.block_size = static_cast<int>(k_cache.size(2)), p.head_dim = static_cast<int>(q.size(2));
  p.rotary_dim = static_cast<int>(cos_sin_cache.size(1));
  p.eps = static_cast<float>(eps), p.interleaved = interleaved;
  check_launch("qk_norm_rope_store", launch_qk_norm_rope_store(p, q.size(0), dtype_code(q), scope.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("qk_norm_rope_store", TORCH_BOX(&qk_norm_rope_store_cuda)); }
#endif

}  // namespace minivllm
