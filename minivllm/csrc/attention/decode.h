// Launcher of attention/decode.cu: attention of decode rows over the paged cache, following a plan (attention/plan.h). Torch-free.
#pragma once

#include <cstdint>

#include "attention/plan.h"
#include "attention/prefill.h"

namespace minivllm::attention {

// Of the problem of all sequences (attention/prefill.h, paged), the part that is decoded.
struct DecodeCall : Prefill {
  int32_t* plan;  // also holds the counters and the states of cut rows
  bool alone;     // no other kernel runs for this call: zero the rows of q that belong to no sequence here
  DecodeShape shape;
};

// Whether this kernel takes decode rows of such tensors; if not, the general kernel must take them.
bool can_decode(const DecodeCall& call);

// Thread blocks of the persistent grid on the current device, for DecodeShape::num_ctas; 0 if the device cannot run it.
int decode_grid(const DecodeShape& shape);

const char* launch_decode(const DecodeCall& call, void* stream);

}  // namespace minivllm::attention
