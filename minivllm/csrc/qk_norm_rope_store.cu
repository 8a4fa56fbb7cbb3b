// qk_norm_rope_store on CUDA: one pass over a token's q, k and v. A block takes one token (and some of its heads); 1 to 32
// threads share a head and hold all of it in registers between the sum of squares and the rotation, each with 16 bytes of both
// of its halves. Floor: 2 * (num_heads + 2 num_kv_heads) * head_dim * bytes / bandwidth a token, or the launch for few tokens.
#include "common/rotary.cuh"
#include "qk_norm_rope_store.h"

namespace minivllm {
namespace {

constexpr int kManyBlocks = 4;  // of kMaxWarps on one multiprocessor, where there are many tokens

enum { kQueries, kKeys, kValues };  // indices of the sides

// The heads of q, k or v: where they come from, where they go, and which norm they get.
struct Side {
  HeadLayout from;
  int first;             // of all heads, which are q's, then k's, then v's
  const void* weight;    // null: no norm
  void* cache;           // null for q, which is written in place
  int64_t block_stride;  // of the cache
};

struct Problem {
  Side sides[3];
  RotaryTable table;
  const int64_t* slots;
  int num_heads;
  int q_warps, kv_warps;  // that work on q, and on k; v has as many of its own where a thread has one head
  int block_shift;        // log2 of block_size, which is a power of two
  int head_dim;
  int lane_bits;          // log2 of the threads of a head
  float inverse_head_dim, eps;
};

__device__ __forceinline__ int side_of(const Problem& p, int head) {
  return (head >= p.sides[1].first) + (head >= p.sides[2].first);
}

template <typename T, int N>
__device__ __forceinline__ float sum_of_squares(const Vec<T, N>& v) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    float wide[2];
    widen_two(v.data + j, wide);
    sum = fmaf(wide[1], wide[1], fmaf(wide[0], wide[0], sum));
  }
  return sum;
}

// Sums of kCount values over the threads of a head, by halves, quarters, ...
template <int kCount>
__device__ __forceinline__ void lanes_sum(float (&v)[kCount], int lane_bits) {
#pragma unroll
  for (int bit = 4; bit >= 0; --bit) {
    if (bit >= lane_bits) continue;
#pragma unroll
    for (int i = 0; i < kCount; ++i) v[i] += __shfl_xor_sync(0xffffffffu, v[i], 1 << bit);
  }
}

// Rounded before and after the product with the weight, as rms_norm does.
template <typename T, int N>
__device__ __forceinline__ void normalise(Vec<T, N>& v, float scale, Vec<T, N> weight) {
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    float wide[2];
    widen_two(v.data + j, wide);
    narrow_two(wide[0] * scale, wide[1] * scale, v.data + j);
  }
  v = multiply_all(v, weight);
}

__device__ __forceinline__ float inverse_rms(const Problem& p, float sum) {
  return rsqrtf(fmaf(sum, p.inverse_head_dim, p.eps));
}

// Unit u of the heads wanted[i] of the sides kSides, in vectors of 16 bytes, all loaded before the first is used. With few tokens
// (one head a thread) time is latency, so the row of the table is read as soon as the position is known; with many it is read late,
// when fewer registers are needed.
template <typename T, int N, bool kInterleaved, int... kSides>
__device__ __forceinline__ void work(const Problem& p, int u, const int (&wanted)[sizeof...(kSides)]) {
  constexpr int kHeads = sizeof...(kSides), side[] = {kSides...};
  const uint32_t token = blockIdx.x;
  const bool inside = 2 * N * u < p.head_dim;  // other threads still take part in the sums
  const UnitPlace place = place_of<N, kInterleaved>(u, p.table.rotary_dim);
  int head[kHeads];
  T* source[kHeads];
  Unit<T, N> units[kHeads], weight;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const HeadLayout& from = p.sides[side[i]].from;
    head[i] = min(wanted[i], from.count - 1);  // beyond the last head it is worked on again, which needs no branches
    source[i] = near_head<T>(from, token, head[i]);
    prefetch_early(source[i] + place.a), prefetch_early(source[i] + place.b);
  }
  wait_for_predecessors();
  let_dependents_launch();
  const uint32_t position = position_of(p.table, token);
  const int64_t slot = p.slots[token];
