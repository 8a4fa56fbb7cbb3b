// qk_norm_rope_store on CUDA: one pass over a token's q, k and v. A block takes one token (and some of its heads); 2 to 32 threads share
// a head, hold all of it in registers between the sum of squares and the rotation, and keep their piece of the table for all of their
// heads. Floor: 2 * (num_heads + 2 num_kv_heads) * head_dim * bytes / bandwidth a token, or the launch for few tokens.
#include "common/launch.cuh"
#include "common/rotary.cuh"
#include "qk_norm_rope_store.h"

namespace minivllm {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kFewHeads = 132 * 64 * 4;  // below this many heads each thread takes one, to use more of the GPU

struct Problem {
  QkNormRopeStore x;
  RotaryTable table;
  float inverse_head_dim;
  int block_shift, block_mask;  // log2 of block_size, which is a power of two, and block_size - 1
  int lanes;                    // threads of a head
};

// Where one head of a token comes from and goes to, and which norm it gets.
template <typename T>
struct Head {
  const T *source, *weight;
  T* target;  // null: nothing to write
  bool turns;
};

// Heads in order: q's, k's, v's. Beyond them: source is null.
template <typename T>
__device__ __forceinline__ Head<T> find_head(const Problem& p, int64_t token, int64_t slot, int head) {
  const QkNormRopeStore& x = p.x;
  const int k_head = head - x.q.count, v_head = k_head - x.k.count;
  if (v_head >= x.v.count) return {nullptr, nullptr, nullptr, false};
  if (k_head < 0) {
    T* q = static_cast<T*>(x.q.data) + token * x.q.token_stride + head * x.q.head_stride;
    return {q, static_cast<const T*>(x.q_weight), q, true};
  }
  const bool is_key = v_head < 0;
  const HeadLayout& from = is_key ? x.k : x.v;
  const int64_t index = is_key ? k_head : v_head;
  const int64_t offset = (slot >> p.block_shift) * (is_key ? x.k_block_stride : x.v_block_stride) +
                         ((index << p.block_shift) + (slot & p.block_mask)) * x.head_dim;
  T* cache = static_cast<T*>(is_key ? x.k_cache : x.v_cache);
  return {static_cast<const T*>(from.data) + token * from.token_stride + index * from.head_stride,
          is_key ? static_cast<const T*>(x.k_weight) : nullptr, slot < 0 ? nullptr : cache + offset, is_key};
}

template <int N>
__device__ __forceinline__ float sum_of_squares(const float* values) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < N; ++j) sum = fmaf(values[j], values[j], sum);
  return sum;
}

__device__ __forceinline__ float lanes_sum(float v, int lanes) {
  for (int lane = lanes / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

// Rounded before and after the product with the weight, as rms_norm does.
template <typename T, int N>
__device__ __forceinline__ void normalise(float (&unit)[2 * N], float scale, const T* weight, const UnitPlace& place) {
  float weights[2 * N];
  widen_unit(load_unit<T, N>(weight, place), weights);
#pragma unroll
  for (int j = 0; j < 2 * N; ++j) unit[j] *= scale;
  round_all<T, 2 * N>(unit);
#pragma unroll
  for (int j = 0; j < 2 * N; ++j) unit[j] *= weights[j];
  round_all<T, 2 * N>(unit);
}

__device__ __forceinline__ float inverse_rms(const Problem& p, float sum) {
  return rsqrtf(fmaf(sum, p.inverse_head_dim, p.x.eps));
}

// Vectors of 16 bytes, one unit a thread. Block (x, y): token blockIdx.x, heads from blockIdx.y * (heads of a block) on.
template <typename T, int N, bool kInterleaved, int kHeads>
__global__ void __launch_bounds__(32 * kMaxWarps) vector_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x, slot = p.x.slots[token], position = position_of(p.table, token);
  const int heads_per_warp = 32 / p.lanes, u = threadIdx.x % p.lanes;
  const int first = (blockIdx.y * blockDim.y + threadIdx.y) * kHeads * heads_per_warp + threadIdx.x / p.lanes;
  const bool live = 2 * N * u < p.x.head_dim;  // idle threads of a head still take part in its sum
  const UnitPlace place = place_of<N, kInterleaved>(u, p.table.rotary_dim);
  Unit<T, N> units[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const T* source = find_head<T>(p, token, slot, first + i * heads_per_warp).source;
    units[i] = {};
    if (live && source != nullptr) units[i] = load_unit<T, N>(source, place);
  }
  Turn<N> turn;
  if (live && place.turns) turn = load_turn<N>(p.table, position, u);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    const Head<T> head = find_head<T>(p, token, slot, first + i * heads_per_warp);
    // The order of rms_norm for a power of two of vectors: halves, quarters, ... are added first.
    float wide[2 * N];
    widen_unit(units[i], wide);
    const float a = sum_of_squares<N>(wide), b = sum_of_squares<N>(wide + N);
    const float sum = kInterleaved ? lanes_sum(a, p.lanes) + lanes_sum(b, p.lanes) : lanes_sum(a + b, p.lanes);
    if (!live || head.target == nullptr) continue;
    if (head.weight != nullptr) normalise<T, N>(wide, inverse_rms(p, sum), head.weight, place);
    if (head.turns && place.turns) rotate<kInterleaved, N>(wide, turn);
    store_unit(narrow_unit<T, N>(wide), head.target, place);
  }
}

