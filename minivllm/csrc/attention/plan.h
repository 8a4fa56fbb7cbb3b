// How decode rows are cut into work items: the layout of the plan that attention/plan.cu writes once a step and attention/decode.cu
// follows in every layer. Torch-free.
//
// A decode row is a sequence with few queries: their (query, head of the group) pairs are the columns of one tensor-core tile. Its
// keys are cut into chunks whose size follows from the row's own length alone, every chunk gets a softmax state of its own, and the
// states are merged in order. The chunks of all rows and heads stand in one line, and every thread block takes an equal piece of
// it ("Stream-K", Osama et al. 2023, arXiv:2301.03598). Of a row and head that lies within one piece the states are merged in
// registers; of one that is cut they are left in memory, and the last thread block to finish merges them. Both do the same
// arithmetic, so the bits of a row do not depend on the rows beside it.
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
constexpr int kMaxChunks = 64;      // of one row: what the last thread block merges in about two microseconds
constexpr int kSmallestChunk = 256;  // keys
constexpr int kUnit = kDecodeWarps * kDecodeKeys;  // chunks are multiples of it; work is counted in it

// Keys of a chunk, from the keys of the row. Small enough that one row of 8,192 tokens fills 132 multiprocessors twice, large
// enough that merging (a barrier each) is lost in the noise and the states of a long row stay few.
MINIVLLM_BOTH int chunk_keys(int keys) {
  if (keys <= 8192) return kSmallestChunk;
  if (keys <= 512 * kMaxChunks) return 512;
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
  int heads() const { return num_kv_heads * column_groups(); }  // places in the line of a row
  int most_chunks() const {
    const int n = (max_keys + kSmallestChunk - 1) / kSmallestChunk;
    return n < 1 ? 1 : (n > kMaxChunks ? kMaxChunks : n);
  }
  int32_t signature() const {
    uint32_t hash = 1;
    for (int v : {num_seqs, max_keys, num_kv_heads, group, head_dim, max_queries, window, num_ctas}) hash = hash * 1000003u + v;
    return static_cast<int32_t>(hash);
  }
  int64_t states() const { return int64_t{num_ctas} * most_chunks() * columns_per_group(); }

  // Offsets in words of 4 bytes.
  static constexpr int64_t kHeader = 16;
  int64_t arrivals() const { return kHeader; }
  int64_t pieces() const { return (arrivals() + num_ctas + 3) / 4 * 4; }
  int64_t rows() const { return pieces() + 12 * (int64_t{num_ctas} + 1); }
  int64_t line() const { return rows() + 8 * int64_t{num_seqs}; }  // int64: where each row begins
  int64_t stats() const { return line() + 2 * (int64_t{num_seqs} + 1); }
  int64_t partials() const { return (stats() + 2 * states() + 3) / 4 * 4; }
  int64_t words() const { return partials() + states() * head_dim; }
};

// Header words. kSignature: of the shapes the plan was made for. kUsedTokens: rows of q that belong to a sequence.
enum PlanWord : int { kSignature = 0, kUsedTokens = 1 };

// The keys [begin, keys) of a sequence's cache, in chunks.
struct alignas(16) PlanRow {
  int seq, first_query, num_queries, keys;
  int begin, chunk_size, num_chunks, unused;
};

// Where a thread block's piece of the line begins; it ends where the next one's begins. slot: where the states of the row and head
// lie that the beginning cuts (chunk > 0).
struct alignas(16) PlanPiece {
  int row, head, chunk, slot;
  PlanRow first;
};

const char* launch_plan(const int32_t* seq_lens, const int32_t* cu_seqlens_q, const DecodeShape& shape, int32_t* plan,
                        void* stream);

}  // namespace minivllm::attention
