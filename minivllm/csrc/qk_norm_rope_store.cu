// qk_norm_rope_store on CUDA: one pass over a token's q, k and v. A block takes one token (and some of its heads); 1 to 32
// threads share a head and hold all of it in registers between the sum of squares and the rotation, each with 16 bytes of both
// of its halves. Floor: 2 * (num_heads + 2 num_kv_heads) * head_dim * bytes / bandwidth a token, or the launch for few tokens.
#include "common/launch.cuh"
#include "common/rotary.cuh"
#include "qk_norm_rope_store.h"

namespace minivllm {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kManyBlocks = 4;               // of kMaxWarps on one multiprocessor, where there are many tokens
constexpr int64_t kFewThreads = 132 * 2048;  // as many threads as an H100 or H200 runs at a time

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
  int block_shift;  // log2 of block_size, which is a power of two
  int head_dim;
  int lane_bits;  // log2 of the threads of a head
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

__device__ __forceinline__ float lanes_sum(float v, int lane_bits) {
#pragma unroll
  for (int bit = 4; bit >= 0; --bit)
    if (bit < lane_bits) v += __shfl_xor_sync(0xffffffffu, v, 1 << bit);
  return v;
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

// Vectors of 16 bytes, one unit of kHeads heads a thread, all loaded before the first is used. Block (x, y): token blockIdx.x,
// heads from blockIdx.y * (heads of a block) on. With few tokens (one head a thread) time is latency, so the longest chain, from
// the position to its row of the table, begins first and all is loaded at once. With many the heads go first, that no load of
// theirs waits for the position, and the table is read late, when fewer registers are needed.
template <typename T, int N, bool kInterleaved, int kHeads>
__global__ void __launch_bounds__(32 * kMaxWarps, kHeads == 1 ? 1 : kManyBlocks)
    vector_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const uint32_t token = blockIdx.x;
  uint32_t position = 0;
  int64_t slot = 0;
  const auto load_token = [&] { position = position_of(p.table, token), slot = p.slots[token]; };
  if (kHeads == 1) load_token();
  const int thread = threadIdx.y * 32 + threadIdx.x, u = thread & ((1 << p.lane_bits) - 1);
  const int at_once = static_cast<int>(blockDim.y * 32) >> p.lane_bits;
  const int first = blockIdx.y * kHeads * at_once + (thread >> p.lane_bits);
  const bool inside = 2 * N * u < p.head_dim;  // other threads still take part in the sums
  const UnitPlace place = place_of<N, kInterleaved>(u, p.table.rotary_dim);
  // Beyond the last head it is worked on again, which needs no branches.
  const auto head = [&](int i) { return min(first + i * at_once, p.num_heads - 1); };
  const auto source = [&](int i) {
    const Side& side = p.sides[side_of(p, head(i))];
    return near_head<T>(side.from, token, head(i) - side.first);
  };
  Unit<T, N> units[kHeads], weight;
#pragma unroll
  for (int i = 0; i < kHeads; ++i)
    if (inside) units[i] = load_unit<T, N>(source(i), place);
  const auto* only = static_cast<const T*>(p.sides[side_of(p, head(0))].weight);
  if (kHeads == 1 && inside && only != nullptr) weight = load_unit<T, N>(only, place);
  if (kHeads > 1) load_token();
  Turn<N> turn;
  if (kHeads == 1 && inside && place.turns) turn = load_turn<N>(p.table, position, u);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const auto* weights = static_cast<const T*>(p.sides[side_of(p, head(i))].weight);
    if (!__any_sync(0xffffffffu, weights != nullptr)) continue;
    // The order of rms_norm for a power of two of vectors: halves, quarters, ... are added first.
    const float a = inside ? sum_of_squares(units[i].part[0]) : 0.0f, b = inside ? sum_of_squares(units[i].part[1]) : 0.0f;
    const float sum = kInterleaved ? lanes_sum(a, p.lane_bits) + lanes_sum(b, p.lane_bits) : lanes_sum(a + b, p.lane_bits);
    if (weights == nullptr || !inside) continue;
    if (kHeads > 1) weight = load_unit<T, N>(weights, place);
    const float scale = inverse_rms(p, sum);
    normalise(units[i].part[0], scale, weight.part[0]);
    normalise(units[i].part[1], scale, weight.part[1]);
  }
  if (kHeads > 1 && inside && place.turns) turn = load_turn<N>(p.table, position, u);
  const uint32_t block = static_cast<uint32_t>(slot >> p.block_shift), offset = slot & ((1 << p.block_shift) - 1);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    if (!inside || first + i * at_once >= p.num_heads) continue;
    const int side = side_of(p, head(i));
    if (place.turns && side < 2) units[i] = rotate<kInterleaved>(units[i], turn);
    if (side == 0) {
      store_unit(units[i], source(i), place);
    } else if (slot >= 0) {
      const Side& to = p.sides[side];
      const uint32_t row = ((head(i) - to.first) << p.block_shift) + offset;
      const int64_t begin = wide_product(block, to.block_stride) + wide_product(row, p.head_dim);
      store_unit(units[i], static_cast<T*>(to.cache) + begin, place);
    }
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
  const int64_t threads = static_cast<int64_t>(p.num_heads) << p.lane_bits;
  const bool two = wide && num_tokens * threads > kFewThreads;  // heads a thread
  const int64_t warps = (threads + (two ? 63 : 31)) / (two ? 64 : 32), chunks = (warps + kMaxWarps - 1) / kMaxWarps;
  if (num_tokens > 2147483647 || chunks > 65535) return "too many tokens or heads";
  auto* kernel = !wide ? element_kernel<T, kInterleaved>
                 : two ? vector_kernel<T, N, kInterleaved, 2>
                       : vector_kernel<T, N, kInterleaved, 1>;
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>(chunks)),
                           dim3(32, static_cast<unsigned>((warps + chunks - 1) / chunks)), 0, stream, p);
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
  const Problem p{{q, k, v}, table, x.slots, num_heads, shift, x.head_dim, 0, 1.0f / static_cast<float>(x.head_dim), x.eps};
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool wide = fits_vectors(p, 16 / sizeof(T));
    const auto s = static_cast<cudaStream_t>(stream);
    return x.interleaved ? launch<T, true>(p, wide, num_tokens, s) : launch<T, false>(p, wide, num_tokens, s);
  });
}

}  // namespace minivllm