// Any sizes and addresses: a warp takes one head and reads it twice.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(32 * kMaxWarps) element_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x;
  const Head<T> head = find_head<T>(p, token, p.x.slots[token], blockIdx.y * blockDim.y + threadIdx.y);
  if (head.target == nullptr) return;
  float sum = 0.0f;
  if (head.weight != nullptr)
    for (int i = threadIdx.x; i < p.x.head_dim; i += 32) sum += __fmul_rn(widen(head.source[i]), widen(head.source[i]));
  const float scale = inverse_rms(p, warp_sum(sum));
  const auto load = [&](int i) {
    const float value = widen(head.source[i]);
    return head.weight == nullptr ? value : widen(narrow<T>(widen(narrow<T>(value * scale)) * widen(head.weight[i])));
  };
  const int rotary_dim = head.turns ? p.table.rotary_dim : 0;
  const int64_t position = position_of(p.table, token);
  for (int u = threadIdx.x; u < rotary_dim / 2; u += 32) {
    const UnitPlace place = place_of<1, kInterleaved>(u, rotary_dim);
    float unit[2] = {load(place.a), load(place.b)};
    rotate<kInterleaved, 1>(unit, load_turn<1>(p.table, position, u));
    store_unit(narrow_unit<T, 1>(unit), head.target, place);
  }
  for (int i = rotary_dim + threadIdx.x; i < p.x.head_dim; i += 32) head.target[i] = narrow<T>(load(i));
}

template <typename T, bool kInterleaved>
const char* launch(Problem p, bool wide, int64_t num_tokens, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const int heads = p.x.q.count + 2 * p.x.k.count;
  const bool few = num_tokens * heads < kFewHeads;
  p.lanes = wide ? lanes_for(p.x.head_dim / (2 * N)) : 32;
  const int heads_per_warp = (wide && !few ? 2 : 1) * (32 / p.lanes);
  const int warps = (heads + heads_per_warp - 1) / heads_per_warp, chunks = (warps + kMaxWarps - 1) / kMaxWarps;
  if (num_tokens > 2147483647 || chunks > 65535) return "too many tokens or heads";
  auto* kernel = !wide ? element_kernel<T, kInterleaved>
                 : few ? vector_kernel<T, N, kInterleaved, 1>
                       : vector_kernel<T, N, kInterleaved, 2>;
  return launch_overlapped(kernel, dim3(static_cast<unsigned>(num_tokens), chunks), dim3(32, (warps + chunks - 1) / chunks), 0,
                           stream, p);
}

// Whether every head is a power of two at most of whole units, one for each thread of a warp or less, at 16-byte addresses.
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
  const Problem p{problem, table, 1.0f / static_cast<float>(problem.head_dim), shift, problem.block_size - 1, 0};
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const bool wide = fits_vectors(p, 16 / sizeof(T));
    const auto s = static_cast<cudaStream_t>(stream);
    return problem.interleaved ? launch<T, true>(p, wide, num_tokens, s) : launch<T, false>(p, wide, num_tokens, s);
  });
}

}  // namespace minivllm
