// Selection without sorting, by one block of kSelectThreads threads. Values are ordered by a key: the bits of a distance from
// the row's largest logit, so that 0 is the likeliest and smaller means likelier. A threshold is found either by ranking a few
// values in shared memory against each other, or by histograms of 11, 11 and 10 bits of the keys (radix selection). Weights are
// counts or masses in fixed point: sums of integers do not hang on their order.
#pragma once

#include "sampling/rows.cuh"

namespace minivllm {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / 32;
constexpr int kBuckets = 2048;
constexpr int kMaxCandidates = 2048;
constexpr int kMaxRanked = 256;              // candidates up to here are compared with each other
constexpr uint32_t kLastFinite = 0x7f7fffff;  // key of the largest finite distance
constexpr uint32_t kNoKey = 0xffffffff;

struct SelectShared {
  uint32_t low[kBuckets], high[kBuckets];  // weights in 64 bits; `high` holds the chunks to visit while candidates are gathered
  uint32_t keys[kMaxCandidates];
  float logits[kMaxCandidates];
  int tokens[kMaxCandidates];
  uint64_t partial[kSelectWarps];
  uint64_t before;
  uint32_t best_key;
  int count, bucket;
};

__device__ __forceinline__ uint32_t distance_key(float distance) { return __float_as_uint(fabsf(distance)); }

// An order of all floats, larger ones first; -0 is 0.
__device__ __forceinline__ uint32_t value_key(float logit) {
  const int bits = __float_as_int(logit + 0.0f);
  return ~(static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u);
}

__device__ __forceinline__ float value_of_key(uint32_t key) {
  const int bits = static_cast<int>(~key ^ 0x80000000u);
  return __int_as_float(bits ^ ((bits >> 31) & 0x7fffffff));
}

// exp(-distance) in units of 2^-40.
__device__ __forceinline__ uint64_t mass_of(uint32_t key) {
  return __float2ull_rn(__expf(-__uint_as_float(key)) * 0x1p40f);
}

__device__ __forceinline__ float block_max_or_nan(float v, SelectShared& s) {
  auto* partial = reinterpret_cast<float*>(s.partial);
  v = warp_max_or_nan(v);
  __syncthreads();  // whoever read `partial` before is done
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = partial[0];
#pragma unroll
  for (int warp = 1; warp < kSelectWarps; ++warp) v = max_or_nan(v, partial[warp]);
  return v;
}

// Sum over the threads before this one; `total` over all.
__device__ __forceinline__ uint64_t block_scan(uint64_t v, SelectShared& s, uint64_t& total) {
  uint64_t sum = v;
#pragma unroll
  for (int lane = 1; lane < 32; lane *= 2) {
    const uint64_t other = __shfl_up_sync(0xffffffffu, sum, lane);
    if (static_cast<int>(threadIdx.x % 32) >= lane) sum += other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 31) s.partial[threadIdx.x / 32] = sum;
  __syncthreads();
  uint64_t before = 0;
  total = 0;
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) {
    if (warp == static_cast<int>(threadIdx.x / 32)) before = total;
    total += s.partial[warp];
  }
  return before + sum - v;
}

// Sum over the block in a fixed order.
__device__ __forceinline__ double block_sum(double v, SelectShared& s) {
  auto* partial = reinterpret_cast<double*>(s.partial);
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  __syncthreads();
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.0;
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) v += partial[warp];
  return v;
}

// What a threshold is to reach: a number of values, or a share of their mass.
struct Target {
  uint64_t count = 0;
  float share = 0.0f;

  __device__ bool counts() const { return count > 0; }
  __device__ uint64_t weight(uint32_t key) const { return counts() ? 1 : mass_of(key); }

  // At least 1, so that the likeliest value is kept whatever the share.
  __device__ uint64_t needed(uint64_t total) const {
    if (counts()) return count;
    const auto of_share = static_cast<uint64_t>(ceil(static_cast<double>(share) * static_cast<double>(total)));
    return max(of_share, uint64_t{1});
  }
};

