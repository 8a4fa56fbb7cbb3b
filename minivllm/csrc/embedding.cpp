// embedding: argument checks, the CPU kernel, and the border to the CUDA kernel of embedding.cu.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "common/new_tensor.h"
#include "embedding.h"

namespace minivllm {
namespace {

Tensor check_and_allocate(const Tensor& token_ids, const Tensor& weight) {
  Check check("embedding", weight);
  check.tensor("weight", weight, {"vocab_shard", "hidden"}, MINIVLLM_FLOATS);
  check.tensor("token_ids", token_ids, {"num_tokens"}, {ScalarType::Long});
  return new_tensor(weight, {token_ids.size(0), weight.size(1)}, weight.scalar_type());
}

Tensor embedding_cpu(const Tensor& token_ids, const Tensor& weight, int64_t vocab_start) {
  Tensor out = check_and_allocate(token_ids, weight);
  const int64_t element = static_cast<int64_t>(weight.element_size()), row = weight.size(1) * element;
  const int64_t stride = weight.stride(0) * element;
  const auto* table = static_cast<const char*>(weight.data_ptr());
  auto* rows = static_cast<char*>(out.data_ptr());
  parallel_items(token_ids.size(0), weight.size(1), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      // In unsigned numbers one comparison finds ids on either side of the shard; what would overflow wraps to a large number.
      const uint64_t index = static_cast<uint64_t>(ids_of(token_ids)[t]) - static_cast<uint64_t>(vocab_start);
      if (index < static_cast<uint64_t>(weight.size(0)))
        std::memcpy(rows + t * row, table + static_cast<int64_t>(index) * stride, row);
      else
        std::memset(rows + t * row, 0, row);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("embedding", TORCH_BOX(&embedding_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

Tensor embedding_cuda(const Tensor& token_ids, const Tensor& weight, int64_t vocab_start) {
  Tensor out = check_and_allocate(token_ids, weight);
  const CudaScope scope(weight);
  const EmbeddingTable table{weight.data_ptr(), weight.stride(0), weight.size(0), weight.size(1),
                             static_cast<int64_t>(weight.element_size())};
  check_launch("embedding",
               launch_embedding(ids_of(token_ids), token_ids.size(0), table, vocab_start, out.data_ptr(), scope.stream()));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("embedding", TORCH_BOX(&embedding_cuda)); }
#endif

}  // namespace minivllm
