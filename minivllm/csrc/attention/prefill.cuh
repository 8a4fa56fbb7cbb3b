// Attention of many queries on tensor cores (sm_80 and later, mma.sync): FlashAttention-2's algorithm (Dao 2023,
// arXiv:2307.08691). A block keeps its rows' queries in shared memory and their outputs in registers, and walks over tiles of
// keys and values, last to first, under an online softmax; while it works on one tile, cp.async brings the next. tiles.h says
// how large tiles are and why, schedule.cuh which block takes which.
//
// Outputs are rescaled only when a row's scores grew by much (FlashAttention-4, Zadouri et al. 2026). That is hardly ever after
// the first tile, so no row waits for its largest score, and exponentials start at once.
//
// Tiles of keys begin at fixed positions of the sequence, and a tile that a row does not see changes nothing of it to the bit.
// So a row's result depends on its query and the keys and values it sees, and not on its neighbours, chunks or pages.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "attention/prefill_float32.cuh"
#include "attention/schedule.cuh"
#include "attention/tiles.h"
#include "common/mma.cuh"
#include "common/vec.cuh"

namespace minivllm::attention {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// What PrefillWorker subtracts from scores before it takes their exponentials: at first less than any score, but not -infinity,
// which hidden keys score, because their difference would be no number. Exponentials reach 2^kSlack, little in float16 too.
constexpr float kNoBase = -3e38f, kSlack = 8.0f;

// 4 bytes from global to shared memory; nothing is read and 0 written where not valid.
__device__ __forceinline__ void copy_word_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(source), "r"(valid ? 4 : 0) : "memory");
}

// Rows of kHeadDim 16-bit values in shared memory. Their 16-byte chunks are permuted by an exclusive or with bits of the row
// number, so that the same chunk of 8 consecutive rows lies in 8 different groups of banks: ldmatrix reads without conflicts.
template <int kHeadDim>
struct Swizzle {
  static constexpr int kPitch = kHeadDim * 2, kChunks = kHeadDim / 8;
  static constexpr int kBits = kHeadDim % 64 == 0 ? 7 : 3;  // 96: even and odd rows differ by half of the banks already

  static __device__ __forceinline__ int twist(int row) { return kBits == 7 ? row & 7 : (row >> 1) & 3; }
  // Byte offset of a chunk of a row.
  static __device__ __forceinline__ int offset(int row, int chunk) { return row * kPitch + (chunk ^ twist(row)) * 16; }
  // Byte offset within a row of chunk `pair` * 2 + c, where twisted = (c ^ twist(row)) * 16; `pair` is known to the compiler.
  static __device__ __forceinline__ uint32_t within(int pair, uint32_t twisted) {
    constexpr int low = kBits * 16;
    return ((pair * 32 & low) ^ twisted) + (pair * 32 & ~low);
  }
};

// A chunk of 8 values, `count` of them real and the others 0, where 16-byte copies are not possible.
template <typename T>
__device__ __forceinline__ void copy_chunk_slowly(char* target, const T* source, int count) {
  Vec<T, 8> chunk;
#pragma unroll
  for (int i = 0; i < 8; ++i) chunk.data[i] = i < count ? source[i] : narrow<T>(0.0f);
  *reinterpret_cast<Vec<T, 8>*>(target) = chunk;
}

