// Kernels that only move bytes are compiled once for each access width instead of each dtype; what they share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace minivllm {

inline uint64_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

// Calls f with a null pointer to the widest type, up to 16 bytes, that may be used for every access. `bytes`: all addresses, strides
// and lengths in bytes or'ed together; no element is narrower than 2 bytes.
template <typename F>
const char* dispatch_width(uint64_t bytes, const F& f) {
  if (bytes % 16 == 0) return f(static_cast<uint4*>(nullptr));
  if (bytes % 8 == 0) return f(static_cast<uint2*>(nullptr));
  if (bytes % 4 == 0) return f(static_cast<uint32_t*>(nullptr));
  return f(static_cast<uint16_t*>(nullptr));
}

// Blocks of equal length, block b at data + b * stride; strides are counted in V. `ids` null: copy i uses block i.
template <typename V>
struct Blocks {
  V* data;
  int64_t stride;
  const int64_t* ids;

  __device__ __forceinline__ V* block(int64_t i) const { return data + (ids != nullptr ? ids[i] : i) * stride; }
};

constexpr int kMoveThreads = 256;
constexpr int kMoveUnroll = 4;  // loads in flight in each thread

// `vectors` V of block i of `to` become those of block i of `from`, for all i < n. A CTA takes one piece of one block at a time.
template <typename V>
__global__ void __launch_bounds__(kMoveThreads) move_blocks_kernel(Blocks<V> from, Blocks<V> to, int64_t n, int64_t vectors) {
  constexpr int kPiece = kMoveThreads * kMoveUnroll;
  const int64_t pieces = (vectors + kPiece - 1) / kPiece;
  for (int64_t item = blockIdx.x; item < n * pieces; item += gridDim.x) {
    const int64_t i = item / pieces, start = item % pieces * kPiece + threadIdx.x;
    const V* source = from.block(i);
    V* target = to.block(i);
    V held[kMoveUnroll];
#pragma unroll
    for (int k = 0; k < kMoveUnroll; ++k)
      if (start + k * kMoveThreads < vectors) held[k] = source[start + k * kMoveThreads];
#pragma unroll
    for (int k = 0; k < kMoveUnroll; ++k)
      if (start + k * kMoveThreads < vectors) target[start + k * kMoveThreads] = held[k];
  }
}

template <typename V>
void move_blocks(const Blocks<V>& from, const Blocks<V>& to, int64_t n, int64_t vectors, int64_t max_ctas, cudaStream_t stream) {
  const int64_t pieces = (vectors + kMoveThreads * kMoveUnroll - 1) / (kMoveThreads * kMoveUnroll);
  const int64_t ctas = n * pieces < max_ctas ? n * pieces : max_ctas;
  move_blocks_kernel<V><<<static_cast<unsigned>(ctas), kMoveThreads, 0, stream>>>(from, to, n, vectors);
}

}  // namespace minivllm
