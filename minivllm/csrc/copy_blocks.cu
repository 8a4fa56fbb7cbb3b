// copy_blocks on CUDA. What lies at one offset of a target depends on the sources at that offset alone, so the blocks are cut into
// slices and a CTA owns one slice of all pairs: it reads every source of the slice into registers, waits for all its threads, and
// writes every target. No CTA reads what another writes, and no id is looked at on the host. Too many pairs for the registers of a
// CTA go through scratch memory instead, a slice at a time: one kernel gathers, the next scatters.
// Floor: 2 x bytes copied / bandwidth, or the launch for few pairs.
#include <algorithm>

#include "common/copy.cuh"
#include "common/vec.cuh"
#include "copy_blocks.h"

namespace minivllm {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kHeld = 4;      // vectors a thread holds
constexpr int kWidest = 32;   // vectors of a slice, for few pairs; 16 bytes each
constexpr int kNarrow = 8;    // 128 bytes in a row are still read at full speed,
constexpr int kNarrowest = 4; // 64 are what the memory reads at least
constexpr int64_t kMaxPairs = kHeld * kMaxThreads / kNarrowest;
constexpr int64_t kScratchBytes = 32 << 20;  // about what stays in the L2 between the gather and the scatter
constexpr int64_t kSliceAlignment = 128;

template <typename V>
struct Cache {
  V* data;
  int64_t stride;
};

// threadIdx: vector of the slice, pair. CTAs from `slices` on work for v.
template <typename V, int kPairs>
__global__ void __launch_bounds__(kMaxThreads) copy_slices_kernel(Cache<V> k, Cache<V> v, int64_t vectors, unsigned slices,
                                                                  const int64_t* sources, const int64_t* targets, int n) {
  const bool values = blockIdx.x >= slices;
  const Cache<V> cache = values ? v : k;
  const int64_t place = static_cast<int64_t>(values ? blockIdx.x - slices : blockIdx.x) * blockDim.x + threadIdx.x;
  const int end = place < vectors ? n : 0;
  V held[kPairs];
  int64_t target[kPairs];
#pragma unroll
  for (int r = 0; r < kPairs; ++r) {
    const int pair = threadIdx.y + r * blockDim.y;
    if (pair >= end) continue;
    held[r] = cache.data[sources[pair] * cache.stride + place];
    target[r] = targets[pair];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kPairs; ++r)
    if (static_cast<int>(threadIdx.y) + r * static_cast<int>(blockDim.y) < end)
      cache.data[target[r] * cache.stride + place] = held[r];
}

template <typename V>
const char* copy_slices(Cache<V> k, Cache<V> v, int64_t vectors, const int64_t* sources, const int64_t* targets, int n,
                        cudaStream_t stream) {
  int width = kWidest;  // narrower for more pairs, so that a CTA's work grows slowly
  while (width > kNarrow && n * width > 256 * kHeld) width /= 2;
  if (n * width > kMaxThreads * kHeld) width = kNarrowest;
  const int pairs = n * width <= 256 ? 1 : kHeld;
  const int64_t slices = (vectors + width - 1) / width;
  if (slices > 1073741823) return "a block has more than 2^30 slices";
  const dim3 block(width, (n + pairs - 1) / pairs);
  auto* kernel = pairs == 1 ? copy_slices_kernel<V, 1> : copy_slices_kernel<V, kHeld>;
  kernel<<<static_cast<unsigned>(2 * slices), block, 0, stream>>>(k, v, vectors, static_cast<unsigned>(slices), sources, targets,
                                                                  n);
  return launch_error();
}

// Bytes of every block that pass through the scratch memory at a time.
int64_t scratch_slice(int64_t num_pairs, int64_t block_bytes) {
  const int64_t fitting = kScratchBytes / num_pairs / kSliceAlignment * kSliceAlignment;
  return std::min(block_bytes, std::max(fitting, kSliceAlignment));
}

template <typename V>
const char* copy_through_scratch(Cache<V> cache, int64_t block_bytes, const int64_t* sources, const int64_t* targets, int64_t n,
                                 void* workspace, cudaStream_t stream) {
  constexpr int64_t kMaxCtas = 1 << 20;
  const int64_t slice = scratch_slice(n, block_bytes) / sizeof(V), vectors = block_bytes / sizeof(V);
  auto* scratch = static_cast<V*>(workspace);
  for (int64_t start = 0; start < vectors; start += slice) {
    const int64_t count = std::min(slice, vectors - start);
    move_blocks<V>({cache.data + start, cache.stride, sources}, {scratch, slice, nullptr}, n, count, kMaxCtas, stream);
    move_blocks<V>({scratch, slice, nullptr}, {cache.data + start, cache.stride, targets}, n, count, kMaxCtas, stream);
  }
  return launch_error();
}

}  // namespace

int64_t copy_blocks_workspace(int64_t num_pairs, int64_t block_bytes) {
  return num_pairs <= kMaxPairs ? 0 : num_pairs * scratch_slice(num_pairs, block_bytes);
}

const char* launch_copy_blocks(CopyBlocksCache k, CopyBlocksCache v, int64_t block_bytes, const int64_t* sources,
                               const int64_t* targets, int64_t num_pairs, void* workspace, void* stream) {
  if (num_pairs == 0 || block_bytes == 0) return nullptr;
  const uint64_t bytes = address(k.data) | address(v.data) | k.block_stride | v.block_stride | block_bytes;
  return dispatch_width(bytes, [&](auto* tag) -> const char* {
    using V = std::remove_pointer_t<decltype(tag)>;
    constexpr int64_t kBytes = sizeof(V);
    const Cache<V> keys{static_cast<V*>(k.data), k.block_stride / kBytes};
    const Cache<V> values{static_cast<V*>(v.data), v.block_stride / kBytes};
    const auto s = static_cast<cudaStream_t>(stream);
    if (num_pairs <= kMaxPairs)
      return copy_slices<V>(keys, values, block_bytes / kBytes, sources, targets, static_cast<int>(num_pairs), s);
    const char* error = copy_through_scratch<V>(keys, block_bytes, sources, targets, num_pairs, workspace, s);
    return error ? error : copy_through_scratch<V>(values, block_bytes, sources, targets, num_pairs, workspace, s);
  });
}

}  // namespace minivllm
