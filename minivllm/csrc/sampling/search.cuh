// The search for the token with the largest logit / temperature + Gumbel noise, without making most of the noise.
//
// Noise is -log(-log(1 - u)), which is less than -log(u). So one logarithm of the smaller of two random words, and the larger
// of the two logits, bound two scores from above; exact noise, which takes two long logarithms, is made only of what could
// still win against the best token that the block has found so far. Each thread's likeliest winner goes first, so that few
// others are left. Where no word at all could make a winner, no Philox is run. Bounds carry a margin for their rounding, so
// they never change a draw.
#pragma once

#include "sampling/noise.cuh"
#include "sampling/plan.h"

namespace minivllm {

constexpr int kGroups = kTokensPerThread / 4;  // of four tokens, which share one block of Philox
constexpr float kMostNoise = 33.01f;           // in units of log 2

// Raises a shared float; NaN never does.
__device__ __forceinline__ void raise(float* shared, float value) {
  if (value >= 0.0f) atomicMax(reinterpret_cast<int*>(shared), __float_as_int(value + 0.0f));
  else if (value < 0.0f) atomicMin(reinterpret_cast<unsigned*>(shared), __float_as_uint(value));
}

// The bit of the largest of four values among those whose bits are set in `among`.
__device__ __forceinline__ uint32_t bit_of_largest(const float (&values)[4], uint32_t among) {
  uint32_t bit = 0;
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((among >> i & 1) == 0 || (bit != 0 && !(values[i] > largest))) continue;
    bit = 1u << i, largest = values[i];
  }
  return bit;
}

__device__ __forceinline__ float value_of_bit(const float (&values)[4], uint32_t bit) {
  return bit == 1 ? values[0] : bit == 2 ? values[1] : bit == 4 ? values[2] : values[3];
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

  __device__ float reached() const { return *static_cast<volatile float*>(bound); }
  // False for NaN, which comes only where a logit is masked or scores overflow.
  __device__ bool loses(float most) const { return most < reached(); }
  __device__ float most_of(float logit, uint32_t word) const {
    return fmaf(logit, scale, 32.0f) - log2_approximate(static_cast<float>(word));
  }

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
    float logits[4], most[4];
    uint32_t left = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      logits[j] = group * 4 + j < vocab ? widen(row[group * 4 + j]) : -INFINITY;
      most[j] = most_of(logits[j], word_of(words, j));
      if (logits[j] >= least) left |= 1u << j;
    }
    while (left != 0) {
      const uint32_t bit = bit_of_largest(most, left);
      if (loses(value_of_bit(most, bit))) break;
      const int j = __ffs(bit) - 1;
      consider(group * 4 + j, value_of_bit(logits, bit), word_of(words, j));
      left ^= bit;
    }
  }

  // 16 tokens as vectors that lie `step` apart, v the first, with the larger logit of every pair and the largest of all; those
  // below `least` are not drawn. Returns what their scores are at most.
  __device__ __forceinline__ float visit(int v, int step, const float (&larger)[kPairs], float largest, float least) {
    constexpr int kOfVector = kVectorTokens<T> / 4;  // groups
    const auto group_of = [&](int g) { return (v + g / kOfVector * step) * kOfVector + g % kOfVector; };
    const float to_beat = reached();
    if (const float most = fmaf(largest, scale, kMostNoise); !(largest >= least) || most < to_beat) return most;
    float most[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint4 words = philox(static_cast<uint32_t>(group_of(g)), seed);
      most[g] = fmaxf(most_of(larger[2 * g], min(words.x, words.y)), most_of(larger[2 * g + 1], min(words.z, words.w)));
    }
    const float most_of_all = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
    uint32_t left = most_of_all < to_beat ? 0 : (1u << kGroups) - 1;
    while (left != 0) {
      const uint32_t bit = bit_of_largest(most, left);
      if (loses(value_of_bit(most, bit))) break;
      consider_group(group_of(__ffs(bit) - 1), least);
      left ^= bit;
    }
    return most_of_all;
  }
};

}  // namespace minivllm
