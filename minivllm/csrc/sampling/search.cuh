// The search for the token with the largest logit / temperature + Gumbel noise, without making most of the noise.
//
// Noise beats t exactly when u < 1 - exp(-exp(-t)), which is less than exp(-t): so one exponential of the larger of two logits
// bounds the random words that could still win against the block's best token so far. Where the smallest word of all could not, no
// Philox is run, and logarithms are taken only of words below the bound. The bound carries a margin for its rounding, so it never
// changes a draw.
#pragma once

#include "sampling/noise.cuh"
#include "sampling/plan.h"

namespace minivllm {

// Raises a shared float; NaN never does.
__device__ __forceinline__ void raise(float* shared, float value) {
  if (value >= 0.0f) atomicMax(reinterpret_cast<int*>(shared), __float_as_int(value + 0.0f));
  else if (value < 0.0f) atomicMin(reinterpret_cast<unsigned*>(shared), __float_as_uint(value));
}

// One row, searched by the threads of one block. Scores are in units of log 2, good enough to tell what cannot win.
template <typename T>
struct Search {
  const T* row;
  int vocab;
  uint64_t seed;
  double inverse_temperature;
  float scale;
  float* bound;  // shared: a score that some token of the block is known to reach, first -infinity
  Candidate best{-INFINITY, 0.0f, -1, 0};

  __device__ Search(const T* row, int vocab, uint64_t seed, float temperature, float* bound)
      : row(row), vocab(vocab), seed(seed), inverse_temperature(1.0 / static_cast<double>(temperature)),
        scale(scale_of(temperature)), bound(bound) {}

  // 32 + log2 of the share of random words that could win; NaN where scores overflow, and then all could.
  __device__ float chance(float logit, float to_beat) const { return fmaf(logit, scale, 32.0f - to_beat); }
  static __device__ bool hopeless(float chance) { return chance <= -1.02f; }
  static __device__ bool loses(uint32_t word, float chance) { return static_cast<float>(word) > exp2_approximate(chance); }
  __device__ float reached() const { return *static_cast<volatile float*>(bound); }

  __device__ void consider(int token, float logit, uint32_t word) {
    const Candidate candidate{logit, gumbel(word), token, 0};
    if (beats(candidate, best, inverse_temperature)) best = candidate;
    const float score = fmaf(logit, scale, candidate.noise * kLog2e);
    const float certain = score - (2e-4f + 2e-6f * fabsf(score));
    if (certain > reached()) raise(bound, certain);
  }

  // The tokens of a group from the logit `least` upwards. Rare, so it reads the logits and makes the words again.
  __device__ void consider_group(int group, float least) {
    const uint4 words = philox(static_cast<uint32_t>(group), seed);
    const float to_beat = reached();
    uint32_t tokens = 0;  // as bits
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float logit = group * 4 + j < vocab ? widen(row[group * 4 + j]) : -INFINITY;
      if (logit >= least && !loses(word_of(words, j), chance(logit, to_beat))) tokens |= 1u << j;
    }
    for (; tokens != 0; tokens &= tokens - 1) {
      const int j = __ffs(tokens) - 1;
      consider(group * 4 + j, widen(row[group * 4 + j]), word_of(words, j));
    }
  }

  // The groups, as bits, that may hold a winner.
  template <typename GroupOf>
  __device__ __forceinline__ uint32_t possible(const GroupOf& group_of, const float (&larger)[kPairs], float largest) const {
    const float to_beat = reached();
    if (hopeless(chance(largest, to_beat))) return 0;
    uint32_t groups = 0;
#pragma unroll
    for (int g = 0; g < kPairs / 2; ++g) {
      const uint4 words = philox(static_cast<uint32_t>(group_of(g)), seed);
      const bool of_first = !loses(min(words.x, words.y), chance(larger[2 * g], to_beat));
      const bool of_second = !loses(min(words.z, words.w), chance(larger[2 * g + 1], to_beat));
      if (of_first | of_second) groups |= 1u << g;
    }
    return groups;
  }

  // 16 tokens as vectors that lie `step` apart, v the first, with the larger logit of every pair and the largest of all; those below
  // `least` are not drawn. `first` looks first at the thread's likeliest token, which gives the bound a good start.
  __device__ __forceinline__ void visit(int v, int step, const float (&larger)[kPairs], float largest, float least, bool first) {
    constexpr int kOfVector = kVectorTokens<T> / 4;  // groups
    const auto group_of = [&](int g) { return (v + g / kOfVector * step) * kOfVector + g % kOfVector; };
    if (!(largest >= least)) return;
#pragma unroll 1
    for (int round = first ? 0 : 1; round < 2; ++round) {
      uint32_t groups = 0;
      if (round == 0) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) groups = larger[p] == largest ? 1u << p / 2 : groups;
      } else {
        groups = possible(group_of, larger, largest);
      }
      for (; groups != 0; groups &= groups - 1) consider_group(group_of(__ffs(groups) - 1), round == 0 ? largest : least);
    }
  }
};

}  // namespace minivllm
