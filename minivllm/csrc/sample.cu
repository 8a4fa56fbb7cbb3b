// sample on CUDA, the pass over memory. Every row is read once, by as many blocks as the GPU has room for at once. A greedy
// row keeps its largest logit, a row without filters the best of logit / temperature + Gumbel noise, a row with filters only
// the largest logit of every chunk; the second kernel (sample_filter.cu) puts the parts together.
//
// Floor: the row's bytes / bandwidth; or the launch for few rows.
#include <cuda_runtime.h>

#include "sample.h"
#include "sampling/plan.h"
#include "sampling/search.cuh"

namespace minivllm {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 8;

struct Range {
  int begin, end;
};

__device__ __forceinline__ Range tiles_of_block(const SamplePlan& plan, int split) {
  const int64_t tiles = plan.layout.num_tiles;
  return {static_cast<int>(tiles * split / plan.splits), static_cast<int>(tiles * (split + 1) / plan.splits)};
}

__device__ __forceinline__ float block_max_or_nan(float v, float* partial) {
  v = warp_max_or_nan(v);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp) v = max_or_nan(v, partial[warp]);
  return v;
}

template <typename T, bool kAligned>
__device__ Candidate draw(const SamplePlan& plan, const T* row, int64_t r, float temperature, Range tiles, float* partial,
                          float* bound, float& seen) {
  const VocabLayout& layout = plan.layout;
  Search<T> search(row, layout.vocab, static_cast<uint64_t>(plan.a.seeds[r]), temperature, bound);
  if (threadIdx.x == 0) *bound = -INFINITY;
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    Logits<T> v[kVectors<T>];
    float largest[kVectors<T>];
    load_tile<T, kAligned>(row, layout, tile, v);
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u) {
      largest[u] = largest_of(v[u]);
      seen = max_or_nan(seen, largest[u]);
    }
    if (tile == tiles.begin) search.origin = fminf(fmaxf(block_max_or_nan(seen, partial), -kLargestFloat), kLargestFloat);
    search.visit(vector_of<T>(layout, tile, 0, threadIdx.x), layout.threads, largest);
  }
  return search.best;
}

template <typename T, bool kAligned>
__device__ Candidate take_largest(const SamplePlan& plan, const T* row, Range tiles, float& seen) {
  constexpr int N = kVectorTokens<T>;
  const VocabLayout& layout = plan.layout;
  float best = -INFINITY;
  int best_vector = -1;
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    Logits<T> v[kVectors<T>];
    load_tile<T, kAligned>(row, layout, tile, v);
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u) {
      const float largest = largest_of(v[u]);
      seen = max_or_nan(seen, largest);
      if (largest > best) best = largest, best_vector = vector_of<T>(layout, tile, u, threadIdx.x);
    }
  }
  if (best_vector < 0) return {-INFINITY, 0.0f, -1, 0};
  int token = best_vector * N;
  for (const int last = token + N - 1; token < last && widen(row[token]) != best;) ++token;
  return {best, 0.0f, token, 0};
}

template <typename T, bool kAligned>
__device__ void write_maxima(const SamplePlan& plan, const T* row, int64_t r, Range tiles) {
  const VocabLayout& layout = plan.layout;
  float* maxima = plan.maxima + r * layout.num_chunks();
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    Logits<T> v[kVectors<T>];
    load_tile<T, kAligned>(row, layout, tile, v);
    float largest = largest_of(v[0]);
#pragma unroll
    for (int u = 1; u < kVectors<T>; ++u) largest = max_or_nan(largest, largest_of(v[u]));
    largest = chunk_largest(largest);
    if (threadIdx.x % kThreadsPerChunk == 0)
      maxima[((tile << layout.log2_threads) + threadIdx.x) / kThreadsPerChunk] = largest;
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) sample_kernel(SamplePlan plan) {
  __shared__ float partial[kThreads / 32], bound;
  __shared__ Candidate bests[kThreads / 32];
  const int64_t r = blockIdx.x / plan.splits;
  const int split = blockIdx.x % plan.splits;
  const T* row = static_cast<const T*>(plan.a.logits) + r * plan.a.stride;
  const Range tiles = tiles_of_block(plan, split);
  const RowOptions options(plan.a, r);
  if (options.filtered(plan.layout.vocab)) return write_maxima<T, kAligned>(plan, row, r, tiles);

  float seen = -INFINITY;
  Candidate best = options.greedy() ? take_largest<T, kAligned>(plan, row, tiles, seen)
                                    : draw<T, kAligned>(plan, row, r, options.temperature, tiles, partial, &bound, seen);
  if (!(seen <= kLargestFloat)) best.index = kInvalidRow;
  const double inverse_temperature = options.greedy() ? 1.0 : 1.0 / static_cast<double>(options.temperature);
  best = warp_best(best, inverse_temperature);
  if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < static_cast<int>(blockDim.x / 32); ++warp)
    if (beats(bests[warp], best, inverse_temperature)) best = bests[warp];
  if (plan.splits == 1) plan.a.out[r] = best.index < 0 ? -1 : best.index;
  else plan.candidates[r * plan.splits + split] = best;
}

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

int64_t aligned_bytes(int64_t bytes) { return (bytes + 15) / 16 * 16; }

template <typename T>
const char* launch(const SamplePlan& plan, cudaStream_t stream) {
  const int64_t blocks = plan.a.num_rows * plan.splits;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks";
  auto* kernel = vectors_aligned<T>(plan.a.logits, plan.a.stride) ? sample_kernel<T, true> : sample_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), plan.layout.threads, 0, stream>>>(plan);
  const char* error = launch_error();
  return error != nullptr ? error : launch_finish(plan, stream);
}

int row_splits(int64_t num_rows, const VocabLayout& layout) {
  const int64_t room = int64_t{kBlocksPerMultiprocessor} * multiprocessors();
  const int64_t wanted = num_rows > 0 && num_rows < room ? room / num_rows : 1;
  return static_cast<int>(wanted < layout.num_tiles ? wanted : (layout.num_tiles > 0 ? layout.num_tiles : 1));
}

}  // namespace

int64_t sample_workspace_bytes(int64_t num_rows, int64_t vocab) {
  const VocabLayout layout = vocab_layout(vocab, kThreads);
  return num_rows * row_splits(num_rows, layout) * static_cast<int64_t>(sizeof(Candidate)) +
         aligned_bytes(num_rows * layout.num_chunks() * static_cast<int64_t>(sizeof(float)));
}

const char* launch_sample(const SampleArguments& a, void* stream) {
  if (a.num_rows == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.vocab >= int64_t{1} << 30) return "vocab of 2^30 or more";
  if (a.vocab == 0) {  // -1 for every row: all bits set
    const cudaError_t error = cudaMemsetAsync(a.out, 0xff, a.num_rows * sizeof(int64_t), s);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  SamplePlan plan{a, vocab_layout(a.vocab, kThreads), 1, static_cast<Candidate*>(a.workspace), nullptr};
  plan.splits = row_splits(a.num_rows, plan.layout);
  plan.maxima = reinterpret_cast<float*>(plan.candidates + a.num_rows * plan.splits);
  return dispatch_dtype(a.dtype, [&](auto* tag) { return launch<std::remove_pointer_t<decltype(tag)>>(plan, s); });
}

}  // namespace minivllm
