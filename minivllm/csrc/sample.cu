// sample on CUDA, the pass over memory. Every row is read once, by as many blocks as the GPU has room for at once. A greedy row
// keeps its largest logit, any other row the best of logit / temperature + Gumbel noise: filters or not, that is most often the
// token drawn. A row with filters keeps the largest logit and the mass of every chunk as well; one with a small top-k, only the
// former. The second kernel (sample_filter.cu) puts the parts together.
//
// Floor: the row's bytes / bandwidth; or the launch for few rows.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "sample.h"
#include "sampling/plan.h"
#include "sampling/search.cuh"

namespace minivllm {
namespace {

constexpr int kWarps = 12;
constexpr int kBlocksPerMultiprocessor = 2;
constexpr int kLeastTiles = 4;  // of a block, which is then one tile a warp

struct SampleShared {
  float bound;
  int next_tile;
  Candidate bests[kWarps];
};

struct Range {
  int begin, end;
};

// A tile is a warp's.
__device__ __forceinline__ Range tiles_of_block(const SamplePlan& plan, int split) {
  const int64_t tiles = plan.layout.num_tiles;
  return {static_cast<int>(tiles * split / plan.splits), static_cast<int>(tiles * (split + 1) / plan.splits)};
}

template <typename T>
__device__ __forceinline__ float mass_of_chunk(const Logits<T> (&v)[kVectors<T>], float largest, float scale) {
  const float origin = fmaxf(largest, -kLargestFloat);  // a chunk of masked tokens has mass 0
  float mass = 0.0f;
#pragma unroll
  for (int u = 0; u < kVectors<T>; ++u)
#pragma unroll
    for (int j = 0; j < kVectorTokens<T>; ++j) mass += exp2_approximate((widen(v[u].data[j]) - origin) * scale);
  mass += __shfl_xor_sync(0xffffffffu, mass, 1);
  return mass + __shfl_xor_sync(0xffffffffu, mass, 2);
}

// Each warp takes the block's next tile when it is done with one, so that all end at the same time. kFiltered: what the second
// kernel needs to draw again is written too.
template <typename T, bool kAligned, bool kFiltered>
__device__ Candidate draw(const SamplePlan& plan, const T* row, int64_t r, float temperature, Range tiles, SampleShared& s,
                          float& seen) {
  const VocabLayout& layout = plan.layout;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Search<T> search(row, layout.vocab, static_cast<uint64_t>(plan.a.seeds[r]), temperature, &s.bound);
  int tile = tiles.begin + warp;
  Logits<T> v[kVectors<T>];
  if (tile < tiles.end) load_tile<T, kAligned>(row, layout, tile, v);
  if (threadIdx.x == 0) s.bound = -INFINITY, s.next_tile = tiles.begin + static_cast<int>(blockDim.x / 32);
  __syncthreads();
  while (tile < tiles.end) {
    int next = 0;
    if (lane == 0) next = atomicAdd(&s.next_tile, 1);
    next = __shfl_sync(0xffffffffu, next, 0);
    float larger[kPairs];
    const float largest = larger_of_pairs<T>(v, larger);
    seen = max_or_nan(seen, largest);
    const int64_t sixteen = r * layout.num_sixteens() + tile * 32 + lane;
    if (kFiltered) {
      const float largest_of_chunk = chunk_largest(largest);
      const float mass = mass_of_chunk<T>(v, largest_of_chunk, search.scale);
      if (lane % kThreadsPerChunk == 0)
        plan.maxima[sixteen / kThreadsPerChunk] = largest_of_chunk, plan.masses[sixteen / kThreadsPerChunk] = mass;
    }
    if (next < tiles.end) load_tile<T, kAligned>(row, layout, next, v);  // arrives while this tile is searched
    const float most = search.visit(vector_of<T>(layout, tile, 0, lane), 32, larger, largest, -kLargestFloat);
    if (kFiltered) plan.scores[sixteen] = most;
    tile = next;
  }
  return search.best;
}

template <typename T, bool kAligned>
__device__ Candidate take_largest(const SamplePlan& plan, const T* row, Range tiles, float& seen) {
  constexpr int N = kVectorTokens<T>;
  const VocabLayout& layout = plan.layout;
  float best = -INFINITY;
  int best_vector = -1;
  for (int tile = tiles.begin + threadIdx.x / 32; tile < tiles.end; tile += blockDim.x / 32) {
    Logits<T> v[kVectors<T>];
    load_tile<T, kAligned>(row, layout, tile, v);
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u) {
      const float largest = largest_of(v[u]);
      seen = max_or_nan(seen, largest);
      if (largest > best) best = largest, best_vector = vector_of<T>(layout, tile, u, threadIdx.x % 32);
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
  for (int tile = tiles.begin + threadIdx.x / 32; tile < tiles.end; tile += blockDim.x / 32) {
    Logits<T> v[kVectors<T>];
    load_tile<T, kAligned>(row, layout, tile, v);
    float largest = largest_of(v[0]);
#pragma unroll
    for (int u = 1; u < kVectors<T>; ++u) largest = max_or_nan(largest, largest_of(v[u]));
    largest = chunk_largest(largest);
    if (threadIdx.x % kThreadsPerChunk == 0)
      plan.maxima[r * layout.num_chunks() + (tile * 32 + threadIdx.x % 32) / kThreadsPerChunk] = largest;
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerMultiprocessor) sample_kernel(SamplePlan plan) {
  __shared__ SampleShared s;
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t r = blockIdx.x / plan.splits;
  const int split = blockIdx.x % plan.splits, vocab = plan.layout.vocab, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const T* row = static_cast<const T*>(plan.a.logits) + r * plan.a.stride;
  const Range tiles = tiles_of_block(plan, split);
  const RowOptions options(plan.a, r);
  if (options.few(vocab)) return write_maxima<T, kAligned>(plan, row, r, tiles);

  float seen = -INFINITY;
  Candidate best;
  if (options.greedy()) best = take_largest<T, kAligned>(plan, row, tiles, seen);
  else if (options.filtered(vocab)) best = draw<T, kAligned, true>(plan, row, r, options.temperature, tiles, s, seen);
  else best = draw<T, kAligned, false>(plan, row, r, options.temperature, tiles, s, seen);
  if (!(seen <= kLargestFloat)) best.index = kInvalidRow;
  const double inverse_temperature = options.inverse_temperature();
  best = warp_best(best, inverse_temperature);
  if (lane == 0) s.bests[warp] = best;
  __syncthreads();
  if (warp != 0) return;
  best = warp_best(s.bests[min(lane, static_cast<int>(blockDim.x / 32) - 1)], inverse_temperature);
  if (lane == 0) plan.candidates[r * plan.splits + split] = best;
}

int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

template <typename T>
const char* launch(const SamplePlan& plan, cudaStream_t stream) {
  const int64_t blocks = plan.a.num_rows * plan.splits;
  if (blocks > 2147483647) return "more than 2^31 - 1 blocks";
  const int tiles = (plan.layout.num_tiles + plan.splits - 1) / plan.splits;
  auto* kernel = vectors_aligned<T>(plan.a.logits, plan.a.stride) ? sample_kernel<T, true> : sample_kernel<T, false>;
  const char* error =
      launch_overlapped(kernel, static_cast<unsigned>(blocks), 32 * (tiles < kWarps ? tiles : kWarps), 0, stream, plan);
  return error != nullptr ? error : launch_finish(plan, stream);
}

int row_splits(int64_t num_rows, const VocabLayout& layout) {
  const int64_t room = int64_t{kBlocksPerMultiprocessor} * multiprocessors();
  const int64_t most = (layout.num_tiles + kLeastTiles - 1) / kLeastTiles;
  const int64_t wanted = num_rows > 0 && num_rows < room ? room / num_rows : 1;
  return static_cast<int>(wanted < most ? wanted : (most > 0 ? most : 1));
}

// Lays the plan's arrays out behind `workspace` and returns their bytes.
int64_t place_arrays(SamplePlan& plan, void* workspace) {
  plan.splits = row_splits(plan.a.num_rows, plan.layout);
  const int64_t num_chunks = plan.a.num_rows * plan.layout.num_chunks();
  plan.candidates = static_cast<Candidate*>(workspace);
  plan.maxima = reinterpret_cast<float*>(plan.candidates + plan.a.num_rows * plan.splits);
  plan.masses = plan.maxima + num_chunks;
  plan.scores = plan.masses + num_chunks;
  return reinterpret_cast<char*>(plan.scores + plan.a.num_rows * plan.layout.num_sixteens()) - static_cast<char*>(workspace);
}

}  // namespace

int64_t sample_workspace_bytes(int64_t num_rows, int64_t vocab) {
  SamplePlan plan{};
  plan.a.num_rows = num_rows, plan.layout = vocab_layout(vocab, 32);
  return place_arrays(plan, nullptr);
}

const char* launch_sample(const SampleArguments& a, void* stream) {
  if (a.num_rows == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.vocab >= int64_t{1} << 30) return "vocab of 2^30 or more";
  if (a.vocab == 0) {  // -1 for every row: all bits set
    const cudaError_t error = cudaMemsetAsync(a.out, 0xff, a.num_rows * sizeof(int64_t), s);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  }
  SamplePlan plan{a, vocab_layout(a.vocab, 32), 1, nullptr, nullptr, nullptr, nullptr};
  place_arrays(plan, a.workspace);
  return dispatch_dtype(a.dtype, [&](auto* tag) { return launch<std::remove_pointer_t<decltype(tag)>>(plan, s); });
}

}  // namespace minivllm
