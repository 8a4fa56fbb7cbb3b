// sample: argument checks, the CPU kernel, and the border to the CUDA kernels of sample.cu. On the CPU a row is read in
// chunks of 64 logits. The first pass finds the largest logit of every chunk; everything after (top-k, top-p, the draw) skips
// the chunks whose largest logit cannot matter. A value threshold stands for each filter, found by bisection over the few
// candidates left, so nothing is ever sorted; noise is made only where a token is kept.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/new_tensor.h"
#include "sample.h"

#include <cfloat>
#include <memory>

namespace minivllm {
namespace {

constexpr int64_t kChunk = 64;
constexpr float kMasked = -INFINITY;
constexpr float kBelowOne = 1.0f - 0x1p-24f;

// Floats as integers of the same order (-0 equals +0): integer maxima vectorise where float maxima, for fear of NaN, do
// not.
inline int32_t to_key(float x) {
  const float positive_zero = x + 0.0f;
  int32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float from_key(int32_t key) {
  const int32_t bits = key ^ ((key >> 31) & 0x7fffffff);
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline int32_t largest_key(const float* chunk) {
  int32_t best = INT32_MIN;
#pragma omp simd reduction(max : best)
  for (int64_t i = 0; i < kChunk; ++i) {
    const int32_t key = to_key(chunk[i]);
    best = key > best ? key : best;
  }
  return best;
}

inline int64_t first_with_key(const float* chunk, int32_t key) {
  int64_t i = 0;
  while (to_key(chunk[i]) != key) ++i;
  return i;
}

// One row of logits and what the first pass learned about it.
template <typename T>
struct Row {
  const T* logits;
  int64_t vocab;
  float largest = 0.0f, temperature = 0.0f;

  int64_t num_chunks() const { return (vocab + kChunk - 1) / kChunk; }

  // Logits of chunk c; the row's end is filled up with masked ones.
  void load(int64_t c, float* out) const {
    const int64_t n = vocab - c * kChunk;
    if (n >= kChunk) return to_float(logits + c * kChunk, out, kChunk);
    to_float(logits + c * kChunk, out, n);
    for (int64_t i = n; i < kChunk; ++i) out[i] = kMasked;
  }

  float scale(float logit) const { return (logit - largest) / temperature; }

  // Scaled logits of chunk c: at most 0, and exactly 0 for the largest.
  void load_scaled(int64_t c, float* out) const {
    load(c, out);
#pragma omp simd
    for (int64_t i = 0; i < kChunk; ++i) out[i] = scale(out[i]);
  }
};

// The largest logit of every chunk (where chunk_largest is given) and the index of the row's largest, the lowest of
// equals; -1 for a row with NaN or +infinity, or without a finite logit.
template <typename T>
int64_t scan(const Row<T>& row, float* chunk_largest) {
  alignas(64) float x[kChunk];
  int32_t best = to_key(kMasked), invalid = 0;
  int64_t best_chunk = -1;
  for (int64_t c = 0; c < row.num_chunks(); ++c) {
    row.load(c, x);
#pragma omp simd reduction(+ : invalid)
    for (int64_t i = 0; i < kChunk; ++i) invalid += !(x[i] <= FLT_MAX);
    const int32_t key = largest_key(x);
    if (chunk_largest != nullptr) chunk_largest[c] = from_key(key);
    if (key > best) best = key, best_chunk = c;
  }
  if (invalid != 0 || best_chunk < 0) return -1;
  row.load(best_chunk, x);
  return best_chunk * kChunk + first_with_key(x, best);
}

// How many values reach the pivot.
inline double count_from(const float* values, int64_t n, float pivot) {
  int64_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += values[i] >= pivot;
  return static_cast<double>(count);
}

// Sum of exp(value) over the values that reach the pivot: float32 within a chunk, float64 across.
inline double mass_from(const float* values, int64_t n, float pivot) {
  double mass = 0.0;
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t end = start + kChunk < n ? start + kChunk : n;
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = start; i < end; ++i) part += values[i] >= pivot ? fast_exp(values[i]) : 0.0f;
    mass += part;
  }
  return mass;
}

// Moves the values of one side to the front, without branches; returns how many they are.
template <typename Side>
int64_t keep(float* values, int64_t n, const Side& side) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float value = values[i];
    values[kept] = value;
    kept += side(value);
  }
  return kept;
}