inline __device__ Target of_count(uint64_t count) { return {count, 0.0f}; }
inline __device__ Target of_share(float share) { return {0, share}; }

__device__ __forceinline__ void add_to_bucket(SelectShared& s, uint32_t bucket, uint64_t weight) {
  const auto low = static_cast<uint32_t>(weight);
  auto high = static_cast<uint32_t>(weight >> 32);
  if (low != 0) high += atomicAdd(&s.low[bucket], low) > 0xffffffffu - low;  // the carry
  if (high != 0) atomicAdd(&s.high[bucket], high);
}

__device__ __forceinline__ void clear_buckets(SelectShared& s) {
  __syncthreads();
  for (int i = threadIdx.x; i < kBuckets; i += kSelectThreads) s.low[i] = s.high[i] = 0;
  __syncthreads();
}

// The weight in 64 bits that add_to_bucket has collected.
__device__ __forceinline__ uint64_t weight_of_bucket(const SelectShared& s, int bucket) {
  return (uint64_t{s.high[bucket]} << 32) + s.low[bucket];
}

// The bucket in which the weights, added up from bucket 0, reach `needed` (which is set from their total where it is 0, and
// loses what lies before the bucket); -1 where all together do not.
template <typename Weight>
__device__ __forceinline__ int find_bucket(SelectShared& s, const Target& target, uint64_t& needed, const Weight& weight) {
  constexpr int kMine = kBuckets / kSelectThreads;
  __syncthreads();
  uint64_t mine[kMine], sum = 0, total;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int bucket = threadIdx.x * kMine + i;
    mine[i] = weight(s, bucket);
    sum += mine[i];
  }
  if (threadIdx.x == 0) s.bucket = -1;
  uint64_t before = block_scan(sum, s, total);
  if (needed == 0) needed = target.needed(total);
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    if (before < needed && before + mine[i] >= needed) s.bucket = threadIdx.x * kMine + i, s.before = before;
    before += mine[i];
  }
  __syncthreads();
  const int bucket = s.bucket;
  if (bucket >= 0) needed -= s.before;
  return bucket;
}

// The smallest key up to which the values' weights reach the target; kNoKey where all of them do not. `each(limit, f)` calls
// f(key) for every value of key <= limit.
template <typename Each>
__device__ uint32_t select_key(SelectShared& s, const Each& each, uint32_t limit, const Target& target) {
  uint64_t needed = 0;
  uint32_t low = 0, high = limit;  // where the key lies
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
    clear_buckets(s);
    each(high, [&](uint32_t key) {
      if (key >= low) add_to_bucket(s, (key - low) >> shift, target.weight(key));
    });
    const int bucket = find_bucket(s, target, needed, weight_of_bucket);
    if (bucket < 0) return kNoKey;
    low += static_cast<uint32_t>(bucket) << shift;
    high = min(high, low + ((1u << shift) - 1));
  }
  return low;
}

// The same over the first n of s.keys, each compared with every other; n <= kMaxRanked.
__device__ __forceinline__ uint32_t rank_key(SelectShared& s, int n, uint32_t limit, const Target& target) {
  const int i = threadIdx.x;
  const uint32_t key = i < n ? s.keys[i] : 0xffffffffu;
  uint64_t reached = 0, total = 0;
  if (target.counts()) {
    uint32_t count = 0;
    if (i < n)
      for (int j = 0; j < n; ++j) count += s.keys[j] <= key;
    reached = key <= limit ? count : 0;
  } else {
    auto* masses = reinterpret_cast<uint64_t*>(s.low);
    const uint64_t mass = key <= limit ? mass_of(key) : 0;
    __syncthreads();
    if (i < n) masses[i] = mass;
    __syncthreads();
    if (i < n)
      for (int j = 0; j < n; ++j) {
        total += masses[j];
        if (s.keys[j] <= key) reached += masses[j];
      }
    if (key > limit) reached = 0;
  }
  __syncthreads();
  if (i == 0) s.best_key = kNoKey;
  __syncthreads();
  const bool enough = i < n && reached > 0 && reached >= target.needed(total);
  const uint32_t best = __reduce_min_sync(0xffffffffu, enough ? key : kNoKey);
  if (i % 32 == 0) atomicMin(&s.best_key, best);
  __syncthreads();
  return s.best_key;
}

