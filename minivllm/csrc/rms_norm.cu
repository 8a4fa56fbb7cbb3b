// rms_norm and fused_add_rms_norm on CUDA. A row is one pass over memory: each thread keeps one, two or four 16-byte vectors in
// registers between the sum of squares and the scaling, all loaded before the first is used. Few rows get as many threads as
// they can use (the shortest time for one row); many rows get two vectors a thread, enough bytes under way to fill the memory's
// pipe, and where these are exactly the row, nothing is checked. Floor: bytes / bandwidth (2 x row for rms_norm, 4 x row
// fused), or the launch for few rows.
#include "common/convert.cuh"
#include "common/launch.cuh"
#include "rms_norm.h"

namespace minivllm {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxVectors = 4;        // that a thread keeps
constexpr int kMaxFullThreads = 512;  // of a block without checks
constexpr int kFullBlocks = 3;        // of kMaxFullThreads on one multiprocessor: as many as leave each thread 40 registers

// Sums of kVectors values over the 32 threads of a warp, each by halves, quarters, ..., and then over the values by halves,
// quarters, ... Two values share a shuffle while there are two: each half of the threads goes on with one of them.
__device__ __forceinline__ float groups_sum(const float (&v)[1]) { return warp_sum(v[0]); }

template <int kVectors>
__device__ __forceinline__ float groups_sum(const float (&v)[kVectors]) {
  constexpr int kHalf = kVectors / 2, kFirst = 16;
  const bool upper = (threadIdx.x & kFirst) != 0;
  float mine[kHalf];
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
    const float kept = upper ? v[k + kHalf] : v[k], sent = upper ? v[k] : v[k + kHalf];
    mine[k] = kept + __shfl_xor_sync(0xffffffffu, sent, kFirst);
  }
#pragma unroll
  for (int k = 0; k < kHalf; ++k) {
#pragma unroll
    for (int lane = kFirst / 2; lane > 0; lane /= 2) mine[k] += __shfl_xor_sync(0xffffffffu, mine[k], lane);
    mine[k] += __shfl_xor_sync(0xffffffffu, mine[k], kFirst);  // value k and value k + kHalf
  }
  if constexpr (kHalf == 2) mine[0] += mine[1];
  static_assert(kHalf <= 2, "the tree over the values is written for up to four");
  return mine[0];
}

// Sum over a row's vectors, whose sums lie in groups[k] of thread t for vector t + k * blockDim.x. First over each 32
// neighbours, then over halves, quarters, ... of what remains: a fixed tree over the row's vectors, the same for any kVectors
// and blockDim.x, so a row's result depends neither on its neighbours nor on their number.
template <int kVectors>
__device__ __forceinline__ float tree_sum(const float (&groups)[kVectors], float* partial) {
  const float sum = groups_sum(groups);
  const int warps = blockDim.x / 32;
  if (warps == 1) return sum;
  float* mine = partial + threadIdx.y * warps;
  if (threadIdx.x % 32 == 0) mine[threadIdx.x / 32] = sum;
  __syncthreads();
  return warp_sum(static_cast<int>(threadIdx.x % 32) < warps ? mine[threadIdx.x % 32] : 0.0f);
}

// One row a threadIdx.y. kFused adds x into the residual first and normalises the rounded sum. kFull: every thread has a row
// and kVectors vectors of it. With kMaxVectors vectors a thread, rows may be longer still: what does not fit into registers is
// read a second time (from L2).
template <typename T, int N, bool kFused, int kVectors, bool kFull>
__global__ void __launch_bounds__(kFull ? kMaxFullThreads : kMaxThreads, kFull ? kFullBlocks : 1)
    rms_norm_kernel(T* x, RowLayout x_rows, T* residual, RowLayout residual_rows, const T* weight, T* out, int64_t num_rows,
                    int num_vectors, float inverse_hidden, float eps) {
  using V = Vec<T, N>;
  __shared__ float partial[kMaxThreads / 32];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = kFull || row < num_rows;  // idle rows of the last block still take part in __syncthreads
  V* x_row = live ? reinterpret_cast<V*>(x + row_offset(x_rows, row)) : nullptr;
  V* r_row = live && kFused ? reinterpret_cast<V*>(residual + row_offset(residual_rows, row)) : nullptr;
  const int end = live ? num_vectors : 0;
  // The first vector that does not fit into registers.
  const int beyond = kVectors == kMaxVectors ? threadIdx.x + kVectors * blockDim.x : end;
  const auto inside = [&](int i) { return kFull || i < end; };
  const V* w = reinterpret_cast<const V*>(weight);

  V kept[kVectors], added[kVectors], weights;
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (inside(i)) prefetch_early(x_row + i);
    if (kFused && inside(i)) prefetch_early(r_row + i);
  }
  wait_for_predecessors();
  let_dependents_launch();
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (inside(i)) kept[k] = load_in_order<T, N>(x_row[i].data);
    if (kFused && inside(i)) added[k] = load_in_order<T, N>(r_row[i].data);
  }
  if (kVectors == 1 && inside(threadIdx.x)) weights = w[threadIdx.x];
  const auto add = [&](V& v, const V& r, int i) {  // the sum of squares of one vector
    float wide[N], sum = 0.0f;
    widen_all(v, wide);
    if (kFused) {
      float other[N];
      widen_all(r, other);
#pragma unroll
      for (int j = 0; j < N; ++j) wide[j] += other[j];
      v = narrow_all<T, N>(wide);
      widen_all(v, wide);
      r_row[i] = v;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sum = fmaf(wide[j], wide[j], sum);
    return sum;
  };
  float sums[kVectors];
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    sums[k] = inside(i) ? add(kept[k], added[k], i) : 0.0f;
  }
  for (int i = beyond; i < end; i += blockDim.x) {
    V v = x_row[i];
    sums[0] += add(v, kFused ? r_row[i] : v, i);
  }

  const float scale = rsqrtf(fmaf(tree_sum(sums, partial), inverse_hidden, eps));
  V* out_row = kFused ? x_row : reinterpret_cast<V*>(out) + row * num_vectors;
  const auto put = [&](const V& v, int i) {
    float wide[N];
    widen_all(v, wide);
#pragma unroll
    for (int j = 0; j < N; ++j) wide[j] *= scale;
    out_row[i] = multiply_all(narrow_all<T, N>(wide), kVectors == 1 ? weights : load_in_order<T, N>(w[i].data));
  };
