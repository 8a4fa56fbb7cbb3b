// Decode attention over the paged cache: split-KV ("Flash-Decoding", Dao et al. 2023) with the query heads of a group packed
// into one tile. Each thread block of four warps works through its piece of a plan (attention/plan.h). The warps take turns at
// tiles of 16 keys, each with a pipeline of its own in shared memory, so nothing but the end of a chunk makes them wait for
// each other. Loads are never waited for before the next ones are on their way, and run ahead into the next row. Scores are
// computed transposed, keys x columns: with up to 8 columns (query heads of the group, times queries) that halves the tensor-
// core work of padding them to 16 rows.
// Floor: bytes of the keys and values read / bandwidth.
#include <cuda_runtime.h>

#include <algorithm>

#include "attention/decode.h"
#include "attention/states.cuh"
#include "common/launch.cuh"
#include "common/mma.cuh"
#include "common/vec.cuh"

namespace minivllm::attention {
namespace {

constexpr float kLog2e = 1.44269504088896341f;
constexpr int kMostStages = 4;
constexpr float kLn2 = 0.693147180559945309f;

// HeadDim: padded; Columns: of a tile, 8 or 16.
template <typename T_, int HeadDim_, int Columns_>
struct Config {
  using T = T_;
  static constexpr int kHeadDim = HeadDim_, kColumns = Columns_;
  static constexpr int kColumnTiles = kColumns / 8, kSteps = kHeadDim / 16, kRowChunks = kHeadDim / 8;
  static constexpr int kTileBytes = kDecodeKeys * kHeadDim * 2;  // of keys, and as much of values
  static constexpr int kRowFloats = kHeadDim + 4;  // padded: columns 2t of a quad fall into different banks
  // For merging the warps' states: sums and maxima [warp][column], then the rows [warp][column][kRowFloats]. Two of them, used in
  // turn, spare a barrier; of many columns they would take the place of the pipeline.
  static __host__ __device__ int merge_floats(int columns) { return kDecodeWarps * columns * (2 + kRowFloats); }
  static __host__ __device__ int merge_buffers(int columns) { return columns <= 4 ? 2 : 1; }
  // Tiles of a warp that are in shared memory or on their way: `stages`.
  static __host__ __device__ int pipeline_bytes(int stages) { return kDecodeWarps * stages * 2 * kTileBytes; }
  // The queries of a long head stay in shared memory: beside its sums the registers have no room.
  static constexpr bool kQueriesInShared = kHeadDim > 128;
  static constexpr int kQueryWords = kQueriesInShared ? kColumnTiles * kSteps * 2 * 32 : 0;
  static int shared_bytes(int columns, int stages) {
    return pipeline_bytes(stages) + (merge_buffers(columns) * merge_floats(columns) + kQueryWords) * 4;
  }
};

// A run of chunks of one row, for the head of this thread block. slot < 0: all of them; else the row is cut, and of the `whole` chunks
// before its first cut there is but one state.
struct Item {
  PlanRow row;
  int index, first_chunk, end_chunk, slot, whole;

  __device__ __forceinline__ int begin() const { return row.begin + first_chunk * row.chunk_size; }
  __device__ __forceinline__ int end() const { return min(row.begin + end_chunk * row.chunk_size, row.keys); }
  // The chunks of one state; no cut lies among them.
  __device__ __forceinline__ bool is_whole() const { return slot < 0 || end_chunk <= whole; }
  __device__ __forceinline__ bool is_end() const { return slot >= 0 && first_chunk > 0 && end_chunk == row.num_chunks; }
};

// The keys of one item as one warp walks them: tiles at pos, pos + 64, ... of the head that begins at `head` in every block.
struct Walk {
  const int32_t* table;
  int64_t head;
  int pos, end;
};

// A call with the numbers derived from its shape.
struct Problem : DecodeCall {
  int team, column_groups, columns, stages, most_chunks;
  int64_t arrivals, pieces, rows, stats, partials;
  int32_t signature;