// The largest v among the values for which weigh(values >= v) reaches the target; all of them together must. Bisects
// the range of the values left and drops the losing side; every fourth round bisects the floats between instead, so
// that a far outlier (a mask of -1e30) costs a few rounds, not a hundred. The values are overwritten.
template <typename Weigh>
float weighted_threshold(float* values, int64_t n, double target, const Weigh& weigh) {
  double above = 0.0;
  for (int round = 1;; ++round) {
    int32_t low = INT32_MAX, high = INT32_MIN;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t i = 0; i < n; ++i) {
      const int32_t key = to_key(values[i]);
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
    if (low == high) return from_key(low);
    float pivot = 0.5f * from_key(low) + 0.5f * from_key(high);
    if (round % 4 == 0) pivot = from_key(static_cast<int32_t>((int64_t{low} + high + 1) >> 1));
    if (!(pivot > from_key(low))) pivot = from_key(high);
    const double reached = above + weigh(values, n, pivot);
    if (reached >= target) {
      n = keep(values, n, [pivot](float value) { return value >= pivot; });
    } else {
      above = reached;
      n = keep(values, n, [pivot](float value) { return value < pivot; });
    }
  }
}

struct Filter {
  int64_t top_k;
  float top_p, min_p;
};

// Writes the scaled logits that reach the threshold one after the other; returns how many they are.
template <typename T>
int64_t gather_from(const Row<T>& row, const float* chunk_largest, float threshold, float* out) {
  alignas(64) float z[kChunk];
  int64_t n = 0;
  for (int64_t c = 0; c < row.num_chunks(); ++c) {
    if (!(row.scale(chunk_largest[c]) >= threshold)) continue;
    row.load_scaled(c, z);
    for (int64_t i = 0; i < kChunk; ++i) {
      out[n] = z[i];
      n += z[i] >= threshold;
    }
  }
  return n;
}

// The k-th largest scaled logit, or -infinity where fewer are finite. The k-th largest chunk maximum is a lower bound
// for it (k values at least reach that), which leaves few candidates when k is small.
template <typename T>
float top_k_threshold(const Row<T>& row, const float* chunk_largest, int64_t k, float* candidates) {
  float bound = -FLT_MAX;
  if (k <= row.num_chunks()) {
    int64_t n = 0;
    for (int64_t c = 0; c < row.num_chunks(); ++c) {
      candidates[n] = row.scale(chunk_largest[c]);
      n += candidates[n] >= -FLT_MAX;
    }
    if (n >= k) bound = weighted_threshold(candidates, n, static_cast<double>(k), count_from);
  }
  const int64_t n = gather_from(row, chunk_largest, bound, candidates);
  return n < k ? kMasked : weighted_threshold(candidates, n, static_cast<double>(k), count_from);
}

// The value where the mass of the tokens from `from` upwards, largest first, reaches the share top_p. All tokens below
// log((1 - top_p) / vocab) together hold less than 1 - top_p of a mass that is at least 1 (the largest token's), so
// none of them is needed; one is taken off that bound for roundings.
template <typename T>
float top_p_threshold(const Row<T>& row, const float* chunk_largest, float top_p, float from, float* candidates) {
  alignas(64) float z[kChunk];
  double total = 0.0;
  for (int64_t c = 0; c < row.num_chunks(); ++c) {
    if (!(row.scale(chunk_largest[c]) >= from)) continue;
    row.load_scaled(c, z);
    total += mass_from(z, kChunk, from);
  }
  const float needed = std::log((1.0f - top_p) / static_cast<float>(row.vocab)) - 1.0f;
  const int64_t n = gather_from(row, chunk_largest, needed > from ? needed : from, candidates);
  return weighted_threshold(candidates, n, static_cast<double>(top_p) * total, mass_from);
}

