// Tile sizes of the prefill kernel, and why.
//
// A block of four warps takes kRows = 64 * kRowTiles rows; a row is one query of one head, and the rows of all heads that share
// a key-value head are one sequence of rows, query major. So a tile spans few queries: little is computed beyond the causal
// diagonal, and short chunks fill tiles.
//  * kRowTiles: m16 tiles of a warp. With two, each fragment of keys and values that a warp loads from shared memory is used
//    twice; with one, loading takes longer than multiplying (64 keys of head_dim 128: 4 warps x 32 KiB at 128 B a cycle are
//    1024 cycles, the products of their 64 rows about 830). Two need head_dim + kKeys registers for outputs and scores, so
//    head_dim 256 must do with one. Measured with 8 warps of one instead (H200, head_dim 128, 16k causal): 304 TFLOP/s
//    instead of 378.
//  * kKeys: keys of a tile. 64 amortise maxima and the barrier (32: 350 TFLOP/s instead of 378), and queries are loaded from
//    shared memory once for all of them. Tiles of which a half at a time was worked on, the exponentials of one between the
//    products of the other, load queries twice, and shared memory is as busy as the tensor cores: 348 instead of 396.
//  * kBlocks: resident blocks of an SM that registers (65,536) and shared memory (227 KiB on sm_90) allow. Two or more, so that
//    one block's exponentials run beside another's products (one alone: 310 TFLOP/s instead of 396).
//  * kHeld: fragments of queries, of 16 columns each, that stay in registers where there is room.
// Keys and values have two stages each: one barrier a tile, and a load has a whole tile's time to arrive. Shared memory of a
// block: 48, 72, 96 and 96 KiB, within the 99 KiB of sm_86 and sm_89. Heads of 256 take 8 warps and 64 keys where a block may
// have 192 KiB (4k causal: 333 TFLOP/s instead of 281): keys and values are then loaded half as often.
#pragma once

namespace minivllm::attention {

template <int kHeadDim_, int kRowTiles_, int kKeys_, int kBlocks_, int kWarps_ = 4, int kHeld_ = 0>
struct Tiles {
  static constexpr int kHeadDim = kHeadDim_, kRowTiles = kRowTiles_, kKeys = kKeys_, kBlocks = kBlocks_;
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps, kRows = 16 * kRowTiles * kWarps, kStages = 2;
  static constexpr int kHeld = kHeld_, kHeldSlots = kHeld > 0 ? kHeld : 1;
  static constexpr int kQueryBytes = kRows * kHeadDim * 2, kTileBytes = kKeys * kHeadDim * 2;
  static constexpr int kPages = kKeys / 8;  // blocks hold at least 8 keys
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kTileBytes + 2 * kPages * 4;
};

using Tiles64 = Tiles<64, 2, 64, 3>;
using Tiles96 = Tiles<96, 2, 64, 2>;
using Tiles128 = Tiles<128, 2, 64, 2>;
using Tiles256 = Tiles<256, 1, 64, 1, 8, 8>;  // sm_90
using Tiles256Small = Tiles<256, 1, 32, 2>;

}  // namespace minivllm::attention