  Problem(const DecodeCall& call, int stages_)
      : DecodeCall(call), team(shape.team()), column_groups(shape.column_groups()), columns(shape.columns_per_group()),
        stages(stages_), most_chunks(shape.most_chunks()), arrivals(shape.arrivals()), pieces(shape.pieces()), rows(shape.rows()),
        stats(shape.stats()), partials(shape.partials()), signature(shape.signature()) {}
};

template <typename C>
class Decoder {
  using T = typename C::T;
  static constexpr int D = C::kHeadDim, NT = C::kColumnTiles;
  static constexpr int kQuads = D / 4;  // of a column; a thread merges kGroups of all columns' quads
  static constexpr int kGroups = kQuads * C::kColumns / kDecodeThreads;
  static constexpr int kAhead = 16;  // tiles whose blocks are known
  static constexpr int kAtOnce = 4;  // states that are loaded before the first is merged
  // From so many chunks on they go through shared memory; wide tiles have no registers left for it.
  static constexpr int kStagedFrom = C::kColumns == 8 && D <= 128 ? 8 : INT32_MAX;

 public:
  __device__ Decoder(const Problem& call, char* shared)
      : call_(call), warp_(threadIdx.x / 32), lane_(threadIdx.x % 32), g_(lane_ / 4), t_(lane_ % 4) {
    columns_ = call.columns;
    team_ = blockIdx.x / call.team, member_ = blockIdx.x % call.team;
    shared_ = shared;
    merge_ = reinterpret_cast<float*>(shared + C::pipeline_bytes(call.stages));
    queries_ = reinterpret_cast<uint32_t*>(merge_ + C::merge_buffers(columns_) * C::merge_floats(columns_));
    pipeline_ = shared_address(shared) + warp_ * (call.stages * 2 * C::kTileBytes);
    scale_ = call.scale * kLog2e;
  }

  __device__ __forceinline__ void run() {
    wait_for_predecessors();
    let_dependents_launch();  // they get places as thread blocks end: all of these have theirs
    // All at once: each look at the plan costs a trip to the L2.
    const auto* piece = reinterpret_cast<const PlanPiece*>(call_.plan + call_.pieces) + team_;
    const int4 header = *reinterpret_cast<const int4*>(call_.plan);
    from_ = piece->from, to_ = piece->to;
    Item item{piece->first};
    if (header.x != call_.signature) return fill_rows(0, NAN);  // not of these shapes: loud, and nothing out of bounds
    if (call_.alone) fill_rows(header.y, 0.0f);
    if (!set_chunks(item, first_row(from_, to_))) return;
    next_load_ = walk_of(item), next_blocks_ = blocks_from(next_load_);
    hop();
    while (true) {
      // Known before it is needed, so that loading can run on into it.
      Item next;
      const bool more = item_after(item, next);
      hopped_ = false;
      next_load_ = more ? walk_of(next) : Walk{};
      next_blocks_ = blocks_from(next_load_);
      fill_pipeline();
      process(item);
      if (!more) break;
      if (!hopped_) hop();
      item = next;
    }
  }

 private:
  const Problem& call_;
  PlanCut from_, to_;
  const int warp_, lane_, g_, t_;
  int columns_, team_, member_;  // of the team, this thread block takes one head
  char* shared_;  // the pipelines of all warps
  float* merge_;
  uint32_t* queries_;  // as fragments, [index][lane]
  uint32_t pipeline_;
  float scale_;
  // Loading runs up to stages - 1 tiles ahead of computing, perhaps into the next item.
  Walk load_, next_load_;
  bool hopped_ = false;  // load_ is in the next item already
  int load_stage_ = 0, stage_ = 0, pending_ = 0;  // pending: tiles loaded or on their way that are not computed yet
  int merge_buffer_ = 0;
  // Entries of the block table, for kAhead tiles at a time: lane 2 n has the block of rows 0-7 of tile n, lane 2 n + 1 of rows 8-15.
  // They are read a tile before they are needed, those of the next item while this one is computed.
  int32_t blocks_, next_blocks_;
  int tile_ = 0;  // of blocks_, the one to load next

  // Fills an item whose row is known; false if none of it lies in the piece.
  __device__ __forceinline__ bool set_chunks(Item& item, int index) const {
    const bool begun = index == from_.row && from_.chunk > 0, cut = index == to_.row;
    item.index = index;
    item.first_chunk = begun ? from_.chunk : 0, item.end_chunk = cut ? to_.chunk : item.row.num_chunks;
    item.slot = begun ? from_.slot : (cut ? to_.slot : -1), item.whole = begun ? from_.whole : to_.whole;
    return index < to_.row || (cut && item.first_chunk < item.end_chunk);
  }

