// apply_rope on CUDA. A block takes one token (and some of its heads); 1 to 32 threads share a head, each with 16 bytes of both
// of its halves, so a warp turns several heads at a time. Floor: 2 * heads * rotary_dim * bytes / bandwidth a token, or the
// launch for few tokens.
#include "common/rotary.cuh"
#include "rope.h"

namespace minivllm {
namespace {

// Blocks of kMaxWarps on one multiprocessor: as many as leave each thread the registers it needs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocks = 5;
#else
constexpr int kBlocks = 6;
#endif

struct Problem {
  HeadLayout sides[2];  // q and k
  RotaryTable table;
  int lane_bits;  // log2 of the threads of a head
};

// Vectors of 16 bytes, one unit of kHeads heads a thread, which share what it reads of the table. Block (x, y): token
// blockIdx.x, heads from blockIdx.y * (heads of a block) on.
template <typename T, int N, bool kInterleaved, int kHeads>
__global__ void __launch_bounds__(32 * kMaxWarps, kHeads == 1 ? kBlocks : 4) vector_kernel(const __grid_constant__ Problem p) {
  const uint32_t token = blockIdx.x;
  const int u = threadIdx.x & ((1 << p.lane_bits) - 1), at_once = static_cast<int>(blockDim.y * 32) >> p.lane_bits;
  const int first = blockIdx.y * kHeads * at_once + (static_cast<int>(threadIdx.y * 32 + threadIdx.x) >> p.lane_bits);
  const UnitPlace place = place_of<N, kInterleaved>(u, p.table.rotary_dim);
  if (!place.turns) return;
  const int num_heads = p.sides[0].count + p.sides[1].count;
  T* heads[kHeads];
  Unit<T, N> units[kHeads];
#pragma unroll
  for (int i = 0; i < kHeads; ++i) {
    // Beyond the last head it is loaded again: without a branch all loads are under way together.
    const int head = min(first + i * at_once, num_heads - 1);
    const int side = head >= p.sides[0].count;
    heads[i] = near_head<T>(p.sides[side], token, head - side * p.sides[0].count);
    prefetch_early(heads[i] + place.a), prefetch_early(heads[i] + place.b);
  }
  wait_for_predecessors();
  let_dependents_launch();
  const uint32_t position = position_of(p.table, token);
#pragma unroll
  for (int i = 0; i < kHeads; ++i) units[i] = load_unit<T, N>(heads[i], place);
  const Turn<N> turn = load_turn<N>(p.table, position, u);
#pragma unroll
  for (int i = 0; i < kHeads; ++i)
    if (first + i * at_once < num_heads) store_unit(rotate<kInterleaved>(units[i], turn), heads[i], place);
}

// Any sizes and addresses.
template <typename T, bool kInterleaved>
__global__ void __launch_bounds__(32 * kMaxWarps) element_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x;
  const uint32_t position = position_of(p.table, token);
  const int thread = (blockIdx.y * blockDim.y + threadIdx.y) * 32 + threadIdx.x, lanes = 1 << p.lane_bits;
  const int head = thread >> p.lane_bits;
  if (head >= p.sides[0].count + p.sides[1].count) return;
  const int side = head >= p.sides[0].count;
  T* data = any_head<T>(p.sides[side], token, head - side * p.sides[0].count);
  for (int u = thread & (lanes - 1); u < p.table.rotary_dim / 2; u += lanes) {
    const UnitPlace place = place_of<1, kInterleaved>(u, p.table.rotary_dim);
    const Unit<T, 1> unit = load_unit<T, 1>(data, place);
    store_unit(rotate<kInterleaved>(unit, load_turn<1>(p.table, position, u)), data, place);
  }
}

template <typename T, bool kInterleaved>
const char* launch(Problem p, int64_t num_tokens, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const bool wide = p.table.rotary_dim <= 64 * N && table_fits_vectors(p.table, N) && heads_fit_vectors(p.sides[0], N) &&
                    heads_fit_vectors(p.sides[1], N);
  p.lane_bits = lane_bits_for(p.table.rotary_dim / (wide ? 2 * N : 2));
  const int64_t threads = static_cast<int64_t>(p.sides[0].count + p.sides[1].count) << p.lane_bits;
  const bool two = wide && threads > 32 * kMaxWarps && num_tokens * threads > kFewThreads;  // heads a thread
  auto* kernel = !wide ? element_kernel<T, kInterleaved>
                 : two ? vector_kernel<T, N, kInterleaved, 2>
                       : vector_kernel<T, N, kInterleaved, 1>;
  return launch_on_tokens(kernel, p, num_tokens, (threads + (two ? 63 : 31)) / (two ? 64 : 32), stream);
}

}  // namespace

const char* launch_apply_rope(HeadLayout q, HeadLayout k, const void* positions, bool wide_positions, const float* table,
                              int64_t table_stride, int64_t rotary_dim, int64_t num_tokens, bool interleaved, DtypeCode dtype,
                              void* stream) {
  if (num_tokens == 0 || rotary_dim == 0 || q.count + k.count == 0) return nullptr;
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Problem p{{q, k}, {positions, wide_positions, table, table_stride, static_cast<int>(rotary_dim)}, 0};
    const auto s = static_cast<cudaStream_t>(stream);
    return interleaved ? launch<T, true>(p, num_tokens, s) : launch<T, false>(p, num_tokens, s);
  });
}

}  // namespace minivllm
