// Attention of many queries on tensor cores (sm_80 and later, mma.sync): FlashAttention-2's algorithm (Dao 2023,
// arXiv:2307.08691). A block keeps its rows' queries in shared memory and their outputs in registers, and walks over tiles of
// keys and values, last to first, under an online softmax; while it works on one tile, cp.async brings the next. tiles.h says
// how large tiles are and why, schedule.cuh which block takes which.
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

// One block's work. What is seldom needed lies in shared memory, because outputs and scores take most of the registers.
template <typename T, typename C, bool kPaged>
struct PrefillWorker {
  using S = Swizzle<C::kHeadDim>;
  static constexpr int kKeyTiles = C::kKeys / 8, kWidthTiles = C::kHeadDim / 8;  // n8 tiles of scores and outputs
  // Copies: kLanes threads take a row, each every kLanes-th chunk; the twist of a thread's rows is the same for all of them.
  static constexpr int kLanes = C::kHeadDim % 64 == 0 ? 8 : 4, kParts = S::kChunks / kLanes, kStep = C::kThreads / kLanes;

  const Prefill& p;
  const Group& group;
  const RowTile& tile;    // in shared memory
  const KeyTiles& tiles;  // in shared memory
  const bool wide;        // every row of q, k and v is whole chunks at 16-byte addresses
  char* const shared;
  const uint32_t queries, keys, values, pages;  // addresses in shared memory
  const int my_row, my_chunk;                   // of the copies of this thread: the first

  float out[C::kRowTiles][kWidthTiles][4];
  float top[C::kRowTiles][2], sum[C::kRowTiles][2];  // of row g and g + 8: largest score; this thread's part of the sum

  __device__ __forceinline__ PrefillWorker(const Prefill& p, const Group& group, const RowTile& tile, const KeyTiles& tiles,
                                           bool wide, char* shared)
      : p(p), group(group), tile(tile), tiles(tiles), wide(wide), shared(shared), queries(shared_address(shared)),
        keys(queries + C::kQueryBytes), values(keys + C::kStages * C::kTileBytes), pages(values + C::kStages * C::kTileBytes),
        my_row(threadIdx.x / kLanes), my_chunk(threadIdx.x % kLanes) {}