// Hides from the compiler how a value came about, so that it is kept and not computed anew at each use.
__device__ __forceinline__ uint32_t pinned(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// One block's work.
template <typename T, typename C, bool kPaged>
struct PrefillWorker {
  using S = Swizzle<C::kHeadDim>;
  static constexpr int kKeyTiles = C::kKeys / 8, kWidthTiles = C::kHeadDim / 8;  // n8 tiles of scores and outputs
  // Copies: kLanes threads take a row, each every kLanes-th chunk; the twist of a thread's rows is the same for all of them.
  static constexpr int kLanes = C::kHeadDim % 64 == 0 ? 8 : 4, kParts = S::kChunks / kLanes, kStep = C::kThreads / kLanes;

  const Prefill& p;
  const Group& group;
  const RowTile tile;
  const KeyTiles tiles;
  const bool wide;        // every row of q, k and v is whole chunks at 16-byte addresses
  char* const shared;
  const uint32_t queries, keys, values, pages;  // addresses in shared memory
  const int my_row, my_chunk;                   // of the copies of this thread: the first

  struct Sources {
    const T *k, *v;
  };

  uint32_t held[C::kHeldSlots][C::kRowTiles][4];  // the first C::kHeld fragments of queries
  float out[C::kRowTiles][kWidthTiles][4];
  // Of rows g and g + 8: what is subtracted from scores * unit; this thread's part of the sum of exponentials.
  float base[C::kRowTiles][2], sum[C::kRowTiles][2];

  __device__ __forceinline__ PrefillWorker(const Prefill& p, const Group& group, const RowTile& tile, const KeyTiles& tiles,
                                           bool wide, char* shared)
      : p(p), group(group), tile(tile), tiles(tiles), wide(wide), shared(shared), queries(pinned(shared_address(shared))),
        keys(queries + C::kQueryBytes), values(keys + C::kStages * C::kTileBytes), pages(values + C::kStages * C::kTileBytes),
        my_row(threadIdx.x / kLanes), my_chunk(threadIdx.x % kLanes) {}

  // This thread's chunks of its copy i: row my_row + i * kStep. Zeros beyond head_dim, and for a row that is not valid.
  __device__ __forceinline__ void copy_row(uint32_t area, int i, const T* source, bool valid) const {
    // a twist is the same for rows kStep apart, and less than kLanes
    const uint32_t place = area + S::offset(my_row, my_chunk) + i * kStep * S::kPitch;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int column = (my_chunk + part * kLanes) * 8;
      const T* from = source + part * kLanes * 8;
      if (wide) {
        copy_async(place + part * kLanes * 16, from, valid && column < p.head_dim);
      } else {
        copy_chunk_slowly(shared + (place + part * kLanes * 16 - queries), from, valid ? p.head_dim - column : 0);
      }
    }
  }

  // copy(i, source(i)) for i < kCount. All sources are known before the first copy waits for its turn.
  template <int kCount, typename Source, typename Copy>
  __device__ __forceinline__ void copy_rows(const Source& source, const Copy& copy) const {
    if (wide) {
      decltype(source(0)) sources[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) sources[i] = source(i);
#pragma unroll
      for (int i = 0; i < kCount; ++i) copy(i, sources[i]);
    } else {
#pragma unroll 1
      for (int i = 0; i < kCount; ++i) copy(i, source(i));
    }
  }

  __device__ __forceinline__ void load_queries() const {
    const T* head = static_cast<const T*>(p.q) + tile.q_begin * p.q_token_stride +
                    tile.kv_head * group.size * p.q_head_stride + my_chunk * 8;
    const auto source = [&](int i) {
      const int row = min(tile.row_begin + my_row + i * kStep, tile.row_end - 1), query = group.divide(row);
      return head + query * p.q_token_stride + (row - query * group.size) * p.q_head_stride;
    };
    const int rows = tile.row_end - tile.row_begin - my_row;
    copy_rows<C::kRows / kStep>(source, [&](int i, const T* from) { copy_row(queries, i, from, i * kStep < rows); });
  }

  // The blocks of the cache that hold the keys of tile n, one number for 8 keys; awaited with the tile loaded meanwhile.
  __device__ __forceinline__ void load_pages(int n) const {
    if (!kPaged || threadIdx.x >= C::kPages) return;
    const int key = n * C::kKeys + static_cast<int>(threadIdx.x) * 8;
    const int32_t* table = p.block_tables + tile.sequence * p.table_stride;
    const bool valid = n >= 0 && key < tile.len_k;
    copy_word_async(pages + ((n & 1) * C::kPages + threadIdx.x) * 4, table + (valid ? key >> p.block_shift : 0), valid);
  }

  // Keys and values of tile n into their stage. kLast: the tile may end beyond the sequence; rows there are not read, and 0.
  template <bool kLast>
  __device__ __forceinline__ void load_tile(int n) const {
    const uint32_t stage = (n & 1) * C::kTileBytes;
    const int32_t* page = reinterpret_cast<const int32_t*>(shared + (pages - queries)) + (n & 1) * C::kPages;
    const T* k_head = static_cast<const T*>(p.k.data) + tile.kv_head * p.k.head_stride + my_chunk * 8;
    const T* v_head = static_cast<const T*>(p.v.data) + tile.kv_head * p.v.head_stride + my_chunk * 8;
    const int first = n * C::kKeys + my_row;
    const auto source = [&](int i) {
      int64_t k_offset, v_offset;
      if (kPaged) {  // a block that does not exist is never read: its number is 0
        const int64_t block = page[(my_row + i * kStep) / 8];
        const int row = (first + i * kStep) & ((1 << p.block_shift) - 1);
        k_offset = block * p.k.block_stride + row * static_cast<int>(p.k.row_stride);
        v_offset = block * p.v.block_stride + row * static_cast<int>(p.v.row_stride);
      } else {
        const int64_t row = tile.kv_begin + min(first + i * kStep, kLast ? tile.len_k - 1 : first + i * kStep);
        k_offset = row * p.k.row_stride, v_offset = row * p.v.row_stride;
      }
      return Sources{k_head + k_offset, v_head + v_offset};
    };
    copy_rows<C::kKeys / kStep>(source, [&](int i, const Sources& from) {
      const bool valid = !kLast || first + i * kStep < tile.len_k;
      copy_row(keys + stage, i, from.k, valid);
      copy_row(values + stage, i, from.v, valid);
    });
  }

  // Fragments of this warp's queries: columns 16 * d to 16 * d + 15, the left sides of products with keys.
  struct QueryFragments {
    uint32_t begin, twisted;

    __device__ __forceinline__ explicit QueryFragments(uint32_t queries) {
      const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 * C::kRowTiles + lane % 16;
      begin = queries + row * S::kPitch, twisted = (lane / 16 ^ S::twist(row)) * 16;
    }
    __device__ __forceinline__ void fetch(int d, uint32_t (&a)[C::kRowTiles][4]) const {
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) load_matrices(a[m], begin + S::within(d, twisted) + m * 16 * S::kPitch);
    }
  };

  // scores = queries of this warp times keys of tile n.
  template <int kCount>
  __device__ __forceinline__ void multiply_keys(int n, float (&scores)[C::kRowTiles][kCount][4]) const {
    const QueryFragments fragments(queries);
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8;
    const uint32_t begin = keys + (n & 1) * C::kTileBytes + row * S::kPitch;
    const uint32_t twisted = (lane / 8 % 2 ^ S::twist(row)) * 16;
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      uint32_t fetched[C::kRowTiles][4];
      if (d >= C::kHeld) fragments.fetch(d, fetched);
      const auto& a = d < C::kHeld ? held[d % C::kHeldSlots] : fetched;
#pragma unroll
      for (int j = 0; j < kCount / 2; ++j) {
        uint32_t b[4];
        load_matrices(b, begin + S::within(d, twisted) + j * 16 * S::kPitch);
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
          multiply_add<T>(scores[m][2 * j], a[m], b[0], b[1]);
          multiply_add<T>(scores[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Scores other than scale * q k^T with a positive scale, in units of log2(e): capped, or of a scale below 0.
  template <int kCount>
  __device__ __forceinline__ void transform(float (&scores)[C::kRowTiles][kCount][4]) const {
    const bool capped = p.softcap > 0.0f;
    // softcap * tanh(x) = softcap - 2 softcap / (e^(2x) + 1)
    const float inside = capped ? 2.0f * kLog2E * p.scale / p.softcap : 0.0f, cap = p.softcap * kLog2E;
    const float factor = p.scale * kLog2E;
    const auto each = [&](const auto& change) {
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int j = 0; j < kCount; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[m][j][e] = change(scores[m][j][e]);
    };
    if (capped) each([&](float s) { return cap * (1.0f - __fdividef(2.0f, exp2_fast(s * inside) + 1.0f)); });
    else each([&](float s) { return s * factor; });
  }

  __device__ __forceinline__ int row_of(int m, int half) const {
    return tile.row_begin + (threadIdx.x / 32 * C::kRowTiles + m) * 16 + half * 8 + threadIdx.x % 32 / 4;
  }

  template <int kCount>
  __device__ __forceinline__ void mask(int n, float (&scores)[C::kRowTiles][kCount][4]) const {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = group.divide(min(row_of(m, half), tile.row_end - 1));
        const int first_key = n * C::kKeys + threadIdx.x % 4 * 2;
        const int begin = tile.first_visible(p, query) - first_key, end = tile.visible(p, query) - first_key;
#pragma unroll
        for (int j = 0; j < kCount; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (j * 8 + e < begin || j * 8 + e >= end) scores[m][j][2 * half + e] = -INFINITY;
      }
  }

  // Raises the base of rows whose scores lie above it by more than kSlack; what was summed before shrinks. A row's base is its
  // largest score when it last rose, so it seldom does after the first tile; where it stays the factor is 1.
  template <int kCount>
  __device__ __forceinline__ void raise_bases(float unit, const float (&scores)[C::kRowTiles][kCount][4]) {
    float largest[C::kRowTiles][2];
    bool above = false;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float of_thread = fmaxf(scores[m][0][2 * half], scores[m][0][2 * half + 1]);
#pragma unroll
        for (int j = 1; j < kCount; ++j)
          of_thread = fmaxf(of_thread, fmaxf(scores[m][j][2 * half], scores[m][j][2 * half + 1]));
        above |= fmaf(of_thread, unit, -base[m][half]) > kSlack;
        largest[m][half] = of_thread;
      }
    if (!__any_sync(0xffffffffu, above)) return;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
      float keep[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float of_row = largest[m][half];
        of_row = fmaxf(of_row, __shfl_xor_sync(0xffffffffu, of_row, 1));
        of_row = fmaxf(of_row, __shfl_xor_sync(0xffffffffu, of_row, 2));
        const float before = base[m][half];
        if (fmaf(of_row, unit, -before) > kSlack) base[m][half] = of_row * unit;
        keep[half] = exp2_fast(before - base[m][half]);
        sum[m][half] *= keep[half];
      }
#pragma unroll
      for (int j = 0; j < kWidthTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][j][e] *= keep[e / 2];
    }
  }

  // out += exponentials of scores times values of tile n. A product's result has the layout of the next one's left side.
  template <int kCount>
  __device__ __forceinline__ void multiply_values(int n, float unit, const float (&scores)[C::kRowTiles][kCount][4]) {
    const int lane = threadIdx.x % 32, row = lane % 16;
    const uint32_t begin = values + (n & 1) * C::kTileBytes + row * S::kPitch, twisted = (lane / 16 ^ S::twist(row)) * 16;
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      uint32_t a[C::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &scores[m][2 * k + i / 2][i % 2 * 2];
          const float low = exp2_fast(fmaf(pair[0], unit, -base[m][i % 2]));
          const float high = exp2_fast(fmaf(pair[1], unit, -base[m][i % 2]));
          sum[m][i % 2] += low + high;
          a[m][i] = pack_pair<T>(low, high);
        }
#pragma unroll
      for (int d = 0; d < kWidthTiles / 2; ++d) {
        uint32_t b[4];
        load_matrices_transposed(b, begin + k * 16 * S::kPitch + S::within(d, twisted));
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
          multiply_add<T>(out[m][2 * d], a[m], b[0], b[1]);
          multiply_add<T>(out[m][2 * d + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // The first kCount * 8 keys of tile n: all, or half, where no row sees more.
  template <int kCount>
  __device__ __forceinline__ void attend(int n, bool plain, bool whole, float unit) {
    float scores[C::kRowTiles][kCount][4] = {};
    multiply_keys(n, scores);
    if (!plain) transform(scores);
    if (!whole) mask(n, scores);
    raise_bases(unit, scores);
    multiply_values(n, unit, scores);
  }

  __device__ __forceinline__ void run() {
    const bool plain = p.softcap == 0.0f && p.scale > 0.0f;
    const float unit = plain ? p.scale * kLog2E : 1.0f;
    const int last = tiles.last;
    if (tiles.first <= last) {
      if (kPaged) {
        load_pages(last), load_pages(last - 1);
        copy_async_commit();
      }
      load_queries();
      if (kPaged) {
        copy_async_commit(), copy_async_wait<1>();
        __syncthreads();
      }
      load_tile<true>(last);
      copy_async_commit();
    }
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
      base[m][0] = base[m][1] = kNoBase, sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
      for (int j = 0; j < kWidthTiles; ++j) out[m][j][0] = out[m][j][1] = out[m][j][2] = out[m][j][3] = 0.0f;
    }
    copy_async_wait<0>();
    __syncthreads();  // the first tile has arrived
#pragma unroll
    for (int d = 0; d < C::kHeld; ++d) QueryFragments(queries).fetch(d, held[d]);
    for (int n = last; n >= tiles.first; --n) {
      if (n > tiles.first) {
        load_pages(n - 2);
        load_tile<false>(n - 1);
        copy_async_commit();
      }
      const bool whole = n >= tiles.whole_first && n <= tiles.whole_last;
      if (n < last || tiles.end - n * C::kKeys > C::kKeys / 2) attend<kKeyTiles>(n, plain, whole, unit);
      else attend<kKeyTiles / 2>(n, plain, whole, unit);
      copy_async_wait<0>();
      __syncthreads();  // tile n - 1 has arrived, and nobody reads the stage of tile n any more
    }
    write();
  }

  // Divides by the sums; 0 for a row without keys. Rows pass through shared memory, each warp's through its own queries' place.
  __device__ __forceinline__ void write() {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * C::kRowTiles;
    // Row r of this warp goes to row begin + offset of [num_tokens * num_heads]; lane r knows the offset.
    const int query = group.divide(tile.row_begin), next = p.num_heads - group.size;
    const int head = tile.kv_head * group.size + tile.row_begin - query * group.size;
    const int64_t begin = (int64_t{tile.q_begin} + query) * p.num_heads + head;
    const int offset = first + lane + (group.divide(tile.row_begin + first + lane) - query) * next;
    const int rows = tile.row_end - tile.row_begin - first;
    __syncwarp();
    const int twist = S::twist(lane / 4);
    char* const place = shared + (first + lane / 4) * S::kPitch + lane % 4 * 4;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[m][half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        sum[m][half] = total;
        const float factor = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
#pragma unroll
        for (int j = 0; j < kWidthTiles; ++j)
          *reinterpret_cast<uint32_t*>(place + (m * 16 + half * 8) * S::kPitch + S::within(j / 2, (j % 2 ^ twist) * 16)) =
              pack_pair<T>(out[m][j][2 * half] * factor, out[m][j][2 * half + 1] * factor);
      }
    __syncwarp();
    T* const target = static_cast<T*>(p.out) + begin * p.head_dim;
    constexpr int kStores = 16 * C::kRowTiles * S::kChunks / 32;  // of a thread
    const auto row_of_store = [&](int i) { return (i * 32 + lane) / S::kChunks; };
    const auto chunk_of_store = [&](int i) { return (i * 32 + lane) % S::kChunks; };
    if (p.head_dim % 8 == 0) {
      Vec<T, 8> chunks[kStores];
      int offsets[kStores];
#pragma unroll
      for (int i = 0; i < kStores; ++i) {
        chunks[i] = *reinterpret_cast<const Vec<T, 8>*>(shared + S::offset(first + row_of_store(i), chunk_of_store(i)));
        offsets[i] = __shfl_sync(0xffffffffu, offset, row_of_store(i));
      }
#pragma unroll
      for (int i = 0; i < kStores; ++i)
        if (row_of_store(i) < rows && chunk_of_store(i) * 8 < p.head_dim)
          *reinterpret_cast<Vec<T, 8>*>(target + offsets[i] * int64_t{p.head_dim} + chunk_of_store(i) * 8) = chunks[i];
    } else {
      for (int r = 0; r < min(rows, 16 * C::kRowTiles); ++r) {
        T* const row = target + __shfl_sync(0xffffffffu, offset, r) * int64_t{p.head_dim};
        for (int d = lane; d < p.head_dim; d += 32)
          row[d] = *reinterpret_cast<const T*>(shared + S::offset(first + r, d / 8) + d % 8 * 2);
      }
    }
    if (p.lse == nullptr) return;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = m * 16 + half * 8 + lane / 4, row_offset = __shfl_sync(0xffffffffu, offset, r);
        const float total = sum[m][half], lse = total == 0.0f ? -INFINITY : base[m][half] * kLn2 + logf(total);
        if (lane % 4 == 0 && r < rows) p.lse[begin + row_offset] = lse;
      }
  }
};

template <typename T, typename C, bool kPaged>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    prefill_kernel(const __grid_constant__ Prefill p, const __grid_constant__ Group group, bool wide) {
  extern __shared__ __align__(128) char shared_memory[];
  RowTile tile;
  if (!find_tile<kPaged>(p, group.size, C::kRows, tile)) return;
  PrefillWorker<T, C, kPaged> worker(p, group, tile, KeyTiles(p, group, tile, C::kKeys), wide, shared_memory);
  worker.run();
}

// Kernels with more than 48 KiB of shared memory ask for it once a device.
template <typename Kernel>
const char* allow_shared_memory(Kernel kernel, int bytes, std::atomic<uint64_t>& devices) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (error == cudaSuccess && (devices.load(std::memory_order_relaxed) & bit) == 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess && device < 64) devices.fetch_or(bit, std::memory_order_relaxed);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether a block on the current device may have so much.
inline bool has_shared_memory(int bytes) {
  int device = 0, most = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess && bytes <= most;
}

inline bool whole_chunks(const void* data, std::initializer_list<int64_t> strides) {
  for (int64_t stride : strides)
    if (stride % 8 != 0) return false;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

template <typename T, typename C, bool kPaged>
const char* launch_tiles(const Prefill& p, cudaStream_t stream) {
  static std::atomic<uint64_t> devices{0};
  const auto kernel = prefill_kernel<T, C, kPaged>;
  if (const char* error = allow_shared_memory(kernel, C::kSharedBytes, devices)) return error;
  const int64_t blocks = max_row_tiles(p, C::kRows) * p.num_kv_heads;
  if (blocks > 2147483647) return "more than 2^31 - 1 tiles";
  const bool wide = p.head_dim % 8 == 0 && whole_chunks(p.q, {p.q_token_stride, p.q_head_stride}) &&
                    whole_chunks(p.k.data, {p.k.block_stride, p.k.head_stride, p.k.row_stride}) &&
                    whole_chunks(p.v.data, {p.v.block_stride, p.v.head_stride, p.v.row_stride});
  kernel<<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(p, Group(p.num_heads / p.num_kv_heads), wide);
  return launch_error();
}

// The one place where a kernel is chosen; a Hopper kernel (wgmma, TMA) will be one more case.
template <bool kPaged>
const char* launch_prefill(const Prefill& p, void* stream) {
  if (p.num_tokens == 0) return nullptr;
  const int64_t rows = int64_t{p.num_tokens} * (p.num_heads / p.num_kv_heads);
  if (rows > 2147483647) return "more than 2^31 - 1 rows for a key-value head";
  const auto s = static_cast<cudaStream_t>(stream);
  return dispatch_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    if constexpr (std::is_same_v<T, float>) {
      return launch_float32<kPaged>(p, s);
    } else {
      if (p.head_dim <= 64) return launch_tiles<T, Tiles64, kPaged>(p, s);
      if (p.head_dim <= 96) return launch_tiles<T, Tiles96, kPaged>(p, s);
      if (p.head_dim <= 128) return launch_tiles<T, Tiles128, kPaged>(p, s);
      if (has_shared_memory(Tiles256::kSharedBytes)) return launch_tiles<T, Tiles256, kPaged>(p, s);
      return launch_tiles<T, Tiles256Small, kPaged>(p, s);
    }
  });
}

}  // namespace minivllm::attention
