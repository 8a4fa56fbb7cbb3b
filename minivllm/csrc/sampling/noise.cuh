// The random numbers of `sample` on the device: Philox4x32-7 and the Gumbel noise made of its words, as ops/sample.py says.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace minivllm {

// As an instruction, because the compiler makes two of the product's upper half otherwise.
__device__ __forceinline__ void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  asm("mov.b64 {%0, %1}, %2;" : "=r"(low), "=r"(high) : "l"(product));
}

// Philox4x32-7 (Salmon, Moraes, Dror and Shaw 2011) with counter (block, 0, 0, 0): the words of tokens [4 block, 4 block + 4).
__device__ __forceinline__ uint4 philox(uint32_t block, uint64_t seed) {
  uint32_t c0 = block, c1 = 0, c2 = 0, c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    uint32_t high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

__device__ __forceinline__ uint32_t word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}

// ln(2^exponent * (1 + f)) for 1 + f in [sqrt(1/2), sqrt(2)], where ln(1 + f) is 2 atanh(f / (2 + f)), by its series.
__device__ __forceinline__ float log_of_parts(int exponent, float f) {
  const float s = f / (2.0f + f), q = s * s;
  const float series = 2.0f + q * (2.0f / 3 + q * (2.0f / 5 + q * (2.0f / 7 + q * (2.0f / 9))));
  return static_cast<float>(exponent) * 0.693147181f + s * series;
}

__device__ __forceinline__ int split_float(float x, float* mantissa) {
  const int bits = __float_as_int(x), exponent = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 = sqrt(1/2)
  *mantissa = __int_as_float(bits - (exponent << 23));
  return exponent;
}

// Gumbel noise -ln(-ln(1 - u)) of a random word, u = (word + 0.5) / 2^32 rounded to float32 and kept below 1.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float u = fminf(static_cast<float>(word) * 0x1p-32f + 0x1p-33f, 1.0f - 0x1p-24f);
  float mantissa;
  int exponent = split_float(1.0f - u, &mantissa);
  const float exponential = -log_of_parts(exponent, exponent == 0 ? -u : mantissa - 1.0f);
  exponent = split_float(exponential, &mantissa);
  return -log_of_parts(exponent, mantissa - 1.0f);
}

}  // namespace minivllm