// select_key over the first n of s.keys.
__device__ __forceinline__ uint32_t select_gathered(SelectShared& s, int n, uint32_t limit, const Target& target) {
  if (n <= kMaxRanked) return rank_key(s, n, limit, target);
  const auto keys = [&](uint32_t end, const auto& f) {
    for (int i = threadIdx.x; i < n; i += kSelectThreads)
      if (s.keys[i] <= end) f(s.keys[i]);
  };
  return select_key(s, keys, limit, target);
}

// One row of logits with the largest of every chunk.
template <typename T, bool kAligned>
struct SelectRow {
  const T* logits;
  const float* maxima;
  VocabLayout layout;
  float largest, temperature;

  __device__ uint32_t key(float logit) const { return distance_key(__fdiv_rn(logit - largest, temperature)); }

  __device__ void find_largest(SelectShared& s) {
    float seen = -INFINITY;
#pragma unroll 8
    for (int c = threadIdx.x; c < layout.num_chunks(); c += kSelectThreads) seen = max_or_nan(seen, maxima[c]);
    largest = block_max_or_nan(seen, s);
  }

  // The smallest logit whose key does not exceed the limit. Keys never rise with the logit, so each round the warp's lanes try
  // 32 values that cut the range into equal parts.
  __device__ float least_logit(uint32_t limit) const {
    uint32_t low = value_key(largest), high = value_key(-kLargestFloat);  // value keys fall with the logit
    while (low < high) {
      const uint64_t span = high - low;
      const auto cut = [low, span](uint32_t i) { return low + static_cast<uint32_t>((span * i + 31) / 32); };
      const bool within = key(value_of_key(cut(threadIdx.x % 32 + 1))) <= limit;
      const int count = __popc(__ballot_sync(0xffffffffu, within));
      if (count < 32) high = cut(count + 1) - 1;
      low = cut(count);
    }
    return value_of_key(low);
  }

  // Calls f(i) for the sixteens (a thread's tokens of a tile, counted through the tiles) whose chunk reaches the logit `least`.
  // Which of them a thread sees, and when, hangs on nothing but the vocabulary.
  template <typename F>
  __device__ void each_sixteen(float least, const F& f) const {
    constexpr int kAhead = 32;
    for (int start = threadIdx.x; start < layout.num_sixteens(); start += kAhead * kSelectThreads) {
      uint32_t wanted = 0;
#pragma unroll 8
      for (int i = 0; i < kAhead; ++i) {
        const int sixteen = start + i * kSelectThreads;
        if (sixteen < layout.num_sixteens() && maxima[sixteen / kThreadsPerChunk] >= least) wanted |= 1u << i;
      }
      for (; wanted != 0; wanted &= wanted - 1) f(start + (__ffs(wanted) - 1) * kSelectThreads);
    }
  }

  // Loads the vectors of a sixteen; the first of them, and the others layout.threads apart.
  __device__ int load_sixteen(int sixteen, Logits<T> (&vectors)[kVectors<T>]) const {
    const int v = vector_of<T>(layout, sixteen >> layout.log2_threads, 0, sixteen & (layout.threads - 1));
#pragma unroll
    for (int u = 0; u < kVectors<T>; ++u)
      vectors[u] = load_vector<T, kAligned>(logits, v + (u << layout.log2_threads), layout.vocab);
    return v;
  }

