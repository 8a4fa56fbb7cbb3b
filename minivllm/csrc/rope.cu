// apply_rope on CUDA. A block takes one token (and some of its heads); 1 to 32 threads share a head, each with 16 bytes of both
// of its halves, so a warp turns several heads at a time. Floor: 2 * heads * rotary_dim * bytes / bandwidth a token, or the
// launch for few tokens.
#include "common/launch.cuh"
#include "common/rotary.cuh"
#include "rope.h"

namespace minivllm {
namespace {

constexpr int kMaxWarps = 8;
// Blocks of kMaxWarps on one multiprocessor: as many as leave each thread the registers it needs.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kBlocks = 5;
#else
constexpr int kBlocks = 6;
#endif

struct Problem {
  HeadLayout q, k;
  RotaryTable table;
  int lane_bits;  // log2 of the threads of a head
};

// Block (x, y): token blockIdx.x, heads from blockIdx.y * (heads of a block) on; q's heads, then k's.
template <typename T, int N, bool kInterleaved>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocks) rope_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x, position = position_of(p.table, token);
  const int thread = (blockIdx.y * blockDim.y + threadIdx.y) * 32 + threadIdx.x;
  const int head = thread >> p.lane_bits, k_head = head - p.q.count;
  if (k_head >= p.k.count) return;
  const HeadLayout& x = k_head < 0 ? p.q : p.k;
  T* data = static_cast<T*>(x.data) + token * x.token_stride + (k_head < 0 ? head : k_head) * x.head_stride;
  const int lanes = 1 << p.lane_bits, num_units = p.table.rotary_dim / (2 * N);
  for (int u = thread & (lanes - 1); u < num_units; u += lanes) {
    const UnitPlace place = place_of<N, kInterleaved>(u, p.table.rotary_dim);
    const Unit<T, N> unit = load_unit<T, N>(data, place);
    const Turn<N> turn = load_turn<N>(p.table, position, u);
    store_unit(rotate<kInterleaved>(unit, turn), data, place);
  }
}

template <typename T, int N, bool kInterleaved>
const char* launch(Problem p, int64_t num_tokens, cudaStream_t stream) {
  p.lane_bits = lane_bits_for(p.table.rotary_dim / (2 * N));
  const int64_t warps = ((static_cast<int64_t>(p.q.count + p.k.count) << p.lane_bits) + 31) / 32;
  const int64_t chunks = (warps + kMaxWarps - 1) / kMaxWarps;
  if (num_tokens > 2147483647 || chunks > 65535) return "too many tokens or heads";
  return launch_overlapped(rope_kernel<T, N, kInterleaved>,
                           dim3(static_cast<unsigned>(num_tokens), static_cast<unsigned>(chunks)),
                           dim3(32, static_cast<unsigned>((warps + chunks - 1) / chunks)), 0, stream, p);
}

}  // namespace

const char* launch_apply_rope(HeadLayout q, HeadLayout k, const void* positions, bool wide_positions, const float* table,
                              int64_t table_stride, int64_t rotary_dim, int64_t num_tokens, bool interleaved, DtypeCode dtype,
                              void* stream) {
  if (num_tokens == 0 || rotary_dim == 0 || q.count + k.count == 0) return nullptr;
  return dispatch_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    constexpr int N = 16 / sizeof(T);
    const Problem p{q, k, {positions, wide_positions, table, table_stride, static_cast<int>(rotary_dim)}, 0};
    const auto s = static_cast<cudaStream_t>(stream);
    if (table_aligned(p.table, N) && heads_aligned(q, N) && heads_aligned(k, N))
      return interleaved ? launch<T, N, true>(p, num_tokens, s) : launch<T, N, false>(p, num_tokens, s);
    return interleaved ? launch<T, 1, true>(p, num_tokens, s) : launch<T, 1, false>(p, num_tokens, s);
  });
}

}  // namespace minivllm
