// token_logprobs on CUDA. The first kernel reads every row once, by several blocks where there are few rows: each warp leaves the
// largest logit and the sum of exponentials of every 512 tokens, each block how many of its logits are larger than the token's, and
// the largest of every chunk. The second kernel, one block a row, adds the parts up in float64 in an order that depends on the
// vocabulary alone, so a row's result does not depend on the rows beside it, and picks the likeliest tokens out of the few chunks
// that can hold them. Floor: the row's bytes / bandwidth.
#include "common/launch.cuh"
#include "logprobs.h"
#include "sampling/select.cuh"

#include <type_traits>

namespace minivllm {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 10;
constexpr int kMaxSelected = 1024;    // as many of the likeliest are picked in shared memory; more are ranked by counting
constexpr int kRankingThreads = 256;

struct Part {
  float largest, mass;  // sum of exp(logit - largest)
};

struct RowSum {
  double log_mass;
  float largest;  // NaN: the row has no probabilities
};

struct Plan {
  LogprobsArguments a;
  VocabLayout layout;
  int splits;
  RowSum* sums;     // [n]
  Part* parts;      // [n, num_tiles, warps]
  float* maxima;    // [n, num_chunks]
  int* num_larger;  // [n, splits]

  __host__ __device__ int num_parts() const { return layout.num_tiles * (layout.threads / 32); }
};

template <typename T>
__device__ __forceinline__ const T* row_of(const Plan& plan, int64_t r) {
  return static_cast<const T*>(plan.a.logits) + r * plan.a.stride;
}

// e^x for x <= 0 by the hardware's approximation, whose error of a few units of the last float32 place is lost in the sum.
__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.442695041f));
  return y;
}

template <typename T>
__device__ __forceinline__ Part part_of_warp(const Logits<T> (&v)[kVectors<T>], float of_thread) {
  Part part{warp_max_or_nan(of_thread), 0.0f};
  const float origin = fmaxf(part.largest, -kLargestFloat);  // a part of masked tokens has mass 0
#pragma unroll
  for (int u = 0; u < kVectors<T>; ++u)
#pragma unroll
    for (int j = 0; j < kVectorTokens<T>; ++j) part.mass += exponential(widen(v[u].data[j]) - origin);
  part.mass = warp_sum(part.mass);
  return part;
}

// How many of a vector's logits are larger than `chosen`.
__device__ __forceinline__ int count_larger(const Vec<float, 4>& v, float chosen) {
  int count = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) count += v.data[j] > chosen;
  return count;
}

template <typename T>
__device__ __forceinline__ int count_larger(const Vec<T, 8>& v, T chosen) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const auto* pairs = reinterpret_cast<const Pair*>(v.data);
  const Pair bound{chosen, chosen};
  const Pair larger = __hadd2(__hadd2(__hgt2(pairs[0], bound), __hgt2(pairs[1], bound)),
                              __hadd2(__hgt2(pairs[2], bound), __hgt2(pairs[3], bound)));
  return static_cast<int>(widen(larger.x) + widen(larger.y));
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) read_kernel(Plan plan) {
  __shared__ int larger_of_warp[kThreads / 32];
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t r = blockIdx.x / plan.splits;
  const int split = blockIdx.x % plan.splits, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const VocabLayout& layout = plan.layout;
  const T* row = row_of<T>(plan, r);
  const int64_t token = plan.a.token_ids[r];
  const T chosen = token >= 0 ? row[token] : narrow<T>(INFINITY);
  Part* parts = plan.parts + r * plan.num_parts() + warp;
  float* maxima = plan.maxima + r * layout.num_chunks() + threadIdx.x / kThreadsPerChunk;
  int num_larger = 0;
  const int begin = static_cast<int>(int64_t{layout.num_tiles} * split / plan.splits);
  const int end = static_cast<int>(int64_t{layout.num_tiles} * (split + 1) / plan.splits);
  const auto take = [&](const Logits<T>(&v)[kVectors<T>], int tile) {
    float largest = largest_of(v[0]);
#pragma unroll
    for (int u = 1; u < kVectors<T>; ++u) largest = max_or_nan(largest, largest_of(v[u]));
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u) num_larger += count_larger(v[u], chosen);
    const Part part = part_of_warp<T>(v, largest);
    if (threadIdx.x % 32 == 0) parts[tile * warps] = part;
    largest = chunk_largest(largest);
    if (threadIdx.x % kThreadsPerChunk == 0) maxima[(tile << layout.log2_threads) / kThreadsPerChunk] = largest;
  };
  // Whole tiles have a loop of their own: the compiler keeps 16-bit logits in pairs only where none was loaded alone.
  const int whole = kAligned ? min(end, layout.vocab / kTokensPerThread >> layout.log2_threads) : begin;
  int tile = begin;
  for (; tile < whole; ++tile) {
    Logits<T> v[kVectors<T>];
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u)
      v[u] = reinterpret_cast<const Logits<T>*>(row)[vector_of<T>(layout, tile, u, threadIdx.x)];
    take(v, tile);
  }
  for (; tile < end; ++tile) {
    Logits<T> v[kVectors<T>];
    load_tile<T, kAligned>(row, layout, tile, v);
    take(v, tile);
  }
  num_larger = __reduce_add_sync(0xffffffffu, num_larger);
  if (threadIdx.x % 32 == 0) larger_of_warp[warp] = num_larger;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int other = 1; other < warps; ++other) num_larger += larger_of_warp[other];
  plan.num_larger[r * plan.splits + split] = num_larger;
}