template <typename T>
float threshold(const Row<T>& row, const float* chunk_largest, const Filter& filter, float* candidates) {
  float lowest = kMasked;
  if (filter.top_k > 0 && filter.top_k < row.vocab)
    lowest = top_k_threshold(row, chunk_largest, filter.top_k, candidates);
  if (filter.top_p < 1.0f) lowest = top_p_threshold(row, chunk_largest, filter.top_p, lowest, candidates);
  if (filter.min_p > 0.0f) {
    const float least = filter.min_p < 1.0f ? std::log(filter.min_p) : 0.0f;
    lowest = least > lowest ? least : lowest;
  }
  return lowest;
}

// ln(2^exponent * (1 + f)) within 3e-7 of itself for 1 + f in [sqrt(1/2), sqrt(2)], where ln(1 + f) is
// 2 atanh(f / (2 + f)), by its series: the first term left out is below 2e-9 of the sum.
inline float log_of_parts(int32_t exponent, float f) {
  const float s = f / (2.0f + f), q = s * s;
  const float series = 2.0f + q * (2.0f / 3 + q * (2.0f / 5 + q * (2.0f / 7 + q * (2.0f / 9))));
  return static_cast<float>(exponent) * 0.693147181f + s * series;
}

inline int32_t split(float x, float* mantissa) {
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 = sqrt(1/2)
  bits -= exponent << 23;
  std::memcpy(mantissa, &bits, sizeof bits);
  return exponent;
}

// Gumbel noise -ln(-ln(1 - u)) of a random word, u = (word + 0.5) / 2^32 rounded to float32 and kept below 1. Large
// noise comes from small u, where float32 is densest, so that tokens of probability 1e-9 are still drawn as often as
// they should.
inline float gumbel(uint32_t word) {
  const float rounded = static_cast<float>(word) * 0x1p-32f + 0x1p-33f;
  const float u = rounded < kBelowOne ? rounded : kBelowOne;
  float mantissa;
  int32_t exponent = split(1.0f - u, &mantissa);
  const float exponential = -log_of_parts(exponent, exponent == 0 ? -u : mantissa - 1.0f);
  exponent = split(exponential, &mantissa);
  return -log_of_parts(exponent, mantissa - 1.0f);
}

// Philox4x32-7 (Salmon, Moraes, Dror and Shaw 2011): the words of tokens [64 c, 64 c + 64), four a counter.
inline void philox_chunk(uint64_t seed, int64_t c, uint32_t* words) {
#pragma omp simd
  for (uint32_t b = 0; b < kChunk / 4; ++b) {
    uint32_t c0 = static_cast<uint32_t>(c) * (kChunk / 4) + b, c1 = 0, c2 = 0, c3 = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < 7; ++round) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(product1);
      c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(product0);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    words[4 * b] = c0, words[4 * b + 1] = c1, words[4 * b + 2] = c2, words[4 * b + 3] = c3;
  }
}

// Gumbel-max: the index of the largest scaled logit plus noise among those that reach the threshold.
template <typename T>
int64_t draw(const Row<T>& row, const float* chunk_largest, float threshold, uint64_t seed) {
  alignas(64) float z[kChunk];
  alignas(64) uint32_t words[kChunk];
  int32_t best = to_key(kMasked);
  int64_t index = -1;
  for (int64_t c = 0; c < row.num_chunks(); ++c) {
    if (!(row.scale(chunk_largest[c]) >= threshold)) continue;
    row.load_scaled(c, z);
    philox_chunk(seed, c, words);
#pragma omp simd
    for (int64_t i = 0; i < kChunk; ++i) z[i] = z[i] >= threshold ? z[i] + gumbel(words[i]) : kMasked;
    const int32_t key = largest_key(z);
    if (key > best) best = key, index = c * kChunk + first_with_key(z, key);
  }
  return index;
}

struct Parameters {
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const int64_t* seeds;
};