  // In the order of plan.h; false if `item` was the last.
  __device__ __forceinline__ bool item_after(const Item& item, Item& next) const {
    if (item.index == from_.row && from_.chunk > 0) return false;
    int index = item.index == to_.row ? first_within(from_) : item.index + 1;
    if (index >= to_.row) {
      if (from_.chunk == 0) return false;
      index = from_.row;
    }
    next.row = reinterpret_cast<const PlanRow*>(call_.plan + call_.rows)[index];
    return set_chunks(next, index);
  }

  // Rows of the output from `first` on; log-sum-exp of no keys.
  __device__ __forceinline__ void fill_rows(int first, float value) const {
    const int64_t row_size = int64_t{call_.num_heads} * call_.shape.head_dim;
    for (int64_t row = first + blockIdx.x; row < call_.num_tokens; row += gridDim.x) {
      for (int64_t i = threadIdx.x; i < row_size; i += kDecodeThreads)
        static_cast<T*>(call_.out)[row * row_size + i] = narrow<T>(value);
      for (int h = threadIdx.x; call_.lse != nullptr && h < call_.num_heads; h += kDecodeThreads)
        call_.lse[row * call_.num_heads + h] = value == 0.0f ? -INFINITY : value;
    }
  }

  // Of all heads and groups of columns, the one that this thread block computes.
  __device__ __forceinline__ int head_of(const Item& item) const { return item.row.round * call_.team + member_; }
  __device__ __forceinline__ int kv_head_of(int head) const { return call_.column_groups == 1 ? head : head / call_.column_groups; }

  // Column c of a row is this query of its sequence; divisions are slow.
  __device__ __forceinline__ int query_of(int column) const {
    return call_.shape.max_queries == 1 ? 0 : column / call_.shape.group;
  }

  __device__ __forceinline__ Walk walk_of(const Item& item) const {
    const int64_t kv_head = kv_head_of(head_of(item));
    return {call_.block_tables + item.row.seq * call_.table_stride, (kv_head << call_.block_shift) * call_.shape.head_dim,
            item.begin() + warp_ * kDecodeKeys, item.end()};
  }

  __device__ __forceinline__ void hop() {
    load_ = next_load_, hopped_ = true;
    blocks_ = next_blocks_, tile_ = 0;
  }

  // This lane's entry of the block table.
  __device__ __forceinline__ int32_t blocks_from(const Walk& walk) const {
    if (walk.pos >= walk.end) return 0;
    const int key = walk.pos + lane_ / 2 * (kDecodeWarps * kDecodeKeys) + lane_ % 2 * (kDecodeKeys / 2);
    return walk.table[min(key, walk.end - 1) >> call_.block_shift];
  }

  __device__ __forceinline__ void fill_pipeline() {
    for (int s = pending_; s < call_.stages - 1; ++s) load_tile();
  }

  // Starts the loads of one tile, if there is one: a group of keys and a group of values.
  __device__ __forceinline__ void load_tile() {
    if (load_.pos >= load_.end && !hopped_ && next_load_.table != nullptr) hop();
    if (load_.pos >= load_.end) return;
    const uint32_t keys = pipeline_ + load_stage_ * (2 * C::kTileBytes);
    const int32_t low = __shfl_sync(0xffffffffu, blocks_, 2 * tile_), high = __shfl_sync(0xffffffffu, blocks_, 2 * tile_ + 1);
    load_rows(keys, call_.k, low, high);
    copy_async_commit();
    load_rows(keys + C::kTileBytes, call_.v, low, high);
    copy_async_commit();
    load_stage_ = load_stage_ + 1 == call_.stages ? 0 : load_stage_ + 1;
    ++pending_;
    load_.pos += kDecodeWarps * kDecodeKeys;
    if (++tile_ == kAhead) blocks_ = blocks_from(load_), tile_ = 0;
  }

