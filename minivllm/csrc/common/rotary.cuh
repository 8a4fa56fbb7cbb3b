// What apply_rope and qk_norm_rope_store share: what one thread holds of a head while it turns by its position, and how threads are
// dealt to the heads of tokens.
#pragma once

#include "common/convert.cuh"
#include "common/launch.cuh"
#include "common/rows.h"

namespace minivllm {

constexpr int kMaxWarps = 8;  // of a block

// Positions of the tokens, int32 or int64, and the table of cosines and sines they choose from: [max_position, rotary_dim]
// float32, each row half cosines, then half sines.
struct RotaryTable {
  const void* positions;
  bool wide_positions;
  const float* data;
  int64_t stride;
  int rotary_dim;
};

// Of an int64 the lower half is read: no table has 2^32 rows. In the order of load_in_order.
__device__ __forceinline__ uint32_t position_of(const RotaryTable& table, int64_t token) {
  const auto* place = static_cast<const uint32_t*>(table.positions) + (token << table.wide_positions);
  uint32_t position;
  asm volatile("ld.relaxed.cta.global.u32 %0, [%1];" : "=r"(position) : "l"(place));
  return position;
}

// Unit u of a head is two vectors that turn together: elements u * N and half + u * N of the two halves (GPT-NeoX), or 2 N
// adjacent elements (GPT-J). Both ways it holds the pairs u * N .. (u + 1) * N - 1, so both read the same piece of the table.
// Units beyond the rotary part are 2 N adjacent elements.
template <typename T, int N>
struct Unit {
  Vec<T, N> part[2];
};

struct UnitPlace {
  int a, b;  // offsets in the head
  bool turns;
};

template <int N, bool kInterleaved>
__device__ __forceinline__ UnitPlace place_of(int unit, int rotary_dim) {
  const bool turns = 2 * N * unit < rotary_dim;
  if (kInterleaved || !turns) return {2 * N * unit, 2 * N * unit + N, turns};
  return {N * unit, rotary_dim / 2 + N * unit, turns};
}

template <typename T, int N>
__device__ __forceinline__ Unit<T, N> load_unit(const T* head, const UnitPlace& place) {
  return {{load_in_order<T, N>(head + place.a), load_in_order<T, N>(head + place.b)}};
}

template <typename T, int N>
__device__ __forceinline__ void store_unit(const Unit<T, N>& unit, T* head, const UnitPlace& place) {
  *reinterpret_cast<Vec<T, N>*>(head + place.a) = unit.part[0];
  *reinterpret_cast<Vec<T, N>*>(head + place.b) = unit.part[1];
}

// Cosines and sines of one unit.
template <int N>
struct Turn {
  float cos[N], sin[N];
};

template <int N>
__device__ __forceinline__ void load_floats(const float* source, float (&target)[N]) {
  constexpr int kWidth = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kWidth) {
    const auto v = *reinterpret_cast<const Vec<float, kWidth>*>(source + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) target[i + j] = v.data[j];
  }
}

template <int N>
__device__ __forceinline__ Turn<N> load_turn(const RotaryTable& table, uint32_t position, int unit) {
  Turn<N> turn;
  const float* row = table.data + wide_product(position, table.stride);
  load_floats<N>(row + N * unit, turn.cos);
  load_floats<N>(row + table.rotary_dim / 2 + N * unit, turn.sin);
  return turn;
}

// (a cos - b sin, b cos + a sin). The roundings are written out, so that every kernel gives the same bits.
__device__ __forceinline__ void turn_pair(float& a, float& b, float cos, float sin) {
  const float first = fmaf(a, cos, -__fmul_rn(b, sin));
  b = fmaf(b, cos, __fmul_rn(a, sin));
  a = first;
}

// Rounded once. Two elements at a time, to need few registers.
template <bool kInterleaved, typename T, int N>
__device__ __forceinline__ Unit<T, N> rotate(const Unit<T, N>& unit, const Turn<N>& turn) {
  Unit<T, N> result;
  float a[2], b[2];
  if constexpr (N == 1) {
    a[0] = widen(unit.part[0].data[0]), b[0] = widen(unit.part[1].data[0]);
    turn_pair(a[0], b[0], turn.cos[0], turn.sin[0]);
    result = {{{{narrow<T>(a[0])}}, {{narrow<T>(b[0])}}}};
  } else if constexpr (kInterleaved) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int part = 2 * j / N, i = 2 * j % N;
      widen_two(unit.part[part].data + i, a);
      turn_pair(a[0], a[1], turn.cos[j], turn.sin[j]);
      narrow_two(a[0], a[1], result.part[part].data + i);
    }
  } else {
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      widen_two(unit.part[0].data + j, a);
      widen_two(unit.part[1].data + j, b);
      turn_pair(a[0], b[0], turn.cos[j], turn.sin[j]);
      turn_pair(a[1], b[1], turn.cos[j + 1], turn.sin[j + 1]);
      narrow_two(a[0], a[1], result.part[0].data + j);
      narrow_two(b[0], b[1], result.part[1].data + j);
    }
  }
  return result;
}

// Whether units of 16-byte vectors fit: sizes, strides and addresses of heads of head_dim elements and of the table.
inline bool heads_fit_vectors(const HeadLayout& heads, int64_t elements) {
  return reinterpret_cast<uintptr_t>(heads.data) % 16 == 0 && heads.token_stride % elements == 0 &&
         heads.head_stride % elements == 0 && fits_32_bits(heads.token_stride) && fits_32_bits(heads.head_stride);
}

inline bool table_fits_vectors(const RotaryTable& table, int64_t elements) {
  return reinterpret_cast<uintptr_t>(table.data) % 16 == 0 && table.stride % 4 == 0 && fits_32_bits(table.stride) &&
         table.rotary_dim % (2 * elements) == 0;
}

// log2 of how many threads of a warp share a head of n units: a power of two, at least n if 32 are.
inline int lane_bits_for(int64_t n) {
  int bits = 0;
  while (bits < 5 && (1 << bits) < n) ++bits;
  return bits;
}

// Blocks (x, y) of warps (threadIdx.y): token x, and of its `warps` those from y * blockDim.y on.
template <typename Problem>
const char* launch_on_tokens(void (*kernel)(Problem), const Problem& p, int64_t num_tokens, int64_t warps, cudaStream_t stream) {
  const int64_t chunks = (warps + kMaxWarps - 1) / kMaxWarps;
  if (num_tokens > 2147483647 || chunks > 65535) return "too many tokens or heads";
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>(chunks)),
                           dim3(32, static_cast<unsigned>((warps + chunks - 1) / chunks)), 0, stream, p);
}

}  // namespace minivllm
