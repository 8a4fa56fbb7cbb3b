// paged_attention on CUDA: the prefill kernels over the paged cache.
#include "attention/prefill.cuh"
#include "paged_attention.h"

namespace minivllm {

const char* launch_paged_attention(const attention::Prefill& problem, void* stream) {
  return attention::launch_prefill<true>(problem, stream);
}

}  // namespace minivllm
