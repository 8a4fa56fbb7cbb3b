// Writes the plan of attention/plan.h with one thread block. It runs once a step; all layers share it.
#include <cuda_runtime.h>

#include "attention/plan.h"
#include "common/vec.cuh"

namespace minivllm::attention {
namespace {

constexpr int kThreads = 1024;

// A row without queries is not decoded. Keys beyond the block table cannot exist; the plan has no place for them either.
__device__ PlanRow read_row(const int32_t* seq_lens, const int32_t* cu, int i, const DecodeShape& shape) {
  PlanRow row{i, cu[i], cu[i + 1] - cu[i], max(0, min(seq_lens[i], shape.max_keys)), 0, 0, 0, 0};
  if (row.num_queries > shape.max_queries) row.num_queries = 0;
  const int first = row.keys - row.num_queries + 1 - shape.window;  // first key that any query sees
  if (shape.window > 0 && first > 0) row.begin = first / kDecodeKeys * kDecodeKeys;
  row.chunk_size = chunk_keys(row.keys - row.begin);
  row.num_chunks = max(1, (row.keys - row.begin + row.chunk_size - 1) / row.chunk_size);
  return row;
}

// Of one head, in units: its keys, and what a row costs besides.
__device__ int64_t work_of(const PlanRow& row) { return (row.keys - row.begin + kUnit - 1) / kUnit + 1; }

// Sum over the threads before this one; every thread must call it.
__device__ int64_t sum_before(int64_t v, int64_t* total, int64_t* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t sum = v;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int64_t below = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += below;
  }
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  int64_t before = 0, all = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += shared[w];
    all += shared[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - v;
}

// The first chunk that begins at `target` of the line or later. line[i]: where row i begins; line[count]: the end.
__device__ PlanPiece find_piece(const PlanRow* rows, const int64_t* line, int count, int heads, int64_t target) {
  int low = 0, high = count;  // the last row that begins at target or before it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (line[middle] <= target) low = middle;
    else high = middle;
  }
  PlanPiece piece{count, 0, 0, 0, {}};
  if (target >= line[count]) return piece;
  const PlanRow row = rows[low];
  const int64_t work = work_of(row), offset = target - line[low], units = row.chunk_size / kUnit;
  piece.row = low, piece.head = static_cast<int>(offset / work), piece.chunk = static_cast<int>((offset % work + units - 1) / units);
  if (piece.chunk >= row.num_chunks) piece.chunk = 0, ++piece.head;
  if (piece.head >= heads) piece.head = 0, ++piece.row;
  return piece;
}

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const int32_t* seq_lens, const int32_t* cu_seqlens_q, DecodeShape shape, int heads, int64_t rows_at,
                int64_t pieces_at, int64_t line_at, int32_t signature, int32_t* plan) {
  __shared__ int64_t shared[kThreads / 32];
  auto* rows = reinterpret_cast<PlanRow*>(plan + rows_at);
  auto* pieces = reinterpret_cast<PlanPiece*>(plan + pieces_at);
  auto* line = reinterpret_cast<int64_t*>(plan + line_at);
  if (threadIdx.x == 0) plan[kSignature] = signature, plan[kUsedTokens] = cu_seqlens_q[shape.num_seqs];
  for (int i = threadIdx.x; i < shape.num_ctas; i += kThreads) plan[DecodeShape::kHeader + i] = 0;  // arrivals

  int count = 0;
  int64_t end = 0;
  for (int start = 0; start < shape.num_seqs; start += kThreads) {
    const int i = start + threadIdx.x;
    PlanRow row{};
    if (i < shape.num_seqs) row = read_row(seq_lens, cu_seqlens_q, i, shape);
    const bool decoded = row.num_queries > 0;
    int64_t all_rows, all_work;
    const int64_t at = count + sum_before(decoded, &all_rows, shared);
    const int64_t begin = end + sum_before(decoded ? work_of(row) * heads : 0, &all_work, shared);
    if (decoded) rows[at] = row, line[at] = begin;
    count += static_cast<int>(all_rows), end += all_work;
  }
  if (threadIdx.x == 0) line[count] = end;
  __syncthreads();  // orders the block's global writes too

  for (int b = threadIdx.x; b <= shape.num_ctas; b += kThreads) {
    PlanPiece piece = find_piece(rows, line, count, heads, end * b / shape.num_ctas);
    if (b == shape.num_ctas) piece = {count, 0, 0, 0, {}};
    if (piece.row < count) piece.first = rows[piece.row];
    pieces[b] = piece;
  }
  __syncthreads();
  // The slot of a cut row and head is the first thread block that begins within it.
  for (int b = threadIdx.x; b < shape.num_ctas; b += kThreads) {
    const PlanPiece& piece = pieces[b];
    if (piece.chunk == 0) continue;
    int first = b;
    while (first > 0 && pieces[first - 1].row == piece.row && pieces[first - 1].head == piece.head && pieces[first - 1].chunk > 0)
      --first;
    pieces[b].slot = first;
  }
}

}  // namespace

const char* launch_plan(const int32_t* seq_lens, const int32_t* cu_seqlens_q, const DecodeShape& shape, int32_t* plan,
                        void* stream) {
  plan_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(seq_lens, cu_seqlens_q, shape, shape.heads(), shape.rows(),
                                                                     shape.pieces(), shape.line(), shape.signature(), plan);
  return launch_error();
}

}  // namespace minivllm::attention
