// copy_blocks: argument checks, the CPU kernel, and the border to the CUDA kernels of copy_blocks.cu.
// On the CPU as on CUDA: what lies at one offset of a target depends on the sources at that offset alone, so the blocks are cut
// into slices: all sources of a slice are read into a buffer that stays in the cache, then all targets are written. No pair has
// to be compared with another, and slices are what threads share.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/kv_cache.h"
#include "common/new_tensor.h"
#include "copy_blocks.h"

#include <algorithm>
#include <memory>

namespace minivllm {
namespace {

constexpr int64_t kBufferBytes = 32768;  // about an L1 cache
constexpr int64_t kSmallestSlice = 256;  // bytes: four cache lines in a row are still read at a fair speed

Check check_copy(const Tensor& k_cache, const Tensor& v_cache, const Tensor& sources, const Tensor& targets) {
  Check check("copy_blocks", k_cache);
  check.tensor("k_cache", k_cache, {"num_blocks", "num_kv_heads", "block_size", "head_dim"}, MINIVLLM_FLOATS);
  check_cache(check, "k_cache", k_cache, k_cache.scalar_type());
  check_cache(check, "v_cache", v_cache, k_cache.scalar_type());
  check.tensor("sources", sources, {"n"}, {ScalarType::Long});
  check.tensor("targets", targets, {"n"}, {ScalarType::Long});
  return check;
}

struct Pairs {
  const int64_t *sources, *targets;
  int64_t count;
};

// Copies `bytes` bytes of every pair; `blocks` points at the slice in block 0.
void copy_slice(char* blocks, int64_t stride, int64_t bytes, const Pairs& pairs, char* buffer) {
  for (int64_t i = 0; i < pairs.count; ++i) std::memcpy(buffer + i * bytes, blocks + pairs.sources[i] * stride, bytes);
  for (int64_t i = 0; i < pairs.count; ++i) std::memcpy(blocks + pairs.targets[i] * stride, buffer + i * bytes, bytes);
}

void copy_blocks_cpu(Tensor k_cache, Tensor v_cache, const Tensor& sources, const Tensor& targets) {
  const Check check = check_copy(k_cache, v_cache, sources, targets);
  check_ids(check, "sources", sources, k_cache.size(0));
  check_ids(check, "targets", targets, k_cache.size(0));
  const Pairs pairs{ids_of(sources), ids_of(targets), sources.size(0)};
  const int64_t block = block_bytes(k_cache);
  if (pairs.count == 0 || block == 0) return;
  const int64_t slice = std::min(block, std::max(kBufferBytes / pairs.count, kSmallestSlice));
  const int64_t num_slices = (block + slice - 1) / slice;
  parallel_items(2 * num_slices, pairs.count * slice / 4, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> buffer(new char[pairs.count * slice]);
    for (int64_t s = begin; s < end; ++s) {
      const Tensor& cache = s < num_slices ? k_cache : v_cache;
      const int64_t offset = s % num_slices * slice;
      copy_slice(static_cast<char*>(cache.data_ptr()) + offset, block_stride_bytes(cache),
                 std::min(slice, block - offset), pairs, buffer.get());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("copy_blocks", TORCH_BOX(&copy_blocks_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

void copy_blocks_cuda(Tensor k_cache, Tensor v_cache, const Tensor& sources, const Tensor& targets) {
  check_copy(k_cache, v_cache, sources, targets);
  const CudaScope scope(k_cache);
  const int64_t num_pairs = sources.size(0), bytes = block_bytes(k_cache);
  const int64_t scratch_bytes = copy_blocks_workspace(num_pairs, bytes);
  const Tensor scratch = new_tensor(sources, {scratch_bytes}, ScalarType::Byte);
  check_launch("copy_blocks",
               launch_copy_blocks({k_cache.data_ptr(), block_stride_bytes(k_cache)},
                                  {v_cache.data_ptr(), block_stride_bytes(v_cache)}, bytes, ids_of(sources), ids_of(targets),
                                  num_pairs, scratch.data_ptr(), scope.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("copy_blocks", TORCH_BOX(&copy_blocks_cuda)); }
#endif

}  // namespace minivllm
