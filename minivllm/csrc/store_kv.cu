// store_kv on CUDA: bytes from rows to slots, 16 at a time where addresses allow. A thread holds the key and the value of its place
// before it knows the slot, so three loads are in flight at once. Floor: 4 x (heads x head_dim) elements a token / bandwidth.
#include <algorithm>

#include "common/copy.cuh"
#include "common/vec.cuh"
#include "store_kv.h"

namespace minivllm {
namespace {

constexpr int kThreads = 128;  // small, so that a decode step's few tokens spread over more SMs

// Strides in V. A cache's block is [heads][block_size][row].
template <typename V>
struct Side {
  const V* from;
  int64_t token_stride, head_stride;
  V* cache;
  int64_t block_stride;
};

// threadIdx: vector of a head, head, token.
template <typename V>
__global__ void __launch_bounds__(kThreads)
    store_kv_kernel(Side<V> k, Side<V> v, const int64_t* slots, int64_t num_tokens, int heads, int log2_block_size, int row) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.z + threadIdx.z;
  if (token >= num_tokens) return;
  const int64_t slot = slots[token];
  const int64_t block = slot >> log2_block_size, offset = slot & ((1 << log2_block_size) - 1);
  for (int head = threadIdx.y; head < heads; head += blockDim.y) {
    for (int column = threadIdx.x; column < row; column += blockDim.x) {
      const V key = k.from[token * k.token_stride + head * k.head_stride + column];
      const V value = v.from[token * v.token_stride + head * v.head_stride + column];
      if (slot < 0) continue;
      const int64_t place = ((static_cast<int64_t>(head) << log2_block_size) + offset) * row + column;
      k.cache[block * k.block_stride + place] = key;
      v.cache[block * v.block_stride + place] = value;
    }
  }
}

template <typename V>
Side<V> in_vectors(const StoreKvSide& side, int64_t per_vector) {
  return {static_cast<const V*>(side.from), side.token_stride / per_vector, side.head_stride / per_vector,
          static_cast<V*>(side.cache), side.block_stride / per_vector};
}

}  // namespace

const char* launch_store_kv(const StoreKvSide& k, const StoreKvSide& v, const int64_t* slots, const StoreKvSizes& sizes,
                            void* stream) {
  if (sizes.num_tokens == 0 || sizes.num_kv_heads == 0 || sizes.head_dim == 0) return nullptr;
  uint64_t bytes = sizes.head_dim * sizes.element_bytes;
  for (const StoreKvSide* side : {&k, &v})
    bytes |= address(side->from) | address(side->cache) |
             ((side->token_stride | side->head_stride | side->block_stride) * sizes.element_bytes);
  return dispatch_width(bytes, [&](auto* tag) -> const char* {
    using V = std::remove_pointer_t<decltype(tag)>;
    const int64_t per_vector = sizeof(V) / sizes.element_bytes;
    const int64_t row = sizes.head_dim / per_vector;
    const int x = static_cast<int>(std::min<int64_t>(row, kThreads));
    const int y = static_cast<int>(std::min<int64_t>(sizes.num_kv_heads, kThreads / x));
    const int z = std::min(kThreads / (x * y), 64);  // 64: CUDA's limit of blockDim.z
    const int64_t ctas = (sizes.num_tokens + z - 1) / z;
    if (ctas > 2147483647) return "more than 2^31 - 1 blocks of tokens";
    int log2_block_size = 0;
    while ((int64_t{1} << log2_block_size) < sizes.block_size) ++log2_block_size;
    store_kv_kernel<V><<<static_cast<unsigned>(ctas), dim3(x, y, z), 0, static_cast<cudaStream_t>(stream)>>>(
        in_vectors<V>(k, per_vector), in_vectors<V>(v, per_vector), slots, sizes.num_tokens,
        static_cast<int>(sizes.num_kv_heads), log2_block_size, static_cast<int>(row));
    return launch_error();
  });
}

}  // namespace minivllm