#pragma unroll
  for (int i = 0; i < kHeads; ++i)
    if (inside) units[i] = load_unit<T, N>(source[i], place);
  const auto* weights = static_cast<const T*>(p.sides[side[0]].weight);  // of all the heads that have a norm
  if (inside && weights != nullptr) weight = load_unit<T, N>(weights, place);
  Turn<N> turn;
  if (kHeads == 1 && inside && place.turns) turn = load_turn<N>(p.table, position, u);
  if (side[0] != kValues && weights != nullptr) {
    constexpr int kNormed = side[kHeads - 1] == kValues ? 1 : kHeads;
    // The order of rms_norm for a power of two of vectors: halves, quarters, ... are added first.
    float sums[kInterleaved ? 2 * kNormed : kNormed];
#pragma unroll
    for (int i = 0; i < kNormed; ++i) {
      const float a = inside ? sum_of_squares(units[i].part[0]) : 0.0f, b = inside ? sum_of_squares(units[i].part[1]) : 0.0f;
      if constexpr (kInterleaved)
        sums[i] = a, sums[kNormed + i] = b;
      else
        sums[i] = a + b;
    }
    lanes_sum(sums, p.lane_bits);
#pragma unroll
    for (int i = 0; i < kNormed; ++i) {
      float sum = sums[i];
      if constexpr (kInterleaved) sum += sums[kNormed + i];
      const float scale = inverse_rms(p, sum);
      normalise(units[i].part[0], scale, weight.part[0]);
      normalise(units[i].part[1], scale, weight.part[1]);
    }
  }
  if (kHeads > 1 && inside && place.turns) turn = load_turn<N>(p.table, position, u);
  const uint32_t block = static_cast<uint32_t>(slot >> p.block_shift), offset = slot & ((1 << p.block_shift) - 1);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (!inside || wanted[i] != head[i]) continue;
    if (place.turns && side[i] != kValues) units[i] = rotate<kInterleaved>(units[i], turn);
    if (side[i] == kQueries) {
      store_unit(units[i], source[i], place);
    } else if (slot >= 0) {
      const Side& to = p.sides[side[i]];
      const uint32_t row = (head[i] << p.block_shift) + offset;
      const int64_t begin = wide_product(block, to.block_stride) + wide_product(row, p.head_dim);
      store_unit(units[i], static_cast<T*>(to.cache) + begin, place);
    }
  }
}

// A warp works on q alone, or on k and v, so the compiler knows which side a head is of: a third fewer instructions than where each
// thread asks. A thread has kHeads heads: one, or two of q, or one of k and the same of v.
template <typename T, int N, bool kInterleaved, int kHeads>
__global__ void __launch_bounds__(32 * kMaxWarps, kHeads == 1 ? 1 : kManyBlocks)
    vector_kernel(const __grid_constant__ Problem p) {
  const int u = threadIdx.x & ((1 << p.lane_bits) - 1);
  const int y = __shfl_sync(0xffffffffu, threadIdx.y, 0);  // tells the compiler that it is the same in all threads of a warp
  const int q_warp = blockIdx.y * blockDim.y + y, k_warp = q_warp - p.q_warps, v_warp = k_warp - p.kv_warps;
  const auto head_of = [&](int warp) { return (warp * 32 + static_cast<int>(threadIdx.x)) >> p.lane_bits; };
  if (k_warp < 0) {
    const int head = head_of(q_warp);
    if constexpr (kHeads == 1) work<T, N, kInterleaved, kQueries>(p, u, {head});
    if constexpr (kHeads == 2) work<T, N, kInterleaved, kQueries, kQueries>(p, u, {head, head + (p.q_warps * 32 >> p.lane_bits)});
  } else if (v_warp < 0) {
    const int head = head_of(k_warp);
    if constexpr (kHeads == 1) work<T, N, kInterleaved, kKeys>(p, u, {head});
    if constexpr (kHeads == 2) work<T, N, kInterleaved, kKeys, kValues>(p, u, {head, head});
  } else if (kHeads == 1 && v_warp < p.kv_warps) {
    work<T, N, kInterleaved, kValues>(p, u, {head_of(v_warp)});
  }
}

