// qk_norm_rope_store on CUDA: one pass over a token's q, k and v. A block takes one token (and some of its heads); 1 to 32
// threads share a head and hold all of it in registers between the sum of squares and the rotation, each with 16 bytes of both
// of its halves. Floor: 2 * (num_heads + 2 num_kv_heads) * head_dim * bytes / bandwidth a token, or the launch for few tokens.
#include "common/launch.cuh"
#include "common/rotary.cuh"
#include "qk_norm_rope_store.h"

namespace minivllm {
namespace {

constexpr int kMaxWarps = 4;
constexpr int kManyHeads = 2;                // of a thread, where there are many tokens
constexpr int kManyBlocks = 9;               // of kMaxWarps on one multiprocessor, likewise
constexpr int64_t kFewThreads = 132 * 2048;  // as many threads as an H100 or H200 runs at a time

struct Problem {
  QkNormRopeStore x;
  RotaryTable table;
  float inverse_head_dim;
  int block_shift;  // log2 of block_size, which is a power of two
  int lane_bits;    // log2 of the threads of a head
};

// One head of a token: where it comes from and which norm it gets. Heads in order: q's, k's, v's.
template <typename T>
struct Head {
  T* source = nullptr;        // null beyond the last head
  const T* weight = nullptr;  // null: no norm
  T* cache = nullptr;         // null for q, which is written in place
  int64_t block_stride = 0, index;
  bool turns = true;

  __device__ __forceinline__ Head(const QkNormRopeStore& x, int64_t token, int head) : index(head) {
    if (head < x.q.count) {
      source = place(x.q, token), weight = static_cast<const T*>(x.q_weight);
    } else if ((index -= x.q.count) < x.k.count) {
      source = place(x.k, token), weight = static_cast<const T*>(x.k_weight);
      cache = static_cast<T*>(x.k_cache), block_stride = x.k_block_stride;
    } else if ((index -= x.k.count) < x.v.count) {
      source = place(x.v, token), turns = false;
      cache = static_cast<T*>(x.v_cache), block_stride = x.v_block_stride;
    }
  }

  // Null: nothing to write.
  __device__ __forceinline__ T* target(const Problem& p, int64_t slot) const {
    if (cache == nullptr) return source;
    if (slot < 0) return nullptr;
    const int64_t row = (index << p.block_shift) + (slot & (p.x.block_size - 1));
    return cache + (slot >> p.block_shift) * block_stride + row * p.x.head_dim;
  }

 private:
  __device__ __forceinline__ T* place(const HeadLayout& layout, int64_t token) const {
    return static_cast<T*>(layout.data) + token * layout.token_stride + index * layout.head_stride;
  }
};

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

// The same values, but not to the compiler: it widens them again later instead of keeping them widened, which takes twice the
// registers.
template <typename T, int N>
__device__ __forceinline__ void forget_widened(Unit<T, N>& unit) {
  static_assert(sizeof unit == 32);
#pragma unroll
  for (int i = 0; i < 8; ++i) asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&unit)[i]));
}

__device__ __forceinline__ float lanes_sum(float v, int lane_bits) {
  for (int lane = (1 << lane_bits) / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
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
  return rsqrtf(fmaf(sum, p.inverse_head_dim, p.x.eps));
}

// Vectors of 16 bytes, one unit of a head or two a thread. Block (x, y): token blockIdx.x, heads from blockIdx.y * (heads of a
// block) on. With few tokens time is latency, so all is loaded at once; with many it is better to need few registers, to read
// the table once for several heads, and to find it in the L1, where the warp that came first has brought it.
template <typename T, int N, bool kInterleaved, bool kFew>
__global__ void __launch_bounds__(32 * kMaxWarps, kFew ? 1 : kManyBlocks) vector_kernel(const __grid_constant__ Problem p) {
  constexpr int kHeads = kFew ? 1 : kManyHeads;
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x, position = position_of(p.table, token), slot = p.x.slots[token];
  const int lanes = 1 << p.lane_bits, u = threadIdx.x & (lanes - 1), heads_per_warp = 32 >> p.lane_bits;
  const int first = (blockIdx.y * blockDim.y + threadIdx.y) * kHeads * heads_per_warp + (threadIdx.x >> p.lane_bits);
  const UnitPlace place = place_of<N, kInterleaved>(u, p.table.rotary_dim);
  const bool inside = 2 * N * u < p.x.head_dim;  // idle threads still take part in the sums
  Unit<T, N> units[kHeads], weight;
  Turn<N> turn;
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const Head<T> head(p.x, token, first + i * heads_per_warp);
    units[i] = {};
    if (inside && head.source != nullptr) units[i] = load_unit<T, N>(head.source, place);
    if (kFew && inside && head.weight != nullptr) weight = load_unit<T, N>(head.weight, place);
  }
  if (kFew && inside && place.turns) turn = load_turn<N>(p.table, position, u);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const Head<T> head(p.x, token, first + i * heads_per_warp);
    const bool norms = inside && head.weight != nullptr;
    if (!__any_sync(0xffffffffu, norms)) continue;
    // The order of rms_norm for a power of two of vectors: halves, quarters, ... are added first.
    const float a = sum_of_squares(units[i].part[0]), b = sum_of_squares(units[i].part[1]);
    const float sum = kInterleaved ? lanes_sum(a, p.lane_bits) + lanes_sum(b, p.lane_bits) : lanes_sum(a + b, p.lane_bits);
    if (!kFew) forget_widened(units[i]);
    if (!norms) continue;
    const float scale = inverse_rms(p, sum);
    normalise(units[i].part[0], scale, kFew ? weight.part[0] : *reinterpret_cast<const Vec<T, N>*>(head.weight + place.a));
    normalise(units[i].part[1], scale, kFew ? weight.part[1] : *reinterpret_cast<const Vec<T, N>*>(head.weight + place.b));
  }
  if (!kFew && inside && place.turns) turn = load_turn<N>(p.table, position, u);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const Head<T> head(p.x, token, first + i * heads_per_warp);
    if (inside && place.turns && head.turns) units[i] = rotate<kInterleaved>(units[i], turn);
    T* target = inside ? head.target(p, slot) : nullptr;
    if (target != nullptr) store_unit(units[i], target, place);
  }
}