template <typename T>
void sample_rows(const T* logits, int64_t stride, const Parameters& p, int64_t* out, int64_t num_rows, int64_t vocab) {
  bool draws = false;
  for (int64_t r = 0; r < num_rows; ++r) draws |= p.temperature[r] > 0.0f;
  constexpr int64_t kCostOfDraw = 16;  // measured: a draw takes 8 to 40 times as long as the argmax of the same row
  parallel_items(num_rows, draws ? kCostOfDraw * vocab : vocab, [&](int64_t begin, int64_t end) {
    const int64_t num_chunks = (vocab + kChunk - 1) / kChunk;
    std::unique_ptr<float[]> buffer(draws ? new float[num_chunks + vocab + 1] : nullptr);
    float *chunk_largest = buffer.get(), *candidates = chunk_largest + num_chunks;
    for (int64_t r = begin; r < end; ++r) {
      Row<T> row{logits + r * stride, vocab};
      row.temperature = p.temperature[r];
      const bool greedy = !(row.temperature > 0.0f);
      out[r] = scan(row, greedy ? nullptr : chunk_largest);
      if (greedy || out[r] < 0) continue;
      row.largest = static_cast<float>(row.logits[out[r]]);
      const Filter filter{p.top_k[r], p.top_p[r], p.min_p[r]};
      const float lowest = threshold(row, chunk_largest, filter, candidates);
      out[r] = draw(row, chunk_largest, lowest, static_cast<uint64_t>(p.seeds[r]));
    }
  });
}

void check_sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                  const Tensor& min_p, const Tensor& seeds) {
  Check check("sample", logits);
  check.tensor("logits", logits, {"num_rows", "vocab"}, MINIVLLM_FLOATS);
  check.tensor("temperature", temperature, {"num_rows"}, {ScalarType::Float});
  check.tensor("top_k", top_k, {"num_rows"}, {ScalarType::Int});
  check.tensor("top_p", top_p, {"num_rows"}, {ScalarType::Float});
  check.tensor("min_p", min_p, {"num_rows"}, {ScalarType::Float});
  check.tensor("seeds", seeds, {"num_rows"}, {ScalarType::Long});
}

Tensor sample_cpu(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                  const Tensor& min_p, const Tensor& seeds) {
  check_sample(logits, temperature, top_k, top_p, min_p, seeds);
  const int64_t num_rows = logits.size(0);
  Tensor out = new_tensor(logits, {num_rows}, ScalarType::Long);
  const Parameters parameters{
      static_cast<const float*>(temperature.data_ptr()), static_cast<const int32_t*>(top_k.data_ptr()),
      static_cast<const float*>(top_p.data_ptr()), static_cast<const float*>(min_p.data_ptr()),
      static_cast<const int64_t*>(seeds.data_ptr())};
  dispatch_float(logits.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    sample_rows(static_cast<const T*>(logits.data_ptr()), logits.stride(0), parameters,
                static_cast<int64_t*>(out.data_ptr()), num_rows, logits.size(1));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("sample", TORCH_BOX(&sample_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

Tensor sample_cuda(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                   const Tensor& min_p, const Tensor& seeds) {
  check_sample(logits, temperature, top_k, top_p, min_p, seeds);
  const CudaScope scope(logits);
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  Tensor out = new_tensor(logits, {num_rows}, ScalarType::Long);
  Tensor workspace = new_tensor(logits, {sample_workspace_bytes(num_rows, vocab)}, ScalarType::Byte);
  const SampleArguments arguments{logits.data_ptr(),
                                  logits.stride(0),
                                  num_rows,
                                  vocab,
                                  static_cast<const float*>(temperature.data_ptr()),
                                  static_cast<const int32_t*>(top_k.data_ptr()),
                                  static_cast<const float*>(top_p.data_ptr()),
                                  static_cast<const float*>(min_p.data_ptr()),
                                  static_cast<const int64_t*>(seeds.data_ptr()),
                                  static_cast<int64_t*>(out.data_ptr()),
                                  workspace.data_ptr(),
                                  dtype_code(logits)};
  check_launch("sample", launch_sample(arguments, scope.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("sample", TORCH_BOX(&sample_cuda)); }
#endif

}  // namespace minivllm
