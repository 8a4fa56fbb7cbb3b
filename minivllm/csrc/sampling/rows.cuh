// How the sampling kernels read a row of logits. A row is cut into 16-byte vectors and these into tiles: in one tile each of
// `threads` threads has 16 tokens, as vectors that lie `threads` apart, so that a warp reads without gaps. Four neighbouring
// threads' tokens of a tile are a chunk of 64; the largest logit of every chunk tells later passes what they may skip.
#pragma once

#include "common/vec.cuh"

#include <cmath>
#include <type_traits>

namespace minivllm {

constexpr int kTokensPerThread = 16;
constexpr int kThreadsPerChunk = 4;
constexpr int kPairs = kTokensPerThread / 2;
constexpr float kLargestFloat = 3.402823466e38f;
constexpr float kLog2e = 1.44269504f;

template <typename T>
constexpr int kVectorTokens = 16 / sizeof(T);
template <typename T>
constexpr int kVectors = kTokensPerThread / kVectorTokens<T>;  // of a thread in a tile
template <typename T>
using Logits = Vec<T, kVectorTokens<T>>;

struct VocabLayout {
  int vocab, threads, log2_threads, num_tiles;

  __host__ __device__ int num_sixteens() const { return num_tiles * threads; }
  __host__ __device__ int num_chunks() const { return num_tiles * (threads / kThreadsPerChunk); }
};

inline VocabLayout vocab_layout(int64_t vocab, int max_threads) {
  int log2_threads = 5;
  while ((2 << log2_threads) <= max_threads && (int64_t{kTokensPerThread} << log2_threads) < vocab) ++log2_threads;
  const int64_t tile = int64_t{kTokensPerThread} << log2_threads;
  return {static_cast<int>(vocab), 1 << log2_threads, log2_threads, static_cast<int>((vocab + tile - 1) / tile)};
}

// A warp's maximum that keeps NaN, one vector's largest logit (NaN if it holds one).
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

__device__ __forceinline__ float largest_of(const Vec<float, 4>& v) {
  return max_or_nan(max_or_nan(v.data[0], v.data[1]), max_or_nan(v.data[2], v.data[3]));
}

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename P>
__device__ __forceinline__ float larger_of(const P& pair) { return max_or_nan(__low2float(pair), __high2float(pair)); }

template <typename T>
__device__ __forceinline__ float largest_of(const Vec<T, 8>& v) {
  const auto* pairs = reinterpret_cast<const Pair<T>*>(v.data);
  return larger_of(__hmax2_nan(__hmax2_nan(pairs[0], pairs[1]), __hmax2_nan(pairs[2], pairs[3])));
}

// The larger of two neighbouring tokens, pair p of a vector.
__device__ __forceinline__ float larger_of_pair(const Vec<float, 4>& v, int p) {
  return max_or_nan(v.data[2 * p], v.data[2 * p + 1]);
}

template <typename T>
__device__ __forceinline__ float larger_of_pair(const Vec<T, 8>& v, int p) {
  return larger_of(reinterpret_cast<const Pair<T>*>(v.data)[p]);
}

// Sets `larger` to that of every pair and returns the largest of all.
template <typename T>
__device__ __forceinline__ float larger_of_pairs(const Logits<T> (&v)[kVectors<T>], float (&larger)[kPairs]) {
  constexpr int kOfVector = kVectorTokens<T> / 2;
  float largest = -INFINITY;
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    larger[p] = larger_of_pair(v[p / kOfVector], p % kOfVector);
    largest = max_or_nan(largest, larger[p]);
  }
  return largest;
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ float log2_approximate(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// exp(x / temperature) is exp2(x * scale).
__device__ __forceinline__ float scale_of(float temperature) { return fminf(kLog2e / temperature, kLargestFloat); }

__device__ __forceinline__ float warp_max_or_nan(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v = max_or_nan(v, __shfl_xor_sync(0xffffffffu, v, lane));
  return v;
}

// Vector v of a row; beyond the row's end it is masked. Where rows do not lie on 16 bytes, the elements come one by one.
template <typename T, bool kAligned>
__device__ __forceinline__ Logits<T> load_vector(const T* row, int v, int vocab) {
  constexpr int N = kVectorTokens<T>;
  const int first = v * N;
  if (kAligned && first + N <= vocab) return *reinterpret_cast<const Logits<T>*>(row + first);
  Logits<T> out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.data[j] = first + j < vocab ? row[first + j] : narrow<T>(-INFINITY);
  return out;
}

template <typename T>
__device__ __forceinline__ int vector_of(const VocabLayout& layout, int tile, int u, int thread) {
  return ((tile * kVectors<T> + u) << layout.log2_threads) + thread;
}

// Vector i of chunk c, i < kChunkVectors.
template <typename T>
constexpr int kChunkVectors = kVectors<T> * kThreadsPerChunk;
template <typename T>
__device__ __forceinline__ int vector_of_chunk(const VocabLayout& layout, int c, int i) {
  const int thread = c * kThreadsPerChunk;  // counted through the tiles
  return vector_of<T>(layout, thread >> layout.log2_threads, i / kThreadsPerChunk,
                      (thread & (layout.threads - 1)) + i % kThreadsPerChunk);
}

// This thread's vectors of a tile; whole tiles need no look at the row's end.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_tile(const T* row, const VocabLayout& layout, int tile, Logits<T> (&v)[kVectors<T>]) {
  const int thread = threadIdx.x & (layout.threads - 1);
  if (kAligned && (tile + 1) * kTokensPerThread << layout.log2_threads <= layout.vocab) {
    const auto* first = reinterpret_cast<const Logits<T>*>(row) + vector_of<T>(layout, tile, 0, thread);
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u) v[u] = first[u << layout.log2_threads];
    return;
  }
#pragma unroll
  for (int u = 0; u < kVectors<T>; ++u)
    v[u] = load_vector<T, kAligned>(row, vector_of<T>(layout, tile, u, thread), layout.vocab);
}

// The chunk's largest logit, from the largest of each of its threads; every thread of the warp must call.
__device__ __forceinline__ float chunk_largest(float of_thread) {
  of_thread = max_or_nan(of_thread, __shfl_xor_sync(0xffffffffu, of_thread, 1));
  return max_or_nan(of_thread, __shfl_xor_sync(0xffffffffu, of_thread, 2));
}

// The vectors of a row are whole 16-byte words.
template <typename T>
bool vectors_aligned(const void* logits, int64_t stride) {
  return reinterpret_cast<uintptr_t>(logits) % 16 == 0 && stride % kVectorTokens<T> == 0;
}

}  // namespace minivllm
