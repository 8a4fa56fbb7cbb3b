// swap_blocks: argument checks, the CPU kernel, and the border to the CUDA kernel of swap_blocks.cu. The dispatcher sends a call with
// tensors on both devices to the CUDA kernel, because CUDA's dispatch key is the higher one.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/kv_cache.h"
#include "swap_blocks.h"

namespace minivllm {
namespace {

bool on_cpu(const Tensor& t) { return t.device().type() == torch::headeronly::DeviceType::CPU; }

// Target and ids lie where source does, unless source or target alone is in host memory: then the rest is on the CUDA device.
Check check_swap(const Tensor& source, const Tensor& target, const Tensor& source_ids, const Tensor& target_ids) {
  Check check("swap_blocks", source);
  check.tensor("source", source, {"num_source_blocks", "num_kv_heads", "block_size", "head_dim"}, MINIVLLM_FLOATS);
  check_cache(check, "source", source, source.scalar_type(), "num_source_blocks");
  if (on_cpu(source) != on_cpu(target)) check.expect_device_of(target);
  check_cache(check, "target", target, source.scalar_type(), "num_target_blocks");
  check.expect_device_of(on_cpu(source) ? target : source);
  check.tensor("source_ids", source_ids, {"n"}, {ScalarType::Long});
  check.tensor("target_ids", target_ids, {"n"}, {ScalarType::Long});
  return check;
}

void swap_blocks_cpu(const Tensor& source, Tensor target, const Tensor& source_ids, const Tensor& target_ids) {
  const Check check = check_swap(source, target, source_ids, target_ids);
  check_ids(check, "source_ids", source_ids, source.size(0));
  check_ids(check, "target_ids", target_ids, target.size(0));
  const int64_t bytes = block_bytes(source), from_stride = block_stride_bytes(source), to_stride = block_stride_bytes(target);
  const auto* from = static_cast<const char*>(source.data_ptr());
  auto* to = static_cast<char*>(target.data_ptr());
  parallel_items(source_ids.size(0), bytes / 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(to + ids_of(target_ids)[i] * to_stride, from + ids_of(source_ids)[i] * from_stride, bytes);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("swap_blocks", TORCH_BOX(&swap_blocks_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

SwapBlocksCache cuda_cache(const Check& check, const char* name, const Tensor& cache, const Tensor& block_ids) {
  void* data = cache.data_ptr();
  if (on_cpu(cache) && cache.numel() > 0) {
    data = pinned_address(data);
    check.require(data != nullptr, std::string(name) + " is in host memory that is not pinned; call .pin_memory() first");
  }
  return {data, block_stride_bytes(cache), ids_of(block_ids)};
}

void swap_blocks_cuda(const Tensor& source, Tensor target, const Tensor& source_ids, const Tensor& target_ids) {
  const Check check = check_swap(source, target, source_ids, target_ids);
  check.require(!on_cpu(source) || !on_cpu(target), "source_ids is on another device than source and target");
  const CudaScope scope(on_cpu(source) ? target : source);
  const SwapBlocksCache from = cuda_cache(check, "source", source, source_ids);
  const SwapBlocksCache to = cuda_cache(check, "target", target, target_ids);
  check_launch("swap_blocks", launch_swap_blocks(from, to, source_ids.size(0), block_bytes(source),
                                                 on_cpu(source) || on_cpu(target), scope.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("swap_blocks", TORCH_BOX(&swap_blocks_cuda)); }
#endif

}  // namespace minivllm