  // Waits until at most n of the groups of this warp are under way: with kMostStages tiles of two groups, never more than 7.
  __device__ __forceinline__ static void wait_groups(int n) {
    if (n >= 7) copy_async_wait<7>();
    else if (n == 6) copy_async_wait<6>();
    else if (n == 5) copy_async_wait<5>();
    else if (n == 4) copy_async_wait<4>();
    else if (n == 3) copy_async_wait<3>();
    else if (n == 2) copy_async_wait<2>();
    else if (n == 1) copy_async_wait<1>();
    else copy_async_wait<0>();
  }

  // 16 rows of the cache, 8 of each block; rows beyond the end and elements beyond head_dim become zeros, without being read.
  __device__ __forceinline__ void load_rows(uint32_t target, const KvSide& side, int32_t low, int32_t high) const {
    const int head_dim = call_.shape.head_dim, block_size = 1 << call_.block_shift;
    const auto* base = static_cast<const T*>(side.data) + load_.head;
#pragma unroll
    for (int i = 0; i < kDecodeKeys * C::kRowChunks / 32; ++i) {
      const int index = i * 32 + lane_, row = index / C::kRowChunks, chunk = index % C::kRowChunks;
      const int key = load_.pos + row;
      const bool valid = key < load_.end && chunk * 8 < head_dim;
      const int32_t block = row < 8 ? low : high;
      const T* source = base + block * side.block_stride + (key & (block_size - 1)) * head_dim + chunk * 8;
      copy_async_once(target + (row * C::kRowChunks + (chunk ^ (row & 7))) * 16, valid ? source : base, valid);
    }
  }

  __device__ __forceinline__ void process(const Item& item) {
    const PlanRow& row = item.row;
    const int head = head_of(item), kv_head = kv_head_of(head);
    const int column0 = (head - kv_head * call_.column_groups) * C::kColumns;
    Queries q;
    load_queries(row, kv_head, column0, q);
    if (C::kQueriesInShared) __syncthreads();
    // What a column sees: the keys [lowest, limit).
    int limit[NT][2], lowest[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int query = min(query_of(column0 + n * 8 + 2 * t_ + j), row.num_queries - 1);
        limit[n][j] = row.keys - row.num_queries + query + 1;
        lowest[n][j] = call_.shape.window > 0 ? limit[n][j] - call_.shape.window : 0;
      }
    const int first_limit = row.keys - row.num_queries + 1;
    const int last_lowest = call_.shape.window > 0 ? row.keys - call_.shape.window : 0;

    float4 outputs[kGroups] = {};
    State states[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) states[k] = {0.0f, -INFINITY};
    // Whether the states before this item's are in memory is asked here and answered at the end of the first chunk.
    bool gathering = !item.is_whole();
    int32_t arrived = 0;
    if (item.is_end() && threadIdx.x == 0) arrived = load_relaxed(arrivals_of(item));
    for (int chunk = item.first_chunk, pos = item.begin() + warp_ * kDecodeKeys; chunk < item.end_chunk; ++chunk) {
      const int end = min(row.begin + (chunk + 1) * row.chunk_size, row.keys);
      float o[NT][C::kSteps][4] = {}, m[NT][2], l[NT][2] = {};
#pragma unroll
      for (int n = 0; n < NT; ++n) m[n][0] = m[n][1] = -INFINITY;
      for (; pos < end; pos += kDecodeWarps * kDecodeKeys) {
        const bool masked = pos + kDecodeKeys > min(first_limit, end) || pos < last_lowest;
        tile(q, o, m, l, pos, masked, limit, lowest, end);
      }
      put_state(o, m, l);
      if (chunk == item.first_chunk && item.is_end()) {
        if (arrived == item.first_chunk) acquire();
        if (__syncthreads_or(arrived == item.first_chunk)) {
          gather(item, item.first_chunk, outputs, states);
          gathering = false;
        }
      } else {
        __syncthreads();
      }
      merge_warps(outputs, states);
      if (C::merge_buffers(columns_) == 1) __syncthreads();
      else merge_buffer_ ^= 1;  // the other warps may still read this one
      if (gathering) leave(item, chunk, outputs, states);
    }
    if (item.slot >= 0 && item.first_chunk == 0) leave(item, 0, outputs, states);
    if (item.slot >= 0 && (gathering || item.first_chunk == 0)) {
      if (!is_last(item)) return;
      const bool many = row.num_chunks - item.whole >= kStagedFrom;
      if (many && next_load_.table == nullptr) gather_at_once(item, outputs, states);
      else gather(item, row.num_chunks, outputs, states);
    } else if (item.slot >= 0 && threadIdx.x == 0) {
      *arrivals_of(item) = 0;  // ready for the next layer
    }
#pragma unroll
    for (int k = 0; k < kGroups; ++k) write(row, kv_head, column0, k, outputs[k], states[k]);
  }