__device__ RowSum add_parts(const Plan& plan, int64_t r, SelectShared& s) {
  const Part* parts = plan.parts + r * plan.num_parts();
  float largest = -INFINITY;
  for (int i = threadIdx.x; i < plan.num_parts(); i += kSelectThreads) largest = max_or_nan(largest, parts[i].largest);
  largest = block_max_or_nan(largest, s);
  if (!(fabsf(largest) <= kLargestFloat)) return {0.0, NAN};
  double mass = 0.0;
  for (int i = threadIdx.x; i < plan.num_parts(); i += kSelectThreads)
    if (parts[i].largest != -INFINITY) mass += parts[i].mass * exp(static_cast<double>(parts[i].largest) - largest);
  return {log(block_sum(mass, s)), largest};
}

__device__ __forceinline__ float logprob(const RowSum& sum, float logit) {
  return static_cast<float>(static_cast<double>(logit) - sum.largest - sum.log_mass);
}

struct TopOut {
  int64_t* ids;
  float* logprobs;

  __device__ void put(int64_t place, int64_t token, float value) const { ids[place] = token, logprobs[place] = value; }
};

__device__ __forceinline__ TopOut top_of(const Plan& plan, int64_t r) {
  return {plan.a.top_ids + r * plan.a.num_top, plan.a.top_logprobs + r * plan.a.num_top};
}

// Ranks the n gathered tokens among themselves and writes the first num_top.
__device__ void put_gathered(const SelectShared& s, int n, int64_t num_top, const RowSum& sum, const TopOut& out) {
  for (int i = threadIdx.x; i < n; i += kSelectThreads) {
    const float logit = s.logits[i];
    const int token = s.tokens[i];
    int place = 0;
    for (int j = 0; j < n; ++j) place += s.logits[j] > logit || (s.logits[j] == logit && s.tokens[j] < token);
    if (place < num_top) out.put(place, token, logprob(sum, logit));
  }
}

// Where too many tokens are candidates (ties), or too few are finite: the num_top-th value itself, the tokens above it, and of
// those equal to it the lowest ids.
template <typename T, bool kAligned>
__device__ void put_with_ties(SelectShared& s, const SelectRow<T, kAligned>& row, int64_t num_top, const RowSum& sum,
                              const TopOut& out) {
  const int vocab = row.layout.vocab;
  const auto keys = [&](uint32_t limit, const auto& f) {
    row.each_logit(-INFINITY, [&](int token, float logit) {
      if (token < vocab && value_key(logit) <= limit) f(value_key(logit));
    });
  };
  const float least = value_of_key(select_key(s, keys, kNoKey, of_count(num_top)));
  const int above = row.gather(s, kLastFinite, least);
  put_gathered(s, above, num_top, sum, out);
  int64_t placed = above;
  for (int start = 0; placed < num_top; start += kSelectThreads) {
    const int token = start + threadIdx.x;
    const bool equal = token < vocab && widen(row.logits[token]) == least;
    uint64_t total;
    const int64_t place = placed + static_cast<int64_t>(block_scan(equal, s, total));
    if (equal && place < num_top) out.put(place, token, logprob(sum, least));
    placed += static_cast<int64_t>(total);
  }
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kSelectThreads) finish_kernel(Plan plan) {
  __shared__ SelectShared s;
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t r = blockIdx.x, num_top = plan.a.num_top, token = plan.a.token_ids[r];
  const T* logits = row_of<T>(plan, r);
  const RowSum sum = add_parts(plan, r, s);
  const bool valid = sum.largest == sum.largest;
  if (threadIdx.x == 0) {
    int64_t rank = 1;
    for (int split = 0; split < plan.splits; ++split) rank += plan.num_larger[r * plan.splits + split];
    const bool known = valid && token >= 0;
    plan.a.logprobs[r] = known ? logprob(sum, widen(logits[token])) : NAN;
    plan.a.ranks[r] = known ? rank : 0;
    plan.sums[r] = sum;
  }
  const TopOut out = top_of(plan, r);
  if (!valid) {
    for (int64_t i = threadIdx.x; i < num_top; i += kSelectThreads) out.put(i, -1, NAN);
    return;
  }
  if (num_top == 0 || num_top > kMaxSelected) return;
  const SelectRow<T, kAligned> row{logits, plan.maxima + r * plan.layout.num_chunks(), plan.layout, sum.largest, 1.0f};
  const int gathered = row.gather(s, row.bound_of_count(s, num_top));
  if (gathered >= num_top) put_gathered(s, gathered, num_top, sum, out);
  else put_with_ties(s, row, num_top, sum, out);
}

