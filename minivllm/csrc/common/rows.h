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

}  // namespace minivllm