// Any sizes and addresses: a warp takes one head and reads it twice.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(32 * kMaxWarps) element_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x;
  const Head<T> head(p.x, token, blockIdx.y * blockDim.y + threadIdx.y);
  if (head.source == nullptr) return;
  T* target = head.target(p, p.x.slots[token]);
  if (target == nullptr) return;
  float sum = 0.0f;
  if (head.weight != nullptr)
    for (int i = threadIdx.x; i < p.x.head_dim; i += 32) sum += __fmul_rn(widen(head.source[i]), widen(head.source[i]));
  const float scale = inverse_rms(p, warp_sum(sum));
  const auto load = [&](int i) {
    const T value = head.source[i];
    return head.weight == nullptr ? value : narrow<T>(widen(narrow<T>(widen(value) * scale)) * widen(head.weight[i]));
  };
  const int rotary_dim = head.turns ? p.table.rotary_dim : 0;
  const int64_t position = position_of(p.table, token);
  for (int u = threadIdx.x; u < rotary_dim / 2; u += 32) {
    const UnitPlace place = place_of<1, kInterleaved>(u, rotary_dim);
    const Unit<T, 1> unit{{{{load(place.a)}}, {{load(place.b)}}}};
    store_unit(rotate<kInterleaved>(unit, load_turn<1>(p.table, position, u)), target, place);
  }
  for (int i = rotary_dim + threadIdx.x; i < p.x.head_dim; i += 32) target[i] = load(i);
}

template <typename T, bool kInterleaved>
const char* launch(Problem p, bool wide, int64_t num_tokens, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  p.lane_bits = wide ? lane_bits_for(p.x.head_dim / (2 * N)) : 5;
  const int64_t threads = static_cast<int64_t>(p.x.q.count + 2 * p.x.k.count) << p.lane_bits;
  const bool few = num_tokens * threads <= kFewThreads;
  const int64_t per_warp = wide && !few ? 32 * kManyHeads : 32;
  const int64_t warps = (threads + per_warp - 1) / per_warp, chunks = (warps + kMaxWarps - 1) / kMaxWarps;
  if (num_tokens > 2147483647 || chunks > 65535) return "too many tokens or heads";
  auto* kernel = !wide ? element_kernel<T, kInterleaved>
                 : few ? vector_kernel<T, N, kInterleaved, true>
                       : vector_kernel<T, N, kInterleaved, false>;
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>(chunks)),
                           dim3(32, static_cast<unsigned>((warps + chunks - 1) / chunks)), 0, stream, p);
}

// Whether every head is made of whole units, no more than a warp has threads, at 16-byte addresses.
bool fits_vectors(const Problem& p, int elements) {
  const auto at_16 = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  const QkNormRopeStore& x = p.x;
  return x.head_dim % (2 * elements) == 0 && x.head_dim <= 64 * elements && table_aligned(p.table, elements) &&
         heads_aligned(x.q, elements) && heads_aligned(x.k, elements) && heads_aligned(x.v, elements) && at_16(x.q_weight) &&
         at_16(x.k_weight) && at_16(x.k_cache) && at_16(x.v_cache) && x.k_block_stride % elements == 0 &&
         x.v_block_stride % elements == 0;
}

}  // namespace

const char* launch_qk_norm_rope_store(const QkNormRopeStore& problem, int64_t num_tokens, DtypeCode dtype, void* stream) {
  if (num_tokens == 0 || problem.head_dim == 0 || problem.q.count + problem.k.count == 0) return nullptr;
  const RotaryTable table{problem.positions, problem.wide_positions, problem.table, problem.table_stride, problem.rotary_dim};
  int shift = 0;
  while ((1 << shift) < problem.block_size) ++shift;
  const Problem p{problem, table, 1.0f / static_cast<float>(problem.head_dim), shift, 0};
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool wide = fits_vectors(p, 16 / sizeof(T));
    const auto s = static_cast<cudaStream_t>(stream);
    return problem.interleaved ? launch<T, true>(p, wide, num_tokens, s) : launch<T, false>(p, wide, num_tokens, s);
  });
}

}  // namespace minivllm