  // The columns of an item as B fragments.
  struct Queries {
    uint32_t pairs[NT][C::kQueriesInShared ? 1 : C::kSteps][2];
  };

  __device__ __forceinline__ uint32_t query(const Queries& q, int n, int step, int j) const {
    if constexpr (C::kQueriesInShared) return queries_[((n * C::kSteps + step) * 2 + j) * 32 + lane_];
    else return q.pairs[n][step][j];
  }

  __device__ __forceinline__ void load_queries(const PlanRow& row, int kv_head, int column0, Queries& q) const {
    const int group = call_.shape.group, total = row.num_queries * group;
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int column = column0 + n * 8 + g_, query = query_of(column);
      const auto* source = static_cast<const T*>(call_.q) + (row.first_query + query) * call_.q_token_stride +
                           (kv_head * group + column - query * group) * call_.q_head_stride;
#pragma unroll
      for (int s = 0; s < C::kSteps; ++s)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int d = s * 16 + j * 8 + 2 * t_;
          const uint32_t pair = column < total && d < call_.shape.head_dim ? *reinterpret_cast<const uint32_t*>(source + d) : 0;
          if constexpr (!C::kQueriesInShared) q.pairs[n][s][j] = pair;
          else if (warp_ == 0) queries_[((n * C::kSteps + s) * 2 + j) * 32 + lane_] = pair;
        }
    }
  }

  // Scores of 16 keys, online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867), and their values added to o.
  __device__ __forceinline__ void tile(const Queries& q, float (&o)[NT][C::kSteps][4], float (&m)[NT][2],
                                       float (&l)[NT][2], int pos, bool masked, const int (&limit)[NT][2],
                                       const int (&lowest)[NT][2], int end) {
    const uint32_t keys = pipeline_ + stage_ * (2 * C::kTileBytes), values = keys + C::kTileBytes;
    stage_ = stage_ + 1 == call_.stages ? 0 : stage_ + 1;
    __syncwarp();  // all lanes have left the stage that is loaded next
    load_tile();
    wait_groups(2 * pending_ - 1);
    __syncwarp();  // all lanes' copies are here

    float s[NT][4] = {};
    const int row = lane_ % 8 + (lane_ / 8 % 2) * 8;
#pragma unroll
    for (int k = 0; k < C::kSteps; ++k) {
      uint32_t a[4];
      load_matrices(a, keys + (row * C::kRowChunks + ((2 * k + lane_ / 16) ^ (row & 7))) * 16);
#pragma unroll
      for (int n = 0; n < NT; ++n) multiply_add<T>(s[n], a, query(q, n, k, 0), query(q, n, k, 1));
    }

    uint32_t p[NT][2];
    bool grown = false;
    float old_part[NT][2];
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x = s[n][i] * scale_;
        if (call_.softcap > 0.0f) x = kLog2e * call_.softcap * tanhf(s[n][i] * call_.scale / call_.softcap);
        const int key = pos + g_ + (i / 2) * 8;
        if (masked && (key >= min(limit[n][i % 2], end) || key < lowest[n][i % 2])) x = -INFINITY;
        s[n][i] = x;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float top = fmaxf(s[n][j], s[n][j + 2]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, d));
        top = fmaxf(top, m[n][j]);
        grown |= top > m[n][j];
        const float base = top == -INFINITY ? 0.0f : top;
        old_part[n][j] = exp2_fast(m[n][j] - base);
        m[n][j] = top;
        s[n][j] = exp2_fast(s[n][j] - base);
        s[n][j + 2] = exp2_fast(s[n][j + 2] - base);
        l[n][j] = l[n][j] * old_part[n][j] + (s[n][j] + s[n][j + 2]);
      }
      p[n][0] = transpose_matrix(pack_pair<T>(s[n][0], s[n][1]));
      p[n][1] = transpose_matrix(pack_pair<T>(s[n][2], s[n][3]));
    }
    if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int k = 0; k < C::kSteps; ++k)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[n][k][i] *= old_part[n][i % 2];
    }

    wait_groups(2 * --pending_);
    __syncwarp();
    const int key_row = lane_ % 8 + (lane_ / 16) * 8;
