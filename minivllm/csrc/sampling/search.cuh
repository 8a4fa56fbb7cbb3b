// The search for the token with the largest logit / temperature + Gumbel noise, without making most of the noise.
//
// Noise costs ten rounds of Philox for four tokens and two logarithms a token. But noise beats t exactly when
// u < 1 - exp(-exp(-t)), which is less than exp(-t): so one exponential of the largest of 16 logits bounds the random words that
// could still win against the block's best token so far. Where even the smallest word is too large, no Philox is run at all, and
// logarithms are taken only of words below the bound. The bound carries a margin for its rounding, so it never changes a draw.
#pragma once

#include "sampling/noise.cuh"
#include "sampling/plan.h"

namespace minivllm {

constexpr float kLog2e = 1.44269504f;

__device__ __forceinline__ float exp2_approximate(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Raises a shared float; NaN never does.
__device__ __forceinline__ void raise(float* shared, float value) {
  if (value >= 0.0f) atomicMax(reinterpret_cast<int*>(shared), __float_as_int(value + 0.0f));
  else if (value < 0.0f) atomicMin(reinterpret_cast<unsigned*>(shared), __float_as_uint(value));
}

// One row, searched by the threads of one block. Scores are in units of log 2 and relative to `origin`, good enough to tell what
// cannot win.
template <typename T>
struct Search {
  const T* row;
  int vocab;
  uint64_t seed;
  double inverse_temperature;
  float scale;
  float* bound;  // shared: a score that some token of the block is known to reach, first -infinity
  float origin = 0.0f;
  float least = -INFINITY;  // smaller logits are not drawn
  Candidate best{-INFINITY, 0.0f, -1, 0};

  __device__ Search(const T* row, int vocab, uint64_t seed, float temperature, float* bound)
      : row(row), vocab(vocab), seed(seed), inverse_temperature(1.0 / static_cast<double>(temperature)),
        scale(fminf(kLog2e / temperature, kLargestFloat)), bound(bound) {}

  // 32 + log2 of the share of random words that could win; not above -1 where none can.
  __device__ float chances(float logit) const {
    return fmaf(logit - origin, scale, 32.0f - *static_cast<volatile float*>(bound));
  }
  static __device__ uint32_t largest_word(float chances) { return __float2uint_ru(exp2_approximate(chances)); }
  static __device__ bool hopeless(float chances) { return !(chances > -1.02f); }
  static __device__ uint32_t smallest(const uint4& words) { return min(min(words.x, words.y), min(words.z, words.w)); }

  __device__ void consider(int token, float logit, uint32_t word) {
    const Candidate candidate{logit, gumbel(word), token, 0};
    if (beats(candidate, best, inverse_temperature)) best = candidate;
    const float score = fmaf(logit - origin, scale, candidate.noise * kLog2e);
    const float reached = score - (2e-4f + 2e-6f * fabsf(score));
    if (reached > *static_cast<volatile float*>(bound)) raise(bound, reached);
  }

  // Four tokens with their random words. Rare, so it reads the logits again.
  __device__ void consider_four(int first, const uint4& words) {
#pragma unroll 1
    for (int j = 0; j < 4 && first + j < vocab; ++j) {
      const float logit = widen(row[first + j]);
      const float chance = chances(logit);
      const uint32_t word = word_of(words, j);
      if (logit >= least && !hopeless(chance) && word <= largest_word(chance)) consider(first + j, logit, word);
    }
  }

  // 16 tokens: kVectors vectors that lie `step` apart, with the largest logit of each.
  __device__ __forceinline__ void visit(int v, int step, const float (&largest)[kVectors<T>]) {
    constexpr int kGroups = kVectorTokens<T> / 4;  // of four tokens in a vector
    float top = largest[0];
#pragma unroll
    for (int u = 1; u < kVectors<T>; ++u) top = fmaxf(top, largest[u]);
    const float chance = chances(top);
    if (!(top >= least) || hopeless(chance)) return;
    uint4 words[kTokensPerThread / 4];
    uint32_t lowest = 0xffffffffu;
#pragma unroll
    for (int g = 0; g < kTokensPerThread / 4; ++g) {
      words[g] = philox(static_cast<uint32_t>((v + g / kGroups * step) * kGroups + g % kGroups), seed);
      lowest = min(lowest, smallest(words[g]));
    }
    if (lowest > largest_word(chance)) return;
#pragma unroll
    for (int g = 0; g < kTokensPerThread / 4; ++g) {
      const float chance_of_vector = chances(largest[g / kGroups]);
      if (!hopeless(chance_of_vector) && smallest(words[g]) <= largest_word(chance_of_vector))
        consider_four(((v + g / kGroups * step) * kGroups + g % kGroups) * 4, words[g]);
    }
  }
};

}  // namespace minivllm
