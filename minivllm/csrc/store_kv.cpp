// store_kv: argument checks, the CPU kernel (every head of every token is one copy of bytes, so one kernel serves all dtypes), and
// the border to the CUDA kernel of store_kv.cu.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/kv_cache.h"
#include "store_kv.h"

namespace minivllm {
namespace {

// Strides in bytes.
struct Copy {
  const char* from;
  int64_t from_token, from_head;
  char* cache;
  int64_t block, head, row;

  Copy(const Tensor& x, const Tensor& cache)
      : from(static_cast<const char*>(x.data_ptr())),
        cache(static_cast<char*>(cache.data_ptr())) {
    const int64_t bytes = static_cast<int64_t>(x.element_size());
    from_token = x.stride(0) * bytes, from_head = x.stride(1) * bytes;
    block = cache.stride(0) * bytes, row = cache.size(3) * bytes, head = cache.size(2) * row;
  }

  void token(int64_t token, int64_t block_id, int64_t offset, int64_t heads) const {
    const char* source = from + token * from_token;
    char* target = cache + block_id * block + offset * row;
    for (int64_t h = 0; h < heads; ++h) std::memcpy(target + h * head, source + h * from_head, row);
  }
};

Check check_store(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots) {
  Check check("store_kv", k);
  check.tensor("k", k, {"num_tokens", "num_kv_heads", "head_dim"}, MINIVLLM_FLOATS);
  check.tensor("v", v, {"num_tokens", "num_kv_heads", "head_dim"}, {k.scalar_type()});
  check_cache(check, "k_cache", k_cache, k.scalar_type());
  check_cache(check, "v_cache", v_cache, k.scalar_type());
  check.tensor("slot_mapping", slots, {"num_tokens"}, {ScalarType::Long});
  return check;
}

void store_kv_cpu(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping) {
  check_slots(check_store(k, v, k_cache, v_cache, slot_mapping), slot_mapping);
  const auto* slots = static_cast<const int64_t*>(slot_mapping.data_ptr());
  const int64_t heads = k.size(1), block_size = k_cache.size(2);
  const Copy keys(k, k_cache), values(v, v_cache);
  parallel_items(k.size(0), 2 * heads * k.size(2), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      if (slots[t] < 0) continue;
      keys.token(t, slots[t] / block_size, slots[t] % block_size, heads);
      values.token(t, slots[t] / block_size, slots[t] % block_size, heads);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("store_kv", TORCH_BOX(&store_kv_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

StoreKvSide cuda_side(const Tensor& x, const Tensor& cache) {
  return {x.data_ptr(), x.stride(0), x.stride(1), cache.data_ptr(), cache.stride(0)};
}

void store_kv_cuda(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slot_mapping) {
  check_store(k, v, k_cache, v_cache, slot_mapping);
  const CudaScope scope(k);
  const StoreKvSizes sizes{k.size(0), k.size(1), k_cache.size(2), k.size(2), static_cast<int64_t>(k.element_size())};
  check_launch("store_kv", launch_store_kv(cuda_side(k, k_cache), cuda_side(v, v_cache),
                                           static_cast<const int64_t*>(slot_mapping.data_ptr()), sizes, scope.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("store_kv", TORCH_BOX(&store_kv_cuda)); }
#endif

}  // namespace minivllm