#pragma unroll
    for (int k = 0; k < C::kSteps; ++k) {
      uint32_t a[4];
      load_matrices_transposed(a, values + (key_row * C::kRowChunks + ((2 * k + lane_ / 8 % 2) ^ (key_row & 7))) * 16);
#pragma unroll
      for (int n = 0; n < NT; ++n) multiply_add<T>(o[n][k], a, p[n][0], p[n][1]);
    }
  }

  __device__ __forceinline__ void put_state(const float (&o)[NT][C::kSteps][4], const float (&m)[NT][2],
                            const float (&l)[NT][2]) const {
    float* shared = merge_ + merge_buffer_ * C::merge_floats(columns_);
    auto* states = reinterpret_cast<State*>(shared) + warp_ * columns_;
    float* rows = shared + kDecodeWarps * columns_ * 2 + warp_ * columns_ * C::kRowFloats;
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = n * 8 + 2 * t_ + j;
        float sum = l[n][j];
#pragma unroll
        for (int d = 4; d < 32; d *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        if (column >= columns_) continue;
        if (g_ == 0) states[column] = {sum, m[n][j]};
        float* row = rows + column * C::kRowFloats + g_;
#pragma unroll
        for (int k = 0; k < C::kSteps; ++k) row[k * 16] = o[n][k][j], row[k * 16 + 8] = o[n][k][j + 2];
      }
  }

  // Group k of this thread: a quad of elements of a column.
  __device__ __forceinline__ static int column_of(int k) { return (k * kDecodeThreads + threadIdx.x) / kQuads; }
  __device__ __forceinline__ static int element_of() { return threadIdx.x % kQuads * 4; }

  // Merges the four warps' states, and that into the state of the row, or in its place for a split row.
  __device__ __forceinline__ void merge_warps(float4 (&outputs)[kGroups], State (&row)[kGroups]) const {
    const float* shared = merge_ + merge_buffer_ * C::merge_floats(columns_);
    const float* rows = shared + kDecodeWarps * columns_ * 2;
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const int column = column_of(k);
      if (column >= columns_) continue;
      State warps[kDecodeWarps], chunk{0.0f, -INFINITY};
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        warps[w] = reinterpret_cast<const State*>(shared)[w * columns_ + column];
        chunk.m = fmaxf(chunk.m, warps[w].m);
      }
      float4 o{};
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float factor = part(warps[w].m, chunk.m);
        const auto* quad = reinterpret_cast<const float4*>(rows + (w * columns_ + column) * C::kRowFloats + element_of());
        o = scaled_sum(*quad, factor, o, 1.0f);
        chunk.l = __fmaf_rn(warps[w].l, factor, chunk.l);
      }
      merge<1>(row[k], outputs[k], {chunk}, {o});
    }
  }

  __device__ __forceinline__ void write(const PlanRow& row, int kv_head, int column0, int k, float4 o, State state) const {
    const int group = call_.shape.group, head_dim = call_.shape.head_dim, column = column0 + column_of(k), d = element_of();
    if (column_of(k) >= columns_ || column >= row.num_queries * group || d >= head_dim) return;
    const int query = query_of(column);
    const int64_t at = int64_t{row.first_query + query} * call_.num_heads + kv_head * group + column - query * group;
    const float inverse = state.l == 0.0f ? 0.0f : __fdividef(1.0f, state.l);
    *reinterpret_cast<uint2*>(static_cast<T*>(call_.out) + at * head_dim + d) =
        make_uint2(pack_pair<T>(o.x * inverse, o.y * inverse), pack_pair<T>(o.z * inverse, o.w * inverse));
    if (d == 0 && call_.lse != nullptr) call_.lse[at] = state.m == -INFINITY ? -INFINITY : state.m * kLn2 + logf(state.l);
  }

  // Of a cut row and this head: where things lie.
  __device__ __forceinline__ int place_of(const Item& item) const { return item.slot * call_.team + member_; }
  __device__ __forceinline__ int32_t* arrivals_of(const Item& item) const { return call_.plan + call_.arrivals + place_of(item); }
  __device__ __forceinline__ int64_t state_index(const Item& item, int chunk, int column) const {
    return (int64_t{place_of(item)} * call_.most_chunks + chunk) * columns_ + column;
  }

  // Leaves a state in memory and begins anew.
  __device__ __forceinline__ void leave(const Item& item, int chunk, float4 (&outputs)[kGroups], State (&states)[kGroups]) const {
    const int head_dim = call_.shape.head_dim, d = element_of();
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (column_of(k) < columns_ && d < head_dim) {
        const int64_t at = state_index(item, chunk, column_of(k));
        __stcg(reinterpret_cast<float4*>(call_.plan + call_.partials + at * head_dim + d), outputs[k]);
        if (d == 0) __stcg(reinterpret_cast<float2*>(call_.plan + call_.stats) + at, make_float2(states[k].l, states[k].m));
      }
      outputs[k] = {}, states[k] = {0.0f, -INFINITY};
    }
  }

  // Counts the chunks of a cut row that are in memory; true for the thread block that completes them.
  __device__ __forceinline__ bool is_last(const Item& item) const {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      const int mine = item.end_chunk - item.first_chunk;
      last = add_acquire_release(arrivals_of(item), mine) + mine == item.row.num_chunks;
      if (last) *arrivals_of(item) = 0;  // ready for the next layer
    }
    return __syncthreads_or(last);
  }

  // Merges the states of a cut row's first chunks, in order, into empty ones.
  __device__ __forceinline__ void gather(const Item& item, int end_chunk, float4 (&outputs)[kGroups], State (&totals)[kGroups]) const {
    const int head_dim = call_.shape.head_dim, d = element_of();
    const int count = end_chunk - item.whole + 1;  // of states: of the first chunks there is one
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      if (column_of(k) >= columns_ || d >= head_dim) continue;
      const int64_t first = state_index(item, 0, column_of(k));
      const auto* states = reinterpret_cast<const float2*>(call_.plan + call_.stats) + first;
      const float* partials = reinterpret_cast<const float*>(call_.plan + call_.partials) + first * head_dim + d;
      for (int done = 0; done < count; done += kAtOnce) {
        State state[kAtOnce];
        float4 partial[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int n = done + i, c = n == 0 ? 0 : item.whole - 1 + n;
          state[i] = {0.0f, -INFINITY}, partial[i] = {};  // merging these changes nothing
          if (n >= count) continue;
          const float2 stat = __ldcg(states + c * columns_);
          state[i] = {stat.x, stat.y};
          partial[i] = __ldcg(reinterpret_cast<const float4*>(partials + c * columns_ * head_dim));
        }
        merge(totals[k], outputs[k], state, partial);
      }
    }
  }

  // The same for many states of all chunks, at the end of the thread block's work: through its pipeline, which has room for them, they
  // cost one trip to the L2 and not one for every few.
  __device__ __forceinline__ void gather_at_once(const Item& item, float4 (&outputs)[kGroups], State (&totals)[kGroups]) const {
    const int head_dim = call_.shape.head_dim, quads = columns_ * head_dim / 4, count = item.row.num_chunks - item.whole + 1;
    const int room = C::pipeline_bytes(call_.stages) / (quads * 16);
    const auto* partials = reinterpret_cast<const float4*>(call_.plan + call_.partials) + state_index(item, 0, 0) * (head_dim / 4);
    const auto* stats = reinterpret_cast<const float2*>(call_.plan + call_.stats) + state_index(item, 0, 0);
    auto* staged = reinterpret_cast<float4*>(shared_);
    auto* staged_stats = reinterpret_cast<float2*>(merge_);
    for (int done = 0; done < count; done += room) {
      const int n = min(room, count - done), skipped = done + item.whole - 1;  // but for the first state: chunk - index here
      if (done > 0) __syncthreads();
      for (int i = threadIdx.x; i < n * quads; i += kDecodeThreads)
        copy_async(shared_address(staged + i), partials + i + (done > 0 || i >= quads ? skipped : 0) * quads);
      copy_async_commit();
      for (int i = threadIdx.x; i < n * columns_; i += kDecodeThreads)
        staged_stats[i] = __ldcg(stats + i + (done > 0 || i >= columns_ ? skipped : 0) * columns_);
      copy_async_wait<0>();
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (column_of(k) >= columns_ || element_of() >= head_dim) continue;
#pragma unroll 4
        for (int i = 0; i < n; ++i) {
          const float2 stat = staged_stats[i * columns_ + column_of(k)];
          merge<1>(totals[k], outputs[k], {{stat.x, stat.y}}, {staged[i * quads + (column_of(k) * head_dim + element_of()) / 4]});
        }
      }
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(const __grid_constant__ Problem call) {
  extern __shared__ __align__(128) char shared[];
  Decoder<C>(call, shared).run();
}

struct Device {
  int sms = 0, shared_per_sm = 0, shared_per_block = 0;
};

// Asked once a thread and device: the answers cost more than a small kernel's launch.
const Device& current_device() {
  thread_local Device device;
  thread_local int known = -1;
  int index = 0;
  cudaGetDevice(&index);
  if (index != known) {
    cudaDeviceGetAttribute(&device.sms, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&device.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
    cudaDeviceGetAttribute(&device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    known = index;
  }
  return device;
}

struct Grid {
  int stages, ctas;
};

// The deepest pipeline with two thread blocks an SM, else with one; no thread blocks where nothing fits.
template <typename C>
Grid grid_of(int columns) {
  const Device& device = current_device();
  constexpr int kReserved = 1024;  // what the driver takes of each block
  for (int blocks = 2; blocks > 0; --blocks)
    for (int stages = kMostStages; stages >= 2; --stages) {
      const int bytes = C::shared_bytes(columns, stages);
      if (bytes <= device.shared_per_block && blocks * (bytes + kReserved) <= device.shared_per_sm)
        return {stages, std::min(blocks * device.sms, kMostTeams)};
    }
  return {0, 0};
}

// Calls f with the configuration for a shape.
template <typename T, typename F>
auto with_config(const DecodeShape& shape, const F& f) {
  const bool wide = shape.tile_columns() == 16;
  if (shape.head_dim <= 64) return wide ? f(Config<T, 64, 16>{}) : f(Config<T, 64, 8>{});
  if (shape.head_dim <= 128) return wide ? f(Config<T, 128, 16>{}) : f(Config<T, 128, 8>{});
  return f(Config<T, 256, 8>{});
}

template <typename C>
const char* launch(const DecodeCall& call, cudaStream_t stream) {
  const int columns = call.shape.columns_per_group(), stages = grid_of<C>(columns).stages;
  const int bytes = C::shared_bytes(columns, stages);
  const cudaError_t error = cudaFuncSetAttribute(decode_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error_text(error);
  return launch_overlapped(decode_kernel<C>, call.shape.grid(), kDecodeThreads, bytes, stream, Problem(call, stages));
}

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace

bool can_decode(const DecodeCall& call) {
  const auto whole = [](const KvSide& side) { return aligned(side.data, 16) && side.block_stride % 8 == 0; };
  return call.dtype != DtypeCode::kFloat32 && call.head_dim % 8 == 0 && call.shape.num_ctas > 0 && aligned(call.q, 4) &&
         call.q_token_stride % 2 == 0 && call.q_head_stride % 2 == 0 && whole(call.k) && whole(call.v);
}

int decode_grid(const DecodeShape& shape) {
  return with_config<__half>(shape, [&](auto config) { return grid_of<decltype(config)>(shape.columns_per_group()).ctas; });
}

const char* launch_decode(const DecodeCall& call, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const auto run = [&](auto config) { return launch<decltype(config)>(call, s); };
  return call.dtype == DtypeCode::kBFloat16 ? with_config<__nv_bfloat16>(call.shape, run) : with_config<__half>(call.shape, run);
}

}  // namespace minivllm::attention
