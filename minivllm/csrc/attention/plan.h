// How decode rows are cut into work items: the layout of the plan that attention/plan.cu writes once a step and attention/decode.cu
// follows in every layer. Torch-free.
//
// A decode row is a sequence with few queries: their (query, head of the group) pairs are the columns of one tensor-core tile.
// Its keys are cut into chunks whose size follows from the row's own length alone, every chunk gets a softmax state of its own,
// and the states are merged in order. The chunks of all rows stand in one line, and every team of thread blocks takes an equal
// piece of it ("Stream-K", Osama et al. 2023, arXiv:2301.03598), each of them for another head: the heads of a block of the
// cache lie side by side in memory, and so they are read at about the same time, which is worth 2 % of the bandwidth. Of a row
// that lies within one piece the states are merged in registers. Of one that is cut they are left in memory, and the last
// thread block to finish merges them; but a team begins with the row that its end cuts and ends with the row that its beginning
// cuts, so what another team did of the latter is mostly there already, and merging goes on from it in registers. Where that
// cuts fewer rows, a few teams get nothing. All ways do the same arithmetic, so the bits of a row do not depend on the rows
// beside it.
#pragma once

#include <cstdint>
#include <initializer_list>

#if defined(__CUDACC__)
#define MINIVLLM_BOTH __host__ __device__ __forceinline__
#else
#define MINIVLLM_BOTH inline
#endif

namespace minivllm::attention {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = 32 * kDecodeWarps;
constexpr int kDecodeKeys = 16;     // keys of one warp's step: the rows of an m16n8k16 tile
constexpr int kDecodeColumns = 16;  // rows of up to so many columns are decoded; a single query always is
constexpr int kMaxChunks = 32;      // of one row: the last thread block merges so many states in about a microsecond
constexpr int kMostTeam = 16, kMostTeams = 384;
constexpr int kUnit = kDecodeWarps * kDecodeKeys;  // chunks are multiples of it; work is counted in it

// Keys of a chunk, from the keys of the row: few, so that a row alone spreads over many thread blocks (1,024 keys take 7.0 us over
// 16 of them, 9.1 us over 4), but two short chunks side by side take longer than one after the other.
MINIVLLM_BOTH int chunk_keys(int keys) {
  if (keys <= 2 * kUnit) return 2 * kUnit;
  return ((keys + kMaxChunks - 1) / kMaxChunks + kUnit - 1) / kUnit * kUnit;
}

// Sequences of so many queries or fewer are decoded. Where longer ones are in the batch, only single queries are: room for more
// columns would slow them down.
MINIVLLM_BOTH int decoded_queries(int64_t max_queries, int group) {
  return max_queries > 1 && max_queries * group <= kDecodeColumns ? static_cast<int>(max_queries) : 1;
}

// Shapes that the plan and the kernel must agree on.
struct DecodeShape {
  int num_seqs, max_keys, num_kv_heads, group, head_dim;
  int max_queries;  // of a sequence that is decoded
  int window;       // 0: off
  int num_ctas;     // thread blocks of the persistent grid

  int columns() const { return max_queries * group; }  // most columns of a row
  // Of 16 columns the sums of more than 128 elements do not fit the registers; then the keys are read once more for the rest.
  int tile_columns() const { return columns() <= 8 || head_dim > 128 ? 8 : 16; }
  int column_groups() const { return (columns() + tile_columns() - 1) / tile_columns(); }
  int columns_per_group() const { return columns() < tile_columns() ? columns() : tile_columns(); }
  int heads() const { return num_kv_heads * column_groups(); }
  // Thread blocks of a team: heads that are computed side by side. The largest divisor of all heads that leaves less than 2 % of
  // the thread blocks idle. A row with more heads stands in the line once for every round of them.
  int team() const {
    int best = 1;
    for (int size = 2; size <= kMostTeam && size <= num_ctas; ++size)
      if (heads() % size == 0 && num_ctas % size * 50 < num_ctas) best = size;
    return best;
  }
  int rounds() const { return heads() / team(); }
  int teams() const { return num_ctas / team(); }
  int grid() const { return teams() * team(); }
  int most_chunks() const {
    const int n = (max_keys + kUnit - 1) / kUnit;
    return n < 1 ? 1 : (n > kMaxChunks ? kMaxChunks : n);
  }
  int32_t signature() const {
    uint32_t hash = 1;
    for (int v : {num_seqs, max_keys, num_kv_heads, group, head_dim, max_queries, window, num_ctas}) hash = hash * 1000003u + v;
    return static_cast<int32_t>(hash);
  }
  int64_t states() const { return int64_t{grid()} * most_chunks() * columns_per_group(); }

  // Offsets in words of 4 bytes.
  static constexpr int64_t kHeader = 16;
  int64_t arrivals() const { return kHeader; }
  int64_t pieces() const { return (arrivals() + grid() + 3) / 4 * 4; }
  int64_t rows() const { return pieces() + 16 * int64_t{teams()}; }
  // Where the rows stand, for the plan kernel's own use.
  int64_t line() const { return rows() + 8 * int64_t{num_seqs} * rounds(); }  // int64: where each row begins
  int64_t stats() const { return line() + 4 * (int64_t{num_seqs} * rounds() + 1); }
  int64_t partials() const { return (stats() + 2 * states() + 3) / 4 * 4; }
  int64_t words() const { return partials() + states() * head_dim; }
};

// Header words. kSignature: of the shapes the plan was made for. kUsedTokens: rows of q that belong to a sequence.
enum PlanWord : int { kSignature = 0, kUsedTokens = 1 };

// The keys [begin, keys) of a sequence's cache, in chunks, for the heads of one round.
struct alignas(16) PlanRow {
  int seq, first_query, num_queries, keys;
  int begin, chunk_size, num_chunks, round;
};

// A place between two chunks of the line. chunk > 0: it cuts a row, whose states lie in slot `slot`; of the `whole` chunks before
// the row's first cut there is but one state, that of all of them.
struct alignas(16) PlanCut {
  int row, chunk, slot, whole;
};

// What a team does: its piece of the line lies between two cuts. first: the row it begins with.
struct alignas(16) PlanPiece {
  PlanCut from, to;
  PlanRow first;
};

// The order of a piece's rows: the one that its end cuts, those that lie within it, the one that its beginning cuts.
MINIVLLM_BOTH int first_within(const PlanCut& from) { return from.row + (from.chunk > 0); }
MINIVLLM_BOTH int first_row(const PlanCut& from, const PlanCut& to) {
  if (to.chunk > 0) return to.row;
  return first_within(from) < to.row ? first_within(from) : from.row;
}

const char* launch_plan(const int32_t* seq_lens, const int32_t* cu_seqlens_q, const DecodeShape& shape, int32_t* plan,
                        void* stream);

}  // namespace minivllm::attention
