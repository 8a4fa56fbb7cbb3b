// Launchers of penalties.cu, torch-free: raw pointers, strides in elements, a cudaStream_t as void*. They return null or an error text.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace minivllm {

struct PenaltyArguments {
  void* logits;
  int64_t logits_stride;
  const int32_t* counts;
  int64_t counts_stride, n, vocab;
  const int64_t *row_indices, *count_indices;
  const float *presence, *frequency, *repetition;
  DtypeCode dtype;
};

const char* launch_apply_penalties(const PenaltyArguments& arguments, void* stream);

const char* launch_count_tokens(int32_t* counts, int64_t counts_stride, const int64_t* count_indices, const int64_t* token_ids,
                                int64_t n, void* stream);

}  // namespace minivllm
