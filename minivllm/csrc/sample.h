// Launchers of sample.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. They return null or an error text.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace minivllm {

struct SampleArguments {
  const void* logits;
  int64_t stride, num_rows, vocab;
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const int64_t* seeds;
  int64_t* out;
  void* workspace;  // sample_workspace_bytes, on 16 bytes
  DtypeCode dtype;
};

int64_t sample_workspace_bytes(int64_t num_rows, int64_t vocab);

const char* launch_sample(const SampleArguments& arguments, void* stream);

}  // namespace minivllm