  // This thread's chunks of one row, `source` being the first; zeros beyond head_dim, and for a row that is not valid.
  __device__ __forceinline__ void copy_row(uint32_t target, int row, const T* source, bool valid) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const int chunk = my_chunk + part * kLanes;
      // chunk ^ twist: a twist is less than kLanes
      const uint32_t place = target + S::offset(row, my_chunk) + part * kLanes * 16;
      if (wide) {
        copy_async(place, source + part * kLanes * 8, valid && chunk * 8 < p.head_dim);
      } else {
        copy_chunk_slowly(shared + (place - queries), source + part * kLanes * 8, valid ? p.head_dim - chunk * 8 : 0);
      }
    }
  }

  __device__ __forceinline__ void load_queries(const RowTile& found) const {
    const T* head = static_cast<const T*>(p.q) + found.q_begin * p.q_token_stride +
                    found.kv_head * group.size * p.q_head_stride + my_chunk * 8;
#pragma unroll 4
    for (int r = my_row; r < C::kRows; r += kStep) {
      const int row = min(found.row_begin + r, found.row_end - 1), query = group.divide(row);
      const T* source = head + query * p.q_token_stride + (row - query * group.size) * p.q_head_stride;
      copy_row(queries, r, source, found.row_begin + r < found.row_end);
    }
  }

  // The blocks of the cache that hold the keys of tile n, one number for 8 keys; awaited with the tile loaded meanwhile.
  __device__ __forceinline__ void load_pages(const RowTile& tile, int n) const {
    if (!kPaged || threadIdx.x >= C::kPages) return;
    const int key = n * C::kKeys + static_cast<int>(threadIdx.x) * 8;
    const int32_t* table = p.block_tables + tile.sequence * p.table_stride;
    const bool valid = n >= 0 && key < tile.len_k;
    copy_word_async(pages + ((n & 1) * C::kPages + threadIdx.x) * 4, table + (valid ? key >> p.block_shift : 0), valid);
  }

  // Keys and values of tile n into their stage. kLast: the tile may end beyond the sequence; rows there are not read, and 0.
  template <bool kLast>
  __device__ __forceinline__ void load_tile(const RowTile& tile, int n) const {
    const uint32_t stage = (n & 1) * C::kTileBytes;
    const int32_t* page = reinterpret_cast<const int32_t*>(shared + (pages - queries)) + (n & 1) * C::kPages;
    const T* k_head = static_cast<const T*>(p.k.data) + tile.kv_head * p.k.head_stride + my_chunk * 8;
    const T* v_head = static_cast<const T*>(p.v.data) + tile.kv_head * p.v.head_stride + my_chunk * 8;
    const int first = n * C::kKeys;
    if (!kPaged) {
      const int64_t row = int64_t{tile.kv_begin} + first + my_row;
      k_head += row * p.k.row_stride, v_head += row * p.v.row_stride;
    }
    const auto copy = [&](int r) {
      const bool valid = !kLast || first + r < tile.len_k;
      int64_t k_offset = 0, v_offset = 0;
      if (kPaged && valid) {
        const int64_t block = page[r / 8];
        const int row = (first + r) & ((1 << p.block_shift) - 1);
        k_offset = block * p.k.block_stride + row * static_cast<int>(p.k.row_stride);
        v_offset = block * p.v.block_stride + row * static_cast<int>(p.v.row_stride);
      } else if (valid) {
        k_offset = (r - my_row) * p.k.row_stride, v_offset = (r - my_row) * p.v.row_stride;
      }
      copy_row(keys + stage, r, k_head + k_offset, valid);
      copy_row(values + stage, r, v_head + v_offset, valid);
    };
    if (!wide) {
#pragma unroll 1
      for (int r = my_row; r < C::kKeys; r += kStep) copy(r);
    } else {
#pragma unroll
      for (int i = 0; i < C::kKeys / kStep; ++i) copy(my_row + i * kStep);
    }
  }

  // scores = queries of this warp times keys of tile n.
  __device__ __forceinline__ void multiply_keys(int n, float (&scores)[C::kRowTiles][kKeyTiles][4]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int q_row = warp * 16 * C::kRowTiles + lane % 16, k_row = lane % 8 + lane / 16 * 8;
    const uint32_t q_begin = queries + q_row * S::kPitch, q_twisted = (lane / 16 ^ S::twist(q_row)) * 16;
    const uint32_t k_begin = keys + (n & 1) * C::kTileBytes + k_row * S::kPitch;
    const uint32_t k_twisted = (lane / 8 % 2 ^ S::twist(k_row)) * 16;
#pragma unroll
    for (int d = 0; d < C::kHeadDim / 16; ++d) {
      uint32_t a[C::kRowTiles][4];
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m) load_matrices(a[m], q_begin + S::within(d, q_twisted) + m * 16 * S::kPitch);
#pragma unroll
      for (int j = 0; j < kKeyTiles / 2; ++j) {
        uint32_t b[4];
        load_matrices(b, k_begin + S::within(d, k_twisted) + j * 16 * S::kPitch);
#pragma unroll
        for (int m = 0; m < C::kRowTiles; ++m) {
          multiply_add<T>(scores[m][2 * j], a[m], b[0], b[1]);
          multiply_add<T>(scores[m][2 * j + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Scores other than scale * q k^T with a positive scale, in units of log2(e): capped, or of a scale below 0.
  __device__ __forceinline__ void transform(float (&scores)[C::kRowTiles][kKeyTiles][4]) const {
    const bool capped = p.softcap > 0.0f;
    // softcap * tanh(x) = softcap - 2 softcap / (e^(2x) + 1)
    const float inside = capped ? 2.0f * kLog2E * p.scale / p.softcap : 0.0f, cap = p.softcap * kLog2E;
    const float factor = p.scale * kLog2E;
    const auto each = [&](const auto& change) {
#pragma unroll
      for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) scores[m][j][e] = change(scores[m][j][e]);
    };
    if (capped) each([&](float s) { return cap * (1.0f - __fdividef(2.0f, exp2_fast(s * inside) + 1.0f)); });
    else each([&](float s) { return s * factor; });
  }

  __device__ __forceinline__ int row_of(int m, int half) const {
    return tile.row_begin + (threadIdx.x / 32 * C::kRowTiles + m) * 16 + half * 8 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ void mask(int n, float (&scores)[C::kRowTiles][kKeyTiles][4]) const {
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = group.divide(min(row_of(m, half), tile.row_end - 1));
        const int first_key = n * C::kKeys + threadIdx.x % 4 * 2;
        const int begin = tile.first_visible(p, query) - first_key, end = tile.visible(p, query) - first_key;
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (j * 8 + e < begin || j * 8 + e >= end) scores[m][j][2 * half + e] = -INFINITY;
      }
  }

  // The largest score of each row, by whose growth what was summed before shrinks; base: what to subtract from scores * unit.
  __device__ __forceinline__ void rescale(float unit, const float (&scores)[C::kRowTiles][kKeyTiles][4],
                                          float (&base)[C::kRowTiles][2]) {
    float keep[C::kRowTiles][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = top[m][half];
#pragma unroll
        for (int j = 0; j < kKeyTiles; ++j)
          largest = fmaxf(largest, fmaxf(scores[m][j][2 * half], scores[m][j][2 * half + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
        const float finite = largest == -INFINITY ? 0.0f : largest;  // no key yet: all exponentials are 0
        base[m][half] = finite * unit;
        keep[m][half] = exp2_fast((top[m][half] - finite) * unit);  // 1 to the bit where nothing grew
        grown |= largest != top[m][half];
        top[m][half] = largest;
        sum[m][half] *= keep[m][half];
      }
    if (!__any_sync(0xffffffffu, grown)) return;  // as it mostly is after a few tiles; the factors are 1
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int j = 0; j < kWidthTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) out[m][j][e] *= keep[m][e / 2];
  }

  // out += exponentials of scores times values of tile n. A product's result has the layout of the next one's left side.
  __device__ __forceinline__ void multiply_values(int n, float unit, const float (&scores)[C::kRowTiles][kKeyTiles][4],
                                                  const float (&base)[C::kRowTiles][2]) {
    const int lane = threadIdx.x % 32, row = lane % 16;
    const uint32_t begin = values + (n & 1) * C::kTileBytes + row * S::kPitch, twisted = (lane / 16 ^ S::twist(row)) * 16;
#pragma unroll
    for (int k = 0; k < C::kKeys / 16; ++k) {
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

  // found: the tile in registers, because the one in shared memory may be read only after the first barrier.
  // last: the last tile of keys, or -1.
  __device__ __forceinline__ void run(const RowTile& found, int last) {
    const bool plain = p.softcap == 0.0f && p.scale > 0.0f;
    const float unit = plain ? p.scale * kLog2E : 1.0f;
    if (last >= 0) {
      if (kPaged) {
        load_pages(found, last), load_pages(found, last - 1);
        copy_async_commit();
      }
      load_queries(found);
      if (kPaged) {
        copy_async_commit(), copy_async_wait<1>();
        __syncthreads();
      }
      load_tile<true>(found, last);
      copy_async_commit();
    }
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m) {
      top[m][0] = top[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.0f;
#pragma unroll
      for (int j = 0; j < kWidthTiles; ++j) out[m][j][0] = out[m][j][1] = out[m][j][2] = out[m][j][3] = 0.0f;
    }
    copy_async_wait<0>();
    __syncthreads();  // the first tile has arrived, and what tile and tiles refer to
    for (int n = last; n >= tiles.first; --n) {
      if (n > tiles.first) {
        load_pages(tile, n - 2);
        load_tile<false>(tile, n - 1);
        copy_async_commit();
      }
      float scores[C::kRowTiles][kKeyTiles][4] = {};
      multiply_keys(n, scores);
      if (!plain) transform(scores);
      if (n < tiles.whole_first || n > tiles.whole_last) mask(n, scores);
      float base[C::kRowTiles][2];
      rescale(unit, scores, base);
      multiply_values(n, unit, scores, base);
      copy_async_wait<0>();
      __syncthreads();  // tile n - 1 has arrived, and nobody reads the stage of tile n any more
    }
    write(unit);
  }

  // Divides by the sums; 0 for a row without keys. Rows pass through shared memory, each warp's through its own queries' place.
  __device__ __forceinline__ void write(float unit) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * 16 * C::kRowTiles;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < C::kRowTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[m][half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const float factor = total == 0.0f ? 0.0f : 1.0f / total;
        const int r = first + m * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < kWidthTiles; ++j)
          *reinterpret_cast<uint32_t*>(shared + S::offset(r, j) + lane % 4 * 4) =
              pack_pair<T>(out[m][j][2 * half] * factor, out[m][j][2 * half + 1] * factor);
        const int row = row_of(m, half);
        if (p.lse != nullptr && lane % 4 == 0 && row < tile.row_end)
          p.lse[out_row(row)] = total == 0.0f ? -INFINITY : top[m][half] * unit * kLn2 + logf(total);
      }
    __syncwarp();
    const bool whole = p.head_dim % 8 == 0;
#pragma unroll 4
    for (int i = lane; i < 16 * C::kRowTiles * S::kChunks; i += 32) {
      const int r = first + i / S::kChunks, chunk = i % S::kChunks, row = tile.row_begin + r;
      if (row >= tile.row_end || chunk * 8 >= p.head_dim) continue;
      T* target = static_cast<T*>(p.out) + out_row(row) * p.head_dim + chunk * 8;
      const auto value = *reinterpret_cast<const Vec<T, 8>*>(shared + S::offset(r, chunk));
      if (whole) {
        *reinterpret_cast<Vec<T, 8>*>(target) = value;
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (chunk * 8 + e < p.head_dim) target[e] = value.data[e];
      }
    }
  }

  // Row of [num_tokens * num_heads].
  __device__ __forceinline__ int64_t out_row(int row) const {
    const int query = group.divide(row);
    return (tile.q_begin + int64_t{query}) * p.num_heads + tile.kv_head * group.size + row - query * group.size;
  }
};

template <typename T, typename C, bool kPaged>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    prefill_kernel(const __grid_constant__ Prefill p, const __grid_constant__ Group group, bool wide) {
  extern __shared__ __align__(128) char shared_memory[];
  __shared__ RowTile tile;
  __shared__ KeyTiles tiles;
  RowTile found;
  if (!find_tile<kPaged>(p, group.size, C::kRows, found)) return;
  const KeyTiles seen(p, group, found, C::kKeys);
  if (threadIdx.x == 0) tile = found, tiles = seen;
  PrefillWorker<T, C, kPaged> worker(p, group, tile, tiles, wide, shared_memory);
  worker.run(found, seen.first <= seen.last ? seen.last : -1);
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
      return launch_tiles<T, Tiles256, kPaged>(p, s);
    }
  });
}

}  // namespace minivllm::attention
