// copy_blocks on the CPU. What lies at one offset of a target depends on the sources at that offset alone, so the blocks are cut
// into slices: all sources of a slice are read into a buffer that stays in the cache, then all targets are written. No pair has
// to be compared with another, and slices are what threads share.
#include "common/check.h"
#include "common/cpu.h"
#include "common/kv_cache.h"

#include <algorithm>
#include <memory>

namespace minivllm {
namespace {

constexpr int64_t kBufferBytes = 32768;  // about an L1 cache
constexpr int64_t kSmallestSlice = 256;  // bytes: four cache lines in a row are still read at a fair speed

const int64_t* ids(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

void check_ids(const Check& check, const char* name, const Tensor& t) {
  const int64_t n = check["n"], num_blocks = check["num_blocks"];
  const int64_t* id = ids(t);
  for (int64_t i = 0; i < n; ++i)
    if (id[i] < 0 || id[i] >= num_blocks)
      check.fail(std::string(name) + " holds " + std::to_string(id[i]) + ", expected " +
                 (id[i] < 0 ? "at least 0" : "less than " + std::to_string(num_blocks)));
}

void check_copy(const Tensor& k_cache, const Tensor& v_cache, const Tensor& sources, const Tensor& targets) {
  Check check("copy_blocks", k_cache);
  check.tensor("k_cache", k_cache, {"num_blocks", "num_kv_heads", "block_size", "head_dim"}, MINIVLLM_FLOATS);
  check_cache(check, "k_cache", k_cache, k_cache.scalar_type());
  check_cache(check, "v_cache", v_cache, k_cache.scalar_type());
  check.tensor("sources", sources, {"n"}, {ScalarType::Long});
  check.tensor("targets", targets, {"n"}, {ScalarType::Long});
  check_ids(check, "sources", sources);
  check_ids(check, "targets", targets);
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
  check_copy(k_cache, v_cache, sources, targets);
  const Pairs pairs{ids(sources), ids(targets), sources.size(0)};
  const int64_t element = static_cast<int64_t>(k_cache.element_size());
  const int64_t block = k_cache.size(1) * k_cache.size(2) * k_cache.size(3) * element;
  if (pairs.count == 0 || block == 0) return;
  const int64_t slice = std::min(block, std::max(kBufferBytes / pairs.count, kSmallestSlice));
  const int64_t num_slices = (block + slice - 1) / slice;
  parallel_items(2 * num_slices, pairs.count * slice / 4, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<char[]> buffer(new char[pairs.count * slice]);
    for (int64_t s = begin; s < end; ++s) {
      const Tensor& cache = s < num_slices ? k_cache : v_cache;
      const int64_t offset = s % num_slices * slice;
      copy_slice(static_cast<char*>(cache.data_ptr()) + offset, cache.stride(0) * element,
                 std::min(slice, block - offset), pairs, buffer.get());
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("copy_blocks", TORCH_BOX(&copy_blocks_cpu)); }

}  // namespace minivllm
