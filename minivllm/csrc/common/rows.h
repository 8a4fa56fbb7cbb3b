// Where the rows of a tensor lie, for the launchers of the row kernels: torch-free, in elements.
#pragma once

#include <cstdint>

namespace minivllm {

// Row r lies at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct RowLayout {
  int64_t inner, outer_stride, inner_stride;
};

#ifdef __CUDACC__
__device__ __forceinline__ int64_t row_offset(const RowLayout& rows, int64_t r) {
  if (rows.outer_stride == 0) return r * rows.inner_stride;
  return (r / rows.inner) * rows.outer_stride + (r % rows.inner) * rows.inner_stride;
}
#endif

// Whether every row starts at a multiple of `bytes`, which are `elements` elements.
inline bool rows_aligned(const void* pointer, const RowLayout& rows, int64_t elements, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0 && rows.outer_stride % elements == 0 &&
         rows.inner_stride % elements == 0;
}

// Heads of tokens: [num_tokens, count, head_dim] with a contiguous last dimension.
struct HeadLayout {
  void* data;
  int64_t token_stride, head_stride;
  int count;
};

inline bool fits_32_bits(int64_t stride) { return stride >= 0 && stride < int64_t{1} << 32; }

#ifdef __CUDACC__
// Where strides fit 32 bits an offset is one instruction for each of them; the offset itself has 64.
__device__ __forceinline__ int64_t wide_product(uint32_t i, int64_t stride) {
  return static_cast<int64_t>(uint64_t{i} * static_cast<uint32_t>(stride));
}

template <typename T>
__device__ __forceinline__ T* near_head(const HeadLayout& heads, uint32_t token, uint32_t head) {
  return static_cast<T*>(heads.data) + (wide_product(token, heads.token_stride) + wide_product(head, heads.head_stride));
}

template <typename T>
__device__ __forceinline__ T* any_head(const HeadLayout& heads, int64_t token, int head) {
  return static_cast<T*>(heads.data) + token * heads.token_stride + head * heads.head_stride;
}
#endif

}  // namespace minivllm