// Every token's place by counting the tokens before it: for a num_top so large that shared memory cannot hold them.
template <typename T>
__global__ void __launch_bounds__(kRankingThreads) rank_kernel(Plan plan, unsigned blocks_per_row) {
  __shared__ float tile[kRankingThreads];
  const int64_t r = blockIdx.x / blocks_per_row;
  const RowSum sum = plan.sums[r];
  if (!(sum.largest == sum.largest)) return;
  const T* row = row_of<T>(plan, r);
  const int vocab = plan.layout.vocab;
  const int token = static_cast<int>(blockIdx.x % blocks_per_row) * kRankingThreads + static_cast<int>(threadIdx.x);
  const float logit = token < vocab ? widen(row[token]) : 0.0f;
  int64_t place = 0;
  for (int start = 0; start < vocab; start += kRankingThreads) {
    const int mine = start + threadIdx.x, size = min(kRankingThreads, vocab - start);
    __syncthreads();
    if (mine < vocab) tile[threadIdx.x] = widen(row[mine]);
    __syncthreads();
    for (int j = 0; j < size; ++j) place += tile[j] > logit || (tile[j] == logit && start + j < token);
  }
  if (token < vocab && place < plan.a.num_top) top_of(plan, r).put(place, token, logprob(sum, logit));
}

template <typename T>
const char* launch(const Plan& plan, cudaStream_t stream) {
  const int64_t blocks = plan.a.n * plan.splits;
  const int64_t ranking_blocks_per_row = (plan.a.vocab + kRankingThreads - 1) / kRankingThreads;
  const bool aligned = vectors_aligned<T>(plan.a.logits, plan.a.stride), ranking = plan.a.num_top > kMaxSelected;
  if (blocks > 2147483647 || (ranking && plan.a.n * ranking_blocks_per_row > 2147483647)) return "more than 2^31 - 1 blocks";
  auto* read = aligned ? read_kernel<T, true> : read_kernel<T, false>;
  auto* finish = aligned ? finish_kernel<T, true> : finish_kernel<T, false>;
  const char* error = launch_overlapped(read, dim3(static_cast<unsigned>(blocks)), dim3(plan.layout.threads), 0, stream, plan);
  if (error == nullptr)
    error = launch_overlapped(finish, dim3(static_cast<unsigned>(plan.a.n)), dim3(kSelectThreads), 0, stream, plan);
  if (error != nullptr || !ranking) return error;
  rank_kernel<T><<<static_cast<unsigned>(plan.a.n * ranking_blocks_per_row), kRankingThreads, 0, stream>>>(
      plan, static_cast<unsigned>(ranking_blocks_per_row));
  return launch_error();
}

// Without a vocabulary nothing is known.
__global__ void nothing_kernel(float* logprobs, int64_t* ranks, int64_t n) {
  const int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (r < n) logprobs[r] = NAN, ranks[r] = 0;
}

int row_splits(int64_t n, const VocabLayout& layout) {
  int device = 0, multiprocessors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  const int64_t room = int64_t{kBlocksPerMultiprocessor} * multiprocessors;
  const int64_t wanted = n > 0 && n < room ? room / n : 1;
  return static_cast<int>(wanted < layout.num_tiles ? wanted : (layout.num_tiles > 0 ? layout.num_tiles : 1));
}

// Lays the plan's arrays out behind `workspace` and returns their bytes.
int64_t place_arrays(Plan& plan, void* workspace) {
  auto* next = static_cast<char*>(workspace);
  const auto take = [&](auto*& array, int64_t count) {
    array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
    next += (count * static_cast<int64_t>(sizeof *array) + 15) / 16 * 16;
  };
  const int64_t n = plan.a.n;
  take(plan.sums, n);
  take(plan.parts, n * plan.num_parts());
  take(plan.maxima, n * plan.layout.num_chunks());
  take(plan.num_larger, n * plan.splits);
  return next - static_cast<char*>(workspace);
}

Plan make_plan(const LogprobsArguments& a) {
  Plan plan{a, vocab_layout(a.vocab, kThreads), 1, nullptr, nullptr, nullptr, nullptr};
  plan.splits = row_splits(a.n, plan.layout);
  return plan;
}

}  // namespace

int64_t logprobs_workspace_bytes(int64_t n, int64_t vocab) {
  LogprobsArguments a{};
  a.n = n, a.vocab = vocab;
  Plan plan = make_plan(a);
  return place_arrays(plan, nullptr);
}

const char* launch_token_logprobs(const LogprobsArguments& a, void* stream) {
  if (a.n == 0) return nullptr;
  if (a.vocab >= int64_t{1} << 30) return "vocab of 2^30 or more";
  const auto s = static_cast<cudaStream_t>(stream);
  if (a.vocab == 0) {
    nothing_kernel<<<static_cast<unsigned>((a.n + kThreads - 1) / kThreads), kThreads, 0, s>>>(a.logprobs, a.ranks, a.n);
    return launch_error();
  }
  Plan plan = make_plan(a);
  place_arrays(plan, a.workspace);
  return dispatch_dtype(a.dtype, [&](auto* tag) { return launch<std::remove_pointer_t<decltype(tag)>>(plan, s); });
}

}  // namespace minivllm
