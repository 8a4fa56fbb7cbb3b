// Launchers of logprobs.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. They return null or an error text.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace minivllm {

struct LogprobsArguments {
  const void* logits;
  int64_t stride, n, vocab, num_top;
  const int64_t* token_ids;
  float* logprobs;
  int64_t *ranks, *top_ids;
  float* top_logprobs;
  void* workspace;  // logprobs_workspace_bytes, on 16 bytes
  DtypeCode dtype;
};

int64_t logprobs_workspace_bytes(int64_t n, int64_t vocab);

const char* launch_token_logprobs(const LogprobsArguments& arguments, void* stream);

}  // namespace minivllm