  // Calls f(token, logit) for every logit from `least` upwards; those beyond the row's end are -infinity.
  template <typename F>
  __device__ void each_logit(float least, const F& f) const {
    each_sixteen(least, [&](int sixteen) {
      Logits<T> vectors[kVectors<T>];
      const int v = load_sixteen(sixteen, vectors);
#pragma unroll
      for (int u = 0; u < kVectors<T>; ++u)
#pragma unroll
        for (int j = 0; j < kVectorTokens<T>; ++j) {
          const float logit = widen(vectors[u].data[j]);
          if (logit >= least) f((v + (u << layout.log2_threads)) * kVectorTokens<T> + j, logit);
        }
    });
  }

  // For select_key: the keys of the row.
  __device__ auto keys() const {
    return [this](uint32_t limit, const auto& f) {
      each_logit(-kLargestFloat, [&](int, float logit) {
        if (const uint32_t k = key(logit); k <= limit) f(k);
      });
    };
  }

  // Sum of f(logit) over the row's logits from `least` upwards, in an order that hangs on nothing but the vocabulary.
  template <typename F>
  __device__ double sum(SelectShared& s, float least, const F& f) const {
    double total = 0.0;
    each_sixteen(least, [&](int sixteen) {
      Logits<T> vectors[kVectors<T>];
      load_sixteen(sixteen, vectors);
      float part = 0.0f;
#pragma unroll
      for (int u = 0; u < kVectors<T>; ++u)
#pragma unroll
        for (int j = 0; j < kVectorTokens<T>; ++j) {
          const float logit = widen(vectors[u].data[j]);
          part += logit >= least ? f(logit) : 0.0f;
        }
      total += part;
    });
    return block_sum(total, s);
  }

  // A key that at least `count` tokens do not exceed, from the chunks' largest logits; kLastFinite where there are fewer
  // chunks.
  __device__ uint32_t bound_of_count(SelectShared& s, uint64_t count) const {
    if (count > static_cast<uint64_t>(layout.num_chunks())) return kLastFinite;
    clear_buckets(s);
    for (int c = threadIdx.x; c < layout.num_chunks(); c += kSelectThreads) {
      const uint32_t k = key(maxima[c]);
      if (k <= kLastFinite) atomicAdd(&s.low[k >> 20], 1u);
    }
    uint64_t needed = count;
    const int bucket = find_bucket(s, of_count(count), needed, weight_of_bucket);
    return bucket < 0 ? kLastFinite : min(kLastFinite, (static_cast<uint32_t>(bucket + 1) << 20) - 1);
  }

  // Writes the tokens of key <= limit whose logit is above `least` to shared memory, in no order. Returns how many they are, or
  // -1 where there is no room.
  __device__ int gather(SelectShared& s, uint32_t limit, float least = -INFINITY) const {
    __syncthreads();
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    for (int c = threadIdx.x; c < layout.num_chunks(); c += kSelectThreads) {
      if (key(maxima[c]) > limit || !(maxima[c] > least)) continue;
      const int place = atomicAdd(&s.count, 1);
      if (place < kBuckets) s.high[place] = c;
    }
    __syncthreads();
    const int num_chunks = s.count;
    __syncthreads();
    if (num_chunks > kBuckets) return -1;
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    constexpr int N = kVectorTokens<T>;
    for (int item = threadIdx.x; item < num_chunks * kChunkVectors<T>; item += kSelectThreads) {
      const int index = vector_of_chunk<T>(layout, s.high[item / kChunkVectors<T>], item % kChunkVectors<T>);
      if (index * N >= layout.vocab) continue;
      const Logits<T> v = load_vector<T, kAligned>(logits, index, layout.vocab);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float logit = widen(v.data[j]);
        const uint32_t k = key(logit);
        if (k > limit || !(logit > least)) continue;
        const int place = atomicAdd(&s.count, 1);
        if (place < kMaxCandidates) s.keys[place] = k, s.logits[place] = logit, s.tokens[place] = index * N + j;
      }
    }
    __syncthreads();
    const int count = s.count;
    return count > kMaxCandidates ? -1 : count;
  }
};

}  // namespace minivllm