// Any sizes and addresses: a warp takes one head and reads it twice.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(32 * kMaxWarps) element_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x;
  const int head = blockIdx.y * blockDim.y + threadIdx.y;
  if (head >= p.num_heads) return;
  const int which = side_of(p, head);
  const Side& side = p.sides[which];
  const int index = head - side.first;
  T *source = any_head<T>(side.from, token, index), *target = source;
  const T* weight = static_cast<const T*>(side.weight);
  if (which > 0) {
    const int64_t slot = p.slots[token], row = (int64_t{index} << p.block_shift) + (slot & ((1 << p.block_shift) - 1));
    if (slot < 0) return;
    target = static_cast<T*>(side.cache) + (slot >> p.block_shift) * side.block_stride + row * p.head_dim;
  }
  float sum = 0.0f;
  if (weight != nullptr)
    for (int i = threadIdx.x; i < p.head_dim; i += 32) sum += __fmul_rn(widen(source[i]), widen(source[i]));
  const float scale = inverse_rms(p, warp_sum(sum));
  const auto load = [&](int i) {
    const T value = source[i];
    return weight == nullptr ? value : narrow<T>(widen(narrow<T>(widen(value) * scale)) * widen(weight[i]));
  };
  const int rotary_dim = which < 2 ? p.table.rotary_dim : 0;
  const uint32_t position = position_of(p.table, token);
  for (int u = threadIdx.x; u < rotary_dim / 2; u += 32) {
    const UnitPlace place = place_of<1, kInterleaved>(u, rotary_dim);
    const Unit<T, 1> unit{{{{load(place.a)}}, {{load(place.b)}}}};
    store_unit(rotate<kInterleaved>(unit, load_turn<1>(p.table, position, u)), target, place);
  }
  for (int i = rotary_dim + threadIdx.x; i < p.head_dim; i += 32) target[i] = load(i);
}

template <typename T, bool kInterleaved>
const char* launch(Problem p, bool wide, int64_t num_tokens, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  p.lane_bits = wide ? lane_bits_for(p.head_dim / (2 * N)) : 5;
  const bool two = wide && num_tokens * (int64_t{p.num_heads} << p.lane_bits) > kFewThreads;  // heads a thread
  const auto warps_for = [&](int64_t heads) { return static_cast<int>(((heads << p.lane_bits) + 31) / 32); };
  const int q_heads = p.sides[kQueries].from.count;
  p.q_warps = warps_for(two ? (q_heads + 1) / 2 : q_heads);
  p.kv_warps = warps_for(p.sides[kKeys].from.count);
  auto* kernel = !wide ? element_kernel<T, kInterleaved>
                 : two ? vector_kernel<T, N, kInterleaved, 2>
                       : vector_kernel<T, N, kInterleaved, 1>;
  return launch_on_tokens(kernel, p, num_tokens, wide ? p.q_warps + (two ? 1 : 2) * p.kv_warps : p.num_heads, stream);
}

// Whether every head is made of whole units, no more than a warp has threads, at 16-byte addresses.
bool fits_vectors(const Problem& p, int elements) {
  const auto at_16 = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  bool fits = p.head_dim % (2 * elements) == 0 && p.head_dim <= 64 * elements && table_fits_vectors(p.table, elements);
  for (const Side& side : p.sides)
    fits = fits && heads_fit_vectors(side.from, elements) && at_16(side.weight) && at_16(side.cache) &&
           side.block_stride % elements == 0 && fits_32_bits(side.block_stride);
  return fits;
}

}  // namespace

const char* launch_qk_norm_rope_store(const QkNormRopeStore& x, int64_t num_tokens, DtypeCode dtype, void* stream) {
  const int num_heads = x.q.count + x.k.count + x.v.count;
  if (num_tokens == 0 || x.head_dim == 0 || num_heads == 0) return nullptr;
  int shift = 0;
  while ((1 << shift) < x.block_size) ++shift;
  const Side q{x.q, 0, x.q_weight, nullptr, 0};
  const Side k{x.k, x.q.count, x.k_weight, x.k_cache, x.k_block_stride};
  const Side v{x.v, x.q.count + x.k.count, nullptr, x.v_cache, x.v_block_stride};
  const RotaryTable table{x.positions, x.wide_positions, x.table, x.table_stride, x.rotary_dim};
  const Problem p{{q, k, v}, table, x.slots, num_heads, 0, 0, shift, x.head_dim, 0, 1.0f / static_cast<float>(x.head_dim), x.eps};
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool wide = fits_vectors(p, 16 / sizeof(T));
    const auto s = static_cast<cudaStream_t>(stream);
    return x.interleaved ? launch<T, true>(p, wide, num_tokens, s) : launch<T, false>(p, wide, num_tokens, s);
  });
}

}  // namespace minivllm
