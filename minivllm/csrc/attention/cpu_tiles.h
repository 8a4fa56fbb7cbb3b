// The arithmetic of attention on one tile: transpose keys, multiply small matrices, one step of the online softmax.
// Everything is float32 on vector registers (common/simd.h), and every result is the same sequence of operations whatever the
// blocking: that makes results reproducible to the bit.
#pragma once

#include "common/simd.h"

#include <algorithm>
#include <limits>
#include <type_traits>

namespace minivllm::attention {

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

// c[r][n] = before + sum over begin <= k < end of a[r][k] * b(k)[n], for R rows and C vectors of columns. What was before is
// c[r][n], times keep[r] if keep is given; or nothing if `fresh`.
template <int R, int C, typename B>
inline void multiply_block(const float* a, int64_t lda, const B& b, int64_t begin, int64_t end, float* c, int64_t ldc,
                           bool fresh, const float* keep) {
  Vec sum[R][C] = {};
  for (int64_t k = begin; k < end; ++k) {
    const float* row = b(k);
    Vec wide[C];
#pragma GCC unroll 8
    for (int n = 0; n < C; ++n) wide[n] = load(row + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < C; ++n) sum[r][n] = multiply_add(a[r * lda + k], wide[n], sum[r][n]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int n = 0; n < C; ++n) {
      float* place = c + r * ldc + n * kLanes;
      store(place, fresh ? sum[r][n] : multiply_add(keep ? keep[r] : 1.0f, load(place), sum[r][n]));
    }
}

template <int C, typename B>
inline void multiply_columns(const float* a, int64_t lda, const B& b, int64_t begin, int64_t end, float* c, int64_t ldc,
                             bool fresh, const float* keep, int64_t rows) {
  int64_t r = 0;
  const auto block = [&](auto height) {
    multiply_block<height.value, C>(a + r * lda, lda, b, begin, end, c + r * ldc, ldc, fresh, keep ? keep + r : nullptr);
    r += height.value;
  };
  while (r + 4 <= rows) block(std::integral_constant<int, 4>());
  while (r + 2 <= rows) block(std::integral_constant<int, 2>());
  while (r < rows) block(std::integral_constant<int, 1>());
}

// c = keep * c + a b, or a b if keep is null. b(k) is row k of b: a pointer to `columns` floats, a multiple of kLanes. Sums
// run over at most kChain products before they are added up, because the rounding errors of a chain grow with its length.
template <typename B>
inline void multiply(const float* a, int64_t lda, const B& b, int64_t depth, float* c, int64_t ldc, const float* keep,
                     int64_t rows, int64_t columns) {
  constexpr int64_t kChain = 64;
  constexpr int kWide = kVectorRegisters / 8;  // 4 rows of them are half of the registers
  for (int64_t begin = 0; begin < depth; begin += kChain) {
    const int64_t end = std::min(begin + kChain, depth);
    const bool fresh = begin == 0 && keep == nullptr;
    const float* factors = begin == 0 ? keep : nullptr;
    int64_t n = 0;
    const auto shifted = [&](int64_t k) { return b(k) + n; };
    for (; n + kWide * kLanes <= columns; n += kWide * kLanes)
      multiply_columns<kWide>(a, lda, shifted, begin, end, c + n, ldc, fresh, factors, rows);
    for (; n < columns; n += kLanes)
      multiply_columns<1>(a, lda, shifted, begin, end, c + n, ldc, fresh, factors, rows);
  }
}

// What the online softmax knows of each row after some keys (Milakov and Gimelshein 2018, arXiv:1805.02867): the largest
// score, kLanes partial sums of exp(score - largest), and the values weighted by the same exponentials. A row without keys
// has the largest score -infinity and zeros. `width` is head_dim rounded up to whole vectors.
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

  // Scores of one row against `columns` keys, of which the row sees [first, visible), at least one, become exponentials.
  // Returns the factor by which what was summed before must shrink.
  [[gnu::noinline]] float add_scores(int64_t row, float* scores, int64_t first, int64_t visible, int64_t columns) {
    for (int64_t j = 0; j < first; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    for (int64_t j = visible; j < columns; ++j) scores[j] = -std::numeric_limits<float>::infinity();
    float top = largest[row];
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < columns; ++j) top = scores[j] > top ? scores[j] : top;
    const float keep = fast_exp(largest[row] - top);
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) scores[j] = fast_exp(scores[j] - top);
    Vec sum = {};
    for (int64_t j = 0; j < columns; j += kLanes) sum += load(scores + j);
    store(sums + row * kLanes, multiply_add(keep, load(sums + row * kLanes), sum));
    largest[row] = top;
    return keep;
  }

  // Adds the keys of the same row of `other`, of which there is at least one and which come after ours.
  [[gnu::noinline]] void merge(int64_t row, const RowStates& other) {
    const float ours = largest[row], theirs = other.largest[row];
    const float top = theirs > ours ? theirs : ours;
    const float a = fast_exp(ours - top), b = fast_exp(theirs - top);
    const auto add = [a, b](float* mine, const float* from) { store(mine, multiply_add(a, load(mine), load(from) * b)); };
    for (int64_t d = 0; d < width; d += kLanes) add(out + row * width + d, other.out + row * width + d);
    add(sums + row * kLanes, other.sums + row * kLanes);
    largest[row] = top;
  }

  float sum_of(int64_t row) const {
    float sum = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[row * kLanes + lane];
    return sum;
  }

  // Logarithm of the row's sum of exp(score); -infinity for a row without keys.
  float log_sum(int64_t row) const { return largest[row] + std::log(sum_of(row)); }

  // Divides a row by its sum in place; a row without keys stays 0.
  const float* finish(int64_t row) {
    const float sum = sum_of(row);
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < width; ++d) out[row * width + d] *= scale;
    return out + row * width;
  }
};

}  // namespace minivllm::attention
