// Selection without sorting, by one block of kSelectThreads threads. Values are ordered by a key: the bits of a distance from the
// row's largest logit, so that 0 is the likeliest and smaller means likelier. A threshold is found either by ranking a few values in
// shared memory against each other, or by histograms of 11, 11 and 10 bits of the keys (radix selection). Weights are counts or
// masses in fixed point: sums of integers do not hang on their order.
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
constexpr int kMostSummed = 1 << 20;
constexpr float kLinearBuckets = 64.0f;  // buckets for a distance of 1

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

// What a threshold is to reach: a number of values, or a share of their mass, or a mass.
struct Target {
  uint64_t count = 0;
  float share = 0.0f;
  uint64_t mass = 0;

  __device__ bool counts() const { return count > 0; }
  __device__ uint64_t weight(uint32_t key) const { return counts() ? 1 : mass_of(key); }

  // At least 1, so that the likeliest value is kept whatever the share.
  __device__ uint64_t needed(uint64_t total) const {
    if (counts()) return count;
    if (mass > 0) return min(mass, total);
    const auto of_share = static_cast<uint64_t>(ceil(static_cast<double>(share) * static_cast<double>(total)));
    return max(of_share, uint64_t{1});
  }
};

inline __device__ Target of_count(uint64_t count) { return {count, 0.0f, 0}; }
inline __device__ Target of_share(float share) { return {0, share, 0}; }

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

// The bucket in which the weights, added up from bucket 0, reach `needed` (which is set from their total where it is 0, and loses
// what lies before the bucket); -1 where all together do not.
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

// The smallest key up to which the values' weights reach the target; kNoKey where all of them do not. `each(limit, f)` calls f(key)
// for every value of key <= limit.
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
    for (int c = threadIdx.x; c < layout.num_chunks(); c += kSelectThreads) seen = max_or_nan(seen, maxima[c]);
    largest = block_max_or_nan(seen, s);
  }

  // The smallest logit whose key does not exceed the limit: bisection, for keys never rise with the logit.
  __device__ float least_logit(uint32_t limit) const {
    uint32_t low = value_key(largest), high = value_key(-kLargestFloat);  // value keys fall with the logit
    while (low < high) {
      const uint32_t middle = low + (high - low + 1) / 2;
      if (key(value_of_key(middle)) <= limit) low = middle;
      else high = middle - 1;
    }
    return value_of_key(low);
  }

  // Calls f(v, vectors, wanted) for kVectors vectors kSelectThreads apart, those wanted whose chunk reaches the logit `least`.
  template <typename F>
  __device__ void each_tile(float least, const F& f) const {
    constexpr int N = kVectorTokens<T>, kAhead = kVectors<T>;
    const int num_vectors = (layout.vocab + N - 1) / N;
    for (int v = threadIdx.x; v < num_vectors; v += kSelectThreads * kAhead) {
      Logits<T> vectors[kAhead];
      bool wanted[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const int index = v + u * kSelectThreads;
        wanted[u] = index < num_vectors && maxima[chunk_of<T>(layout, index)] >= least;
        if (wanted[u]) vectors[u] = load_vector<T, kAligned>(logits, index, layout.vocab);
      }
      f(v, vectors, wanted);
    }
  }

  // Calls f(token, logit) for every logit from `least` upwards; those beyond the row's end are -infinity.
  template <typename F>
  __device__ void each_logit(float least, const F& f) const {
    each_tile(least, [&](int v, const Logits<T>(&vectors)[kVectors<T>], const bool(&wanted)[kVectors<T>]) {
#pragma unroll
      for (int u = 0; u < kVectors<T>; ++u) {
        if (!wanted[u]) continue;
#pragma unroll
        for (int j = 0; j < kVectorTokens<T>; ++j) {
          const float logit = widen(vectors[u].data[j]);
          if (logit >= least) f((v + u * kSelectThreads) * kVectorTokens<T> + j, logit);
        }
      }
    });
  }

  // A bucket of distances 1/64 wide. It need not agree with `key` to the last bit, only with itself.
  __device__ float scaled_distance(float logit) const {
    return (largest - logit) * fminf(kLinearBuckets / temperature, kLargestFloat);
  }

  // For select_key: the keys of the wanted logits.
  template <typename Wanted>
  __device__ auto keys_from(float least, const Wanted& wanted) const {
    return [this, least, wanted](uint32_t limit, const auto& f) {
      each_logit(least, [&](int, float logit) {
        if (wanted(logit) && key(logit) <= limit) f(key(logit));
      });
    };
  }

  // select_key over the row's logits from `least` upwards: a histogram of distances finds the bucket, its few tokens the key.
  __device__ uint32_t select_in_row(SelectShared& s, float least, const Target& target) const {
    const auto any = [](float) { return true; };
    if (layout.vocab >= kMostSummed) return select_key(s, keys_from(least, any), kLastFinite, target);
    clear_buckets(s);
    each_logit(least, [&](int, float logit) {
      const float distance = scaled_distance(logit);
      const int bucket = min(static_cast<int>(distance), kBuckets - 1);
      if (target.counts()) {
        atomicAdd(&s.low[bucket], 1u);
      } else if (bucket < kBuckets - 1) {  // beyond a distance of 32 is no mass
        const float rest = (distance - static_cast<float>(bucket)) * (1.0f / kLinearBuckets);
        const float share = 1.0f - rest * (1.0f - rest * (0.5f - rest * (1.0f / 6)));  // exp(-rest), rest < 1/64
        const auto mass = static_cast<uint32_t>(share * 0x1p24f + 0.5f);
        atomicAdd(&s.low[bucket], mass & 0xfff);  // in two halves, which kMostSummed tokens do not overflow
        atomicAdd(&s.high[bucket], mass >> 12);
      }
    });
    uint64_t needed = 0;
    const int found = find_bucket(s, target, needed, [&](const SelectShared& shared, int bucket) -> uint64_t {
      const uint64_t sum = (uint64_t{shared.high[bucket]} << 12) + shared.low[bucket];
      if (target.counts()) return sum;
      return __double2ull_rn(static_cast<double>(sum) * expf(static_cast<float>(bucket) * (-1.0f / kLinearBuckets)) * 65536.0);
    });
    if (found < 0) return kNoKey;
    const Target rest = target.counts() ? of_count(needed) : Target{0, 0.0f, needed};
    const auto in_bucket = [&](float logit) { return min(static_cast<int>(scaled_distance(logit)), kBuckets - 1) == found; };
    const int n = collect(s, least, in_bucket);
    if (n >= 0) return select_gathered(s, n, kLastFinite, rest);
    const auto keys = keys_from(least, in_bucket);
    return select_key(s, keys, kLastFinite, rest);
  }

  // Writes the keys of the wanted logits to shared memory. Returns how many they are, or -1 where there is no room.
  template <typename Wanted>
  __device__ int collect(SelectShared& s, float least, const Wanted& wanted) const {
    __syncthreads();
    if (threadIdx.x == 0) s.count = 0;
    __syncthreads();
    each_logit(least, [&](int, float logit) {
      if (!wanted(logit)) return;
      const int place = atomicAdd(&s.count, 1);
      if (place < kMaxCandidates) s.keys[place] = key(logit);
    });
    __syncthreads();
    return s.count > kMaxCandidates ? -1 : s.count;
  }

  // A key that at least `count` tokens do not exceed, from the chunks' largest logits; kLastFinite where there are fewer chunks.
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

  // Writes the tokens of key <= limit whose logit is above `least` to shared memory, in no order. Returns how many they are, or -1
  // where there is no room.
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
