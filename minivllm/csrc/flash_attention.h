// Launcher of flash_attention.cu, torch-free. It returns null or an error text.
#pragma once

#include "attention/prefill.h"

namespace minivllm {

const char* launch_flash_attention(const attention::Prefill& problem, void* stream);

}  // namespace minivllm
