// The arithmetic of attention on one tile: transpose keys, multiply small matrices, one step of the online softmax.
// Everything is float32 on vectors of the compiler (GCC and Clang `vector_size`), so accumulators stay in registers without
// intrinsics. Every result is one chain of operations in the order of keys and head dimensions, whatever the blocking.
#pragma once

#include "common/cpu.h"

#include <algorithm>
#include <limits>

namespace minivllm::attention {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kVectorRegisters = 32;
#else
constexpr int kLanes = 4, kVectorRegisters = 16;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// out[d * ld + j] = rows[j][d] for j < 8 and d < dim.
inline void transpose_8_rows(const float* const* rows, int64_t dim, float* out, int64_t ld) {
  int64_t d = 0;
#if defined(__AVX__)
  for (; d + 4 <= dim; d += 4) {
    __m256 a[4];  // a[i]: elements d .. d+3 of row i, then of row i + 4
    for (int i = 0; i < 4; ++i)
      a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + d)), _mm_loadu_ps(rows[i + 4] + d), 1);
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(a[0], a[1]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(a[0], a[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(a[2], a[3]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(a[2], a[3]));
    float* column = out + d * ld;
    _mm256_storeu_ps(column, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
    _mm256_storeu_ps(column + ld, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
    _mm256_storeu_ps(column + 2 * ld, _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)));
    _mm256_storeu_ps(column + 3 * ld, _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)));
  }
#endif
  for (; d < dim; ++d)
    for (int j = 0; j < 8; ++j) out[d * ld + j] = rows[j][d];
}

// c[r][n] = (keep ? keep[r] * c[r][n] : 0) + sum over k < depth of a[r][k] * b(k)[n], for R rows and C vectors of columns.
template <int R, int C, typename B>
inline void multiply_block(const float* a, int64_t lda, const B& b, int64_t depth, float* c, int64_t ldc, const float* keep) {
  Vec sum[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < C; ++n) sum[r][n] = keep ? load(c + r * ldc + n * kLanes) * keep[r] : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    const float* row = b(k);
    Vec wide[C];
#pragma GCC unroll 8
    for (int n = 0; n < C; ++n) wide[n] = load(row + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < C; ++n) sum[r][n] += a[r * lda + k] * wide[n];
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < C; ++n) store(c + r * ldc + n * kLanes, sum[r][n]);
}

template <int C, typename B>
inline void multiply_columns(const float* a, int64_t lda, const B& b, int64_t depth, float* c, int64_t ldc,
                             const float* keep, int64_t rows) {
  int64_t r = 0;
  const auto kept = [&] { return keep ? keep + r : nullptr; };
  for (; r + 4 <= rows; r += 4) multiply_block<4, C>(a + r * lda, lda, b, depth, c + r * ldc, ldc, kept());
  for (; r + 2 <= rows; r += 2) multiply_block<2, C>(a + r * lda, lda, b, depth, c + r * ldc, ldc, kept());
  for (; r < rows; ++r) multiply_block<1, C>(a + r * lda, lda, b, depth, c + r * ldc, ldc, kept());
}

// The product for `columns` columns, a multiple of kLanes. b(k) is row k of b: a pointer to `columns` floats.
template <typename B>
inline void multiply(const float* a, int64_t lda, const B& b, int64_t depth, float* c, int64_t ldc, const float* keep,
                     int64_t rows, int64_t columns) {
  constexpr int kWide = kVectorRegisters / 8;  // 4 rows of them are half of the registers
  int64_t n = 0;
  const auto shifted = [&](int64_t k) { return b(k) + n; };
  for (; n + kWide * kLanes <= columns; n += kWide * kLanes)
    multiply_columns<kWide>(a, lda, shifted, depth, c + n, ldc, keep, rows);
  for (; n < columns; n += kLanes) multiply_columns<1>(a, lda, shifted, depth, c + n, ldc, keep, rows);
}

// What the online softmax knows of each row after some keys (Milakov and Gimelshein 2018, arXiv:1805.02867): the largest score,
// kLanes partial sums of exp(score - largest), and the values weighted by the same exponentials. A row without keys has the
// largest score -infinity and zeros. `width` is head_dim rounded up to whole vectors.
struct RowStates {
  float *out, *sums, *largest;
  int64_t width;

  static int64_t size(int64_t rows, int64_t width) { return rows * (width + kLanes) + round_up(rows, kLanes); }

  RowStates(float* memory, int64_t rows, int64_t width)
      : out(memory), sums(out + rows * width), largest(sums + rows * kLanes), width(width) {}

  void clear(int64_t rows) {
    std::fill_n(out, rows * width, 0.0f);
    std::fill_n(sums, rows * kLanes, 0.0f);
    std::fill_n(largest, rows, -std::numeric_limits<float>::infinity());
  }

  // Scores of one row against `columns` keys, of which the row sees the first `visible` > 0, become exponentials. Returns
  // the factor by which what was summed before must shrink.
  float add_scores(int64_t row, float* scores, int64_t visible, int64_t columns) {
    for (int64_t j = visible; j < columns; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    float top = largest[row];
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < columns; ++j) top = scores[j] > top ? scores[j] : top;
    const float keep = fast_exp(largest[row] - top);
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) scores[j] = fast_exp(scores[j] - top);
    Vec sum = load(sums + row * kLanes) * keep;
    for (int64_t j = 0; j < columns; j += kLanes) sum += load(scores + j);
    store(sums + row * kLanes, sum);
    largest[row] = top;
    return keep;
  }

  // Adds the keys of the same row of `other`, of which there is at least one and which come after ours.
  void merge(int64_t row, const RowStates& other) {
    const float ours = largest[row], theirs = other.largest[row];
    const float top = theirs > ours ? theirs : ours;
    const float a = fast_exp(ours - top), b = fast_exp(theirs - top);
    for (int64_t d = 0; d < width; d += kLanes)
      store(out + row * width + d, load(out + row * width + d) * a + load(other.out + row * width + d) * b);
    store(sums + row * kLanes, load(sums + row * kLanes) * a + load(other.sums + row * kLanes) * b);
    largest[row] = top;
  }

  // Divides a row by its sum in place; a row without keys stays 0.
  const float* finish(int64_t row) {
    float sum = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[row * kLanes + lane];
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < width; ++d) out[row * width + d] *= scale;
    return out + row * width;
  }
};

}  // namespace minivllm::attention