#pragma unroll
  for (int k = 0; k < kVectors; ++k) {
    const int i = threadIdx.x + k * blockDim.x;
    if (inside(i)) put(kept[k], i);
  }
  for (int i = beyond; i < end; i += blockDim.x) put(kFused ? r_row[i] : x_row[i], i);
}

struct Problem {
  void* x;
  RowLayout x_rows;
  void* residual;  // null: plain rms_norm
  RowLayout residual_rows;
  const void* weight;
  void* out;
  int64_t num_rows, hidden;
  float eps;
};

// The power of two of threads, a warp at least, that hold num_vectors.
int threads_for(int64_t num_vectors, int vectors) {
  int threads = 32;
  while (threads < kMaxThreads && static_cast<int64_t>(threads) * vectors < num_vectors) threads *= 2;
  return threads;
}

template <typename T, int N, bool kFused, int kVectors>
const char* launch(const Problem& p, bool few, cudaStream_t stream) {
  const int64_t num_vectors = p.hidden / N;
  const int threads = threads_for(num_vectors, kVectors), block_threads = kVectors == 1 ? 256 : 128;
  const int rows_per_block = few || threads >= block_threads ? 1 : block_threads / threads;
  const int64_t blocks = (p.num_rows + rows_per_block - 1) / rows_per_block;
  if (blocks > 2147483647 || num_vectors > 2147483647) return "more than 2^31 - 1 blocks of rows or vectors of a row";
  auto* kernel = rms_norm_kernel<T, N, kFused, kVectors, false>;
  if constexpr (N > 1 && kVectors == (kFused ? 1 : 2))
    if (!few && threads <= kMaxFullThreads && num_vectors == threads * kVectors && p.num_rows % rows_per_block == 0)
      kernel = rms_norm_kernel<T, N, kFused, kVectors, true>;
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads, rows_per_block), 0, stream,
                           static_cast<T*>(p.x), p.x_rows, static_cast<T*>(p.residual), p.residual_rows,
                           static_cast<const T*>(p.weight), static_cast<T*>(p.out), p.num_rows, static_cast<int>(num_vectors),
                           1.0f / static_cast<float>(p.hidden), p.eps);
}

template <typename T, int N, bool kFused>
const char* choose(const Problem& p, cudaStream_t stream) {
  const int64_t num_vectors = p.hidden / N;
  const bool few = p.num_rows * threads_for(num_vectors, 1) <= kFewThreads;
  // Fused rows have two loads for each vector under way, so one vector a thread is enough of them until the row is a whole
  // block.
  const int64_t one_each = few ? kMaxThreads : kFused ? kMaxThreads / 2 : 0;
  if (num_vectors <= one_each) return launch<T, N, kFused, 1>(p, few, stream);
  return num_vectors <= 2 * kMaxThreads ? launch<T, N, kFused, 2>(p, few, stream) : launch<T, N, kFused, 4>(p, few, stream);
}

const char* dispatch(const Problem& p, DtypeCode dtype, void* stream) {
  if (p.num_rows == 0 || p.hidden == 0) return nullptr;
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int N = 16 / sizeof(T);
    const RowLayout packed{1, 0, p.hidden};
    const bool wide = p.hidden % N == 0 && rows_aligned(p.x, p.x_rows, N, 16) && rows_aligned(p.weight, packed, N, 16) &&
                      rows_aligned(p.residual, p.residual_rows, N, 16) && rows_aligned(p.out, packed, N, 16);
    const auto s = static_cast<cudaStream_t>(stream);
    if (p.residual != nullptr) return wide ? choose<T, N, true>(p, s) : choose<T, 1, true>(p, s);
    return wide ? choose<T, N, false>(p, s) : choose<T, 1, false>(p, s);
  });
}

}  // namespace

const char* launch_rms_norm(const void* x, RowLayout x_rows, const void* weight, void* out, int64_t num_rows, int64_t hidden,
                            float eps, DtypeCode dtype, void* stream) {
  return dispatch({const_cast<void*>(x), x_rows, nullptr, {1, 0, 0}, weight, out, num_rows, hidden, eps}, dtype, stream);
}

const char* launch_fused_add_rms_norm(void* x, RowLayout x_rows, void* residual, RowLayout residual_rows,
                                      const void* weight, int64_t num_rows, int64_t hidden, float eps, DtypeCode dtype,
                                      void* stream) {
  return dispatch({x, x_rows, residual, residual_rows, weight, nullptr, num_rows, hidden, eps}, dtype, stream);
}

}  // namespace minivllm
