// Attention of float32 tensors: the same walk over keys as prefill.cuh, on CUDA cores, because tensor cores would round the
// operands (tf32). For tests and small float32 models; not tuned beyond coalesced loads and broadcasts from shared memory.
//
// A rounding error grows with the number of terms that one sum takes one after the other. So scores and outputs are summed in two
// levels: over chains of elements, and the keys of a span of tiles, then over those. Spans begin at fixed keys, so that neighbours
// change no bit of a row.
#pragma once

#include <cuda_runtime.h>

#include "attention/schedule.cuh"
#include "common/vec.cuh"

namespace minivllm::attention {

// A warp takes 8 rows; a lane is a key when scores are computed, and every 32nd column when values are added.
template <int kHeadDim_>
struct FloatTiles {
  static constexpr int kHeadDim = kHeadDim_, kWarps = 4, kThreads = 128, kWarpRows = 8, kRows = kWarps * kWarpRows, kKeys = 32;
  static constexpr int kPitch = kHeadDim + 4;  // 16-byte reads of one column of 8 rows meet 8 different groups of banks
  static constexpr int kColumns = kHeadDim / 32, kBlocks = kHeadDim <= 128 ? 3 : 2;
  static constexpr int kSpan = 8;    // tiles: 256 keys
  static constexpr int kChain = 16;  // elements of a head
  static constexpr int kSharedBytes = 4 * (kRows * kHeadDim + kKeys * kPitch + kWarps * kKeys * kWarpRows);
};

template <typename C, bool kPaged>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    prefill_float32_kernel(const __grid_constant__ Prefill p, const __grid_constant__ Group group) {
  extern __shared__ __align__(16) float floats[];
  RowTile tile;
  if (!find_tile<kPaged>(p, group.size, C::kRows, tile)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * C::kWarpRows;
  float* queries = floats;
  float* shared_kv = queries + C::kRows * C::kHeadDim;  // keys, then values
  float* weights = shared_kv + C::kKeys * C::kPitch + warp * C::kKeys * C::kWarpRows;  // [key][row]

  const auto head_of = [&](int row) { return tile.kv_head * group.size + row - group.divide(row) * group.size; };
  for (int r = 0; r < C::kWarpRows; ++r) {
    const int row = tile.row_begin + first + r;
    const float* source = static_cast<const float*>(p.q);
    if (row < tile.row_end)
      source += (tile.q_begin + int64_t{group.divide(row)}) * p.q_token_stride + head_of(row) * p.q_head_stride;
    for (int d = lane; d < C::kHeadDim; d += 32)
      queries[(first + r) * C::kHeadDim + d] = row < tile.row_end && d < p.head_dim ? source[d] * p.scale : 0.0f;
  }
  const auto load = [&](const KvSide& side, int n) {
    const float* head = static_cast<const float*>(side.data) + tile.kv_head * side.head_stride;
    for (int j = warp; j < C::kKeys; j += C::kWarps) {
      const int key = n * C::kKeys + j;
      int64_t offset = 0;
      if (key < tile.len_k && kPaged) {
        const int64_t block = p.block_tables[tile.sequence * p.table_stride + (key >> p.block_shift)];
        offset = block * side.block_stride + (key & ((1 << p.block_shift) - 1)) * side.row_stride;
      } else if (key < tile.len_k) {
        offset = (tile.kv_begin + key) * side.row_stride;
      }
      for (int d = lane; d < C::kHeadDim; d += 32)
        shared_kv[j * C::kPitch + d] = key < tile.len_k && d < p.head_dim ? head[offset + d] : 0.0f;
    }
  };

  float out[C::kWarpRows][C::kColumns] = {}, top[C::kWarpRows], sum[C::kWarpRows] = {};  // out: of whole spans
  float span_out[C::kWarpRows][C::kColumns] = {};
#pragma unroll
  for (int r = 0; r < C::kWarpRows; ++r) top[r] = -INFINITY;
  const KeyTiles tiles(p, group, tile, C::kKeys);
  for (int n = tiles.last; n >= tiles.first; --n) {
    load(p.k, n);
    __syncthreads();
    float scores[C::kWarpRows] = {};
    for (int part = 0; part < C::kHeadDim; part += C::kChain) {
      float partial[C::kWarpRows] = {};
#pragma unroll 1
      for (int d = part; d < part + C::kChain; d += 4) {
        const float4 k = *reinterpret_cast<const float4*>(shared_kv + lane * C::kPitch + d);
#pragma unroll
        for (int r = 0; r < C::kWarpRows; ++r) {
          const float4 q = *reinterpret_cast<const float4*>(queries + (first + r) * C::kHeadDim + d);
          partial[r] = fmaf(q.x, k.x, fmaf(q.y, k.y, fmaf(q.z, k.z, fmaf(q.w, k.w, partial[r]))));
        }
      }
#pragma unroll
      for (int r = 0; r < C::kWarpRows; ++r) scores[r] += partial[r];
    }
    const int key = n * C::kKeys + lane;
    float keep[C::kWarpRows];
#pragma unroll
    for (int r = 0; r < C::kWarpRows; ++r) {
      const int query = group.divide(min(tile.row_begin + first + r, tile.row_end - 1));
      float s = scores[r];
      if (p.softcap > 0.0f) s = p.softcap * tanhf(s / p.softcap);
      if (key < tile.first_visible(p, query) || key >= tile.visible(p, query)) s = -INFINITY;
      float largest = fmaxf(top[r], s);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      const float base = largest == -INFINITY ? 0.0f : largest, weight = expf(s - base);
      keep[r] = expf(top[r] - base);
      top[r] = largest;
      sum[r] = fmaf(sum[r], keep[r], weight);
      weights[lane * C::kWarpRows + r] = weight;
    }
    __syncthreads();
    load(p.v, n);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < C::kWarpRows; ++r)
#pragma unroll
      for (int i = 0; i < C::kColumns; ++i) out[r][i] *= keep[r], span_out[r][i] *= keep[r];
#pragma unroll 4
    for (int j = 0; j < C::kKeys; ++j) {
      float w[C::kWarpRows];
#pragma unroll
      for (int r = 0; r < C::kWarpRows; r += 4)
        *reinterpret_cast<float4*>(w + r) = *reinterpret_cast<const float4*>(weights + j * C::kWarpRows + r);
#pragma unroll
      for (int i = 0; i < C::kColumns; ++i) {
        const float v = shared_kv[j * C::kPitch + i * 32 + lane];
#pragma unroll
        for (int r = 0; r < C::kWarpRows; ++r) span_out[r][i] = fmaf(w[r], v, span_out[r][i]);
      }
    }
    if (n % C::kSpan == 0 || n == tiles.first) {  // a span ends
#pragma unroll
      for (int r = 0; r < C::kWarpRows; ++r)
#pragma unroll
        for (int i = 0; i < C::kColumns; ++i) out[r][i] += span_out[r][i], span_out[r][i] = 0.0f;
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < C::kWarpRows; ++r) {
    const int row = tile.row_begin + first + r;
    const float total = warp_sum(sum[r]), divisor = total == 0.0f ? 1.0f : total;  // of a row without keys: 0 / 1
    if (row >= tile.row_end) continue;
    const int64_t out_row = (tile.q_begin + int64_t{group.divide(row)}) * p.num_heads + head_of(row);
    if (p.lse != nullptr && lane == 0) p.lse[out_row] = total == 0.0f ? -INFINITY : top[r] + logf(total);
#pragma unroll
    for (int i = 0; i < C::kColumns; ++i)
      if (i * 32 + lane < p.head_dim) static_cast<float*>(p.out)[out_row * p.head_dim + i * 32 + lane] = out[r][i] / divisor;
  }
}

template <typename C, bool kPaged>
const char* launch_float_tiles(const Prefill& p, cudaStream_t stream) {
  const auto kernel = prefill_float32_kernel<C, kPaged>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kSharedBytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const int64_t blocks = max_row_tiles(p, C::kRows) * p.num_kv_heads;
  if (blocks > 2147483647) return "more than 2^31 - 1 tiles";
  kernel<<<static_cast<unsigned>(blocks), C::kThreads, C::kSharedBytes, stream>>>(p, Group(p.num_heads / p.num_kv_heads));
  return launch_error();
}

template <bool kPaged>
const char* launch_float32(const Prefill& p, cudaStream_t stream) {
  if (p.head_dim <= 64) return launch_float_tiles<FloatTiles<64>, kPaged>(p, stream);
  if (p.head_dim <= 128) return launch_float_tiles<FloatTiles<128>, kPaged>(p, stream);
  return launch_float_tiles<FloatTiles<256>, kPaged>(p, stream);
}

}  // namespace minivllm::attention
