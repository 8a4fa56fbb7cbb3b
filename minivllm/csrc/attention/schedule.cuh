// Which rows and keys a block of the prefill kernels takes. The host knows no lengths: it launches as many blocks as any
// lengths could need, and each finds its tile from the prefix sums. Longer tiles of a sequence come first, so that the
// last blocks are short; key-value heads lie next to each other.
#pragma once

#include <cstdint>

#include "attention/prefill.h"

namespace minivllm::attention {

// Number of query heads that share a key-value head, and division by it: n / size is the upper half of n * multiplier, shifted,
// for 0 <= n < 2^31 (Granlund and Montgomery 1994, "Division by invariant integers using multiplication").
struct Group {
  int size, shift = 0;
  uint32_t multiplier = 0;

  explicit Group(int size) : size(size) {
    if (size == 1) return;
    while ((int64_t{1} << (shift + 1)) < size) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + size - 1) / size);
  }
  __device__ int divide(int n) const { return size == 1 ? n : static_cast<int>(__umulhi(n, multiplier) >> shift); }
};

// Rows [row_begin, row_end) of one sequence and key-value head; row r is query r / group of head kv_head * group + r % group.
struct RowTile {
  int sequence, kv_head;
  int q_begin, len_q;   // of the sequence
  int kv_begin, len_k;  // kv_begin: packed only
  int row_begin, row_end;

  // A query sees the keys [first_visible, visible).
  __device__ int visible(const Prefill& p, int query) const {
    return p.causal ? max(0, min(query + 1 + len_k - len_q, len_k)) : len_k;
  }
  __device__ int first_visible(const Prefill& p, int query) const {
    return p.window > 0 && p.window < len_k ? max(0, query + 1 + len_k - len_q - static_cast<int>(p.window)) : 0;
  }
};

// Number of blocks that serve any lengths with these totals. Tokens after the last sequence count as one more, without keys.
inline int64_t max_row_tiles(const Prefill& p, int rows) {
  const int64_t all_rows = int64_t{p.num_tokens} * (p.num_heads / p.num_kv_heads);
  return (all_rows + (p.batch + int64_t{1}) * (rows - 1)) / rows;
}

// The tile of this block, found by every warp for itself: no shared memory, no barrier. False: there is none.
template <bool kPaged>
__device__ __forceinline__ bool find_tile(const Prefill& p, int group, int rows, RowTile& tile) {
  const int lane = threadIdx.x % 32;
  tile.kv_head = static_cast<int>(blockIdx.x % p.num_kv_heads);
  int index = static_cast<int>(blockIdx.x / p.num_kv_heads);
  for (int first = 0; first <= p.batch; first += 32) {
    const int i = first + lane;
    const int begin = i <= p.batch ? p.cu_seqlens_q[i] : 0;
    const int end = i < p.batch ? p.cu_seqlens_q[i + 1] : i == p.batch ? p.num_tokens : 0;
    const int kv_begin = !kPaged && i < p.batch ? p.cu_seqlens_k[i] : 0;
    const int kv_end = i < p.batch ? kPaged ? p.seq_lens[i] : p.cu_seqlens_k[i + 1] : 0;
    const bool decoded = i < p.batch && end - begin <= p.decoded_queries;
    const int tiles = decoded ? 0 : ((end - begin) * group + rows - 1) / rows;
    int sum = tiles;  // of this lane and those before it
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += before;
    }
    const unsigned after = __ballot_sync(0xffffffffu, index < sum);
    if (after == 0) {
      index -= __shfl_sync(0xffffffffu, sum, 31);
      continue;
    }
    const int found = __ffs(after) - 1;
    // a reduction's result lies in a register that the lanes share, so that the kernel keeps its others
    const auto of_found = [&](int value) { return __reduce_max_sync(0xffffffffu, lane == found ? value : 0); };
    tile.sequence = first + of_found(lane);
    tile.q_begin = of_found(begin);
    tile.len_q = of_found(end) - tile.q_begin;
    tile.row_begin = (of_found(sum) - 1 - index) * rows;
    tile.row_end = min(tile.row_begin + rows, tile.len_q * group);
    tile.kv_begin = of_found(kv_begin);
    tile.len_k = of_found(kv_end) - tile.kv_begin;
    return true;
  }
  return false;
}

// The tiles of kKeys keys that any row of a tile sees, and which of them every row sees whole.
struct KeyTiles {
  int first, last;              // none: last < first
  int end;                      // of the keys that any row sees
  int whole_first, whole_last;  // need no mask

  KeyTiles() = default;
  __device__ KeyTiles(const Prefill& p, const Group& group, const RowTile& tile, int keys) {
    const int low = group.divide(tile.row_begin), high = group.divide(tile.row_end - 1);
    first = tile.first_visible(p, low) / keys;
    end = tile.visible(p, high);
    last = (end + keys - 1) / keys - 1;
    whole_first = (tile.first_visible(p, high) + keys - 1) / keys;
    whole_last = tile.visible(p, low) / keys - 1;
  }
};

}  // namespace minivllm::attention
