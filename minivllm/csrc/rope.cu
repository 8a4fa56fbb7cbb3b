// apply_rope on CUDA. A block takes one token (and some of its heads); 2 to 32 threads share a head, so a warp turns several heads at a
// time, and a thread keeps its piece of the table for all of its heads. Floor: 2 * heads * rotary_dim * bytes / bandwidth a token, or
// the launch for few tokens.
#include "common/launch.cuh"
#include "common/rotary.cuh"
#include "rope.h"

namespace minivllm {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kFewHeads = 132 * 64 * 4;  // below this many heads each thread takes one, to use more of the GPU

struct Problem {
  HeadLayout q, k;
  RotaryTable table;
  int lanes;  // threads of a head
};

// Block (x, y): token blockIdx.x, heads from blockIdx.y * (warps * kHeads * heads of a warp) on; q's heads, then k's.
template <typename T, int N, bool kInterleaved, int kHeads>
__global__ void __launch_bounds__(32 * kMaxWarps) rope_kernel(const __grid_constant__ Problem p) {
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t token = blockIdx.x;
  const int64_t position = position_of(p.table, token);
  const int heads_per_warp = 32 / p.lanes;
  const int first = (blockIdx.y * blockDim.y + threadIdx.y) * kHeads * heads_per_warp + threadIdx.x / p.lanes;
  const int num_units = p.table.rotary_dim / (2 * N);
  for (int u = threadIdx.x % p.lanes; u < num_units; u += p.lanes) {
    const UnitPlace place = place_of<N, kInterleaved>(u, p.table.rotary_dim);
    Unit<T, N> units[kHeads];
    T* heads[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      const int head = first + i * heads_per_warp, k_head = head - p.q.count;
      const HeadLayout& x = k_head < 0 ? p.q : p.k;
      heads[i] = k_head >= p.k.count ? nullptr
                                     : static_cast<T*>(x.data) + token * x.token_stride + (k_head < 0 ? head : k_head) * x.head_stride;
      if (heads[i] != nullptr) units[i] = load_unit<T, N>(heads[i], place);
    }
    const Turn<N> turn = load_turn<N>(p.table, position, u);
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
      if (heads[i] == nullptr) continue;
      float wide[2 * N];
      widen_unit(units[i], wide);
      rotate<kInterleaved, N>(wide, turn);
      store_unit(narrow_unit<T, N>(wide), heads[i], place);
    }
  }
}

template <typename T, int N, bool kInterleaved, int kHeads>
const char* launch(const Problem& p, int64_t num_tokens, cudaStream_t stream) {
  const int heads_per_warp = kHeads * (32 / p.lanes);
  const int warps = (p.q.count + p.k.count + heads_per_warp - 1) / heads_per_warp;
  const int chunks = (warps + kMaxWarps - 1) / kMaxWarps;
  if (num_tokens > 2147483647 || chunks > 65535) return "too many tokens or heads";
  return launch_overlapped(rope_kernel<T, N, kInterleaved, kHeads>, dim3(static_cast<unsigned>(num_tokens), chunks),
                           dim3(32, (warps + chunks - 1) / chunks), 0, stream, p);
}

template <typename T, int N, bool kInterleaved>
const char* dispatch(Problem p, int64_t num_tokens, cudaStream_t stream) {
  p.lanes = lanes_for(p.table.rotary_dim / (2 * N));
  const bool few = N == 1 || num_tokens * (p.q.count + p.k.count) < kFewHeads;
  return few ? launch<T, N, kInterleaved, 1>(p, num_tokens, stream) : launch<T, N, kInterleaved, 2>(p, num_tokens, stream);
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
      return interleaved ? dispatch<T, N, true>(p, num_tokens, s) : dispatch<T, N, false>(p, num_tokens, s);
    return interleaved ? dispatch<T, 1, true>(p, num_tokens, s) : dispatch<T, 1, false>(p, num_tokens, s);
  });
}

}  // namespace minivllm
