// flash_attention on CUDA: the prefill kernels over packed keys and values.
#include "attention/prefill.cuh"
#include "flash_attention.h"

namespace minivllm {

const char* launch_flash_attention(const attention::Prefill& problem, void* stream) {
  return attention::launch_prefill<false>(problem, stream);
}

}  // namespace minivllm
