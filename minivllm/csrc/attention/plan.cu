// Writes the plan of attention/plan.h with one thread block. It runs once a step; all layers share it.
#include <cuda_runtime.h>

#include "attention/plan.h"
#include "common/launch.cuh"

namespace minivllm::attention {
namespace {

constexpr int kThreads = 1024, kChoices = 4;

// Numbers that follow from the shape.
struct PlanLayout {
  int rounds, teams, grid;
  int32_t signature;
  int64_t pieces, rows, line;
};

// A row without queries is not decoded. Keys beyond the block table cannot exist; the plan has no place for them either.
__device__ PlanRow read_row(const int32_t* seq_lens, const int32_t* cu, int i, int round, const DecodeShape& shape) {
  PlanRow row{i, cu[i], cu[i + 1] - cu[i], max(0, min(seq_lens[i], shape.max_keys)), 0, 0, 0, round};
  if (row.num_queries > shape.max_queries) row.num_queries = 0;
  const int first = row.keys - row.num_queries + 1 - shape.window;  // first key that any query sees
  if (shape.window > 0 && first > 0) row.begin = first / kDecodeKeys * kDecodeKeys;
  row.chunk_size = chunk_keys(row.keys - row.begin);
  row.num_chunks = max(1, (row.keys - row.begin + row.chunk_size - 1) / row.chunk_size);
  return row;
}

// In units: its keys, and what a row costs besides.
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

// Where the rows stand in the line: row i from begin[i], the end of all at begin[count]. Of many rows they lie in global memory.
struct Line {
  int64_t* begin;
  int2* chunks;  // of a row: keys of one in units, how many
};

// Before the first chunk that begins at `target` of the line or later.
__device__ PlanCut find_cut(const Line& line, int count, int64_t target) {
  if (target >= line.begin[count]) return {count, 0, 0, 0};
  int low = 0, high = count;  // the last row that begins at target or before it
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (line.begin[middle] <= target) low = middle;
    else high = middle;
  }
  const int2 chunks = line.chunks[low];
  const int chunk = static_cast<int>((target - line.begin[low] + chunks.x - 1) / chunks.x);
  return chunk < chunks.y ? PlanCut{low, chunk, 0, 0} : PlanCut{low + 1, 0, 0, 0};
}

struct ChoiceSpace {
  PlanCut cuts[kChoices * (kMostTeams + 1)];
  int worst[kChoices];
};

// How many teams get a piece of the line, and the cuts between them. A few teams less than there are may cut fewer rows: 32
// teams halve 16 rows where 33 cut most of them in three. What a piece costs, in quarters of a unit: 4 a unit and 5 a cut
// (measured); the time of the call lies between the mean and the worst of its pieces. Every thread must call it.
__device__ const PlanCut* choose_cuts(const Line& line, int count, int teams, ChoiceSpace& space) {
  const int64_t end = line.begin[count];
  const int step = max(1, teams / 32), stride = teams + 1;
  const auto used_of = [&](int choice) { return max(1, teams - choice * step); };
  if (threadIdx.x < kChoices) space.worst[threadIdx.x] = 0;
  for (int i = threadIdx.x; i < kChoices * stride; i += kThreads) {
    const int used = used_of(i / stride), team = i % stride;
    space.cuts[i] = team < used ? find_cut(line, count, end * team / used) : PlanCut{count, 0, 0, 0};
  }
  __syncthreads();
  const auto place = [&](const PlanCut& cut) {
    return line.begin[cut.row] + (cut.chunk > 0 ? cut.chunk * line.chunks[cut.row].x : 0);
  };
  for (int i = threadIdx.x; i < kChoices * stride; i += kThreads) {
    if (i % stride == teams) continue;
    const PlanCut from = space.cuts[i], to = space.cuts[i + 1];
    const int64_t units = place(to) - place(from);
    const int cuts = (from.chunk > 0) + (to.chunk > 0);
    if (units > 0) atomicMax(space.worst + i / stride, static_cast<int>(min(4 * units + 5 * cuts, int64_t{1} << 30)));
  }
  __syncthreads();
  int best = 0;
  float least = INFINITY;
  for (int choice = 0; choice < kChoices; ++choice) {
    const float mean = 4.0f * static_cast<float>(end) / static_cast<float>(used_of(choice));
    const float cost = mean + static_cast<float>(space.worst[choice]);
    if (cost < least) least = cost, best = choice;
  }
  return space.cuts + best * stride;
}

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const int32_t* seq_lens, const int32_t* cu_seqlens_q, DecodeShape shape, PlanLayout at, int32_t* plan) {
  __shared__ int64_t sums[kThreads / 32], begin[kThreads + 1];
  __shared__ int2 chunks[kThreads];
  __shared__ PlanCut cuts[kMostTeams + 1];
  __shared__ ChoiceSpace choices;
  wait_for_predecessors();
  auto* rows = reinterpret_cast<PlanRow*>(plan + at.rows);
  auto* pieces = reinterpret_cast<PlanPiece*>(plan + at.pieces);
  Line line{begin, chunks};
  const int most_rows = shape.num_seqs * at.rounds;
  if (most_rows > kThreads)
    line = {reinterpret_cast<int64_t*>(plan + at.line), reinterpret_cast<int2*>(plan + at.line + 2 * (most_rows + 1))};
  if (threadIdx.x == 0) plan[kSignature] = at.signature, plan[kUsedTokens] = cu_seqlens_q[shape.num_seqs];
  for (int i = threadIdx.x; i < at.grid; i += kThreads) plan[DecodeShape::kHeader + i] = 0;  // arrivals

  int count = 0;
  int64_t end = 0;
  for (int start = 0; start < most_rows; start += kThreads) {
    const int i = start + threadIdx.x;
    PlanRow row{};
    if (i < most_rows) row = read_row(seq_lens, cu_seqlens_q, i / at.rounds, i % at.rounds, shape);
    const bool decoded = row.num_queries > 0;
    int64_t all_rows, all_work;
    const int64_t index = count + sum_before(decoded, &all_rows, sums);
    const int64_t before = end + sum_before(decoded ? work_of(row) : 0, &all_work, sums);
    if (decoded) rows[index] = row, line.begin[index] = before, line.chunks[index] = {row.chunk_size / kUnit, row.num_chunks};
    count += static_cast<int>(all_rows), end += all_work;
  }
  if (threadIdx.x == 0) line.begin[count] = end;
  __syncthreads();  // orders the block's global writes too

  const PlanCut* chosen = choose_cuts(line, count, at.teams, choices);
  for (int i = threadIdx.x; i <= at.teams; i += kThreads) cuts[i] = chosen[i];
  __syncthreads();
  for (int i = threadIdx.x; i < at.teams; i += kThreads) {
    if (cuts[i].chunk == 0) continue;
    int first = i;  // cut of its row: its index is the row's slot
    while (cuts[first - 1].row == cuts[i].row && cuts[first - 1].chunk > 0) --first;
    cuts[i].slot = first, cuts[i].whole = cuts[first].chunk;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < at.teams; i += kThreads) {
    const PlanCut from = cuts[i], to = cuts[i + 1];
    const int first = first_row(from, to);
    pieces[i].from = from, pieces[i].to = to;
    pieces[i].first = first < count ? rows[first] : PlanRow{};
  }
}

}  // namespace

const char* launch_plan(const int32_t* seq_lens, const int32_t* cu_seqlens_q, const DecodeShape& shape, int32_t* plan,
                        void* stream) {
  const PlanLayout at{shape.rounds(), shape.teams(), shape.grid(), shape.signature(), shape.pieces(), shape.rows(), shape.line()};
  return launch_overlapped(plan_kernel, 1, kThreads, 0, static_cast<cudaStream_t>(stream), seq_lens, cu_seqlens_q, shape, at, plan);
}

}  // namespace minivllm::attention
