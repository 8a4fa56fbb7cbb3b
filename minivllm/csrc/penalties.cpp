// apply_penalties and count_tokens: argument checks, the CPU kernels, and the border to the CUDA kernels of penalties.cu. A
// sequence holds few of the tokens of a vocabulary, so a row is taken in chunks of 64 tokens and the logits of a chunk are
// touched only where one of its counts is not 0.
#include "common/check.h"
#include "common/cpu.h"
#include "common/cuda_border.h"
#include "penalties.h"

#include <algorithm>

namespace minivllm {
namespace {

constexpr int64_t kPenaltiesChunk = 64;

template <typename T>
const T* values(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

inline bool any_counted(const int32_t* counts, int64_t n) {
  int32_t bits = 0;
#pragma omp simd reduction(| : bits)
  for (int64_t i = 0; i < n; ++i) bits |= counts[i];
  return bits != 0;
}

void penalise(float* x, const int32_t* counts, int64_t n, float presence, float frequency, float repetition) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int32_t generated = counts[i] >> 1;
    const float factor = counts[i] != 0 ? repetition : 1.0f;
    const float repeated = x[i] > 0.0f ? x[i] / factor : x[i] * factor;
    x[i] = repeated - (frequency * static_cast<float>(generated) + (generated > 0 ? presence : 0.0f));
  }
}

// One entry for each penalised row.
struct Columns {
  const int64_t *row_indices, *count_indices;
  const float *presence, *frequency, *repetition;
};

template <typename T>
void penalise_rows(T* logits, int64_t logits_stride, const Tensor& counts, const Columns& of, int64_t n) {
  const int64_t vocab = counts.size(1), num_chunks = (vocab + kPenaltiesChunk - 1) / kPenaltiesChunk;
  const int64_t counts_stride = counts.stride(0);
  const int32_t* first = values<int32_t>(counts);
  parallel_items(n * num_chunks, kPenaltiesChunk, [&](int64_t begin, int64_t end) {
    alignas(64) float x[kPenaltiesChunk];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t r = item / num_chunks, start = item % num_chunks * kPenaltiesChunk, size = std::min(kPenaltiesChunk, vocab - start);
      const int32_t* chunk = first + of.count_indices[r] * counts_stride + start;
      if (!any_counted(chunk, size)) continue;
      T* in_place = logits + of.row_indices[r] * logits_stride + start;
      to_float(in_place, x, size);
      penalise(x, chunk, size, of.presence[r], of.frequency[r], of.repetition[r]);
      from_float(x, in_place, size);
    }
  });
}

Check check_apply(const Tensor& logits, const Tensor& row_indices, const Tensor& counts, const Tensor& count_indices,
                  const Tensor& presence, const Tensor& frequency, const Tensor& repetition) {
  Check check("apply_penalties", logits);
  check.tensor("logits", logits, {"num_rows", "vocab"}, MINIVLLM_FLOATS);
  check.tensor("row_indices", row_indices, {"n"}, {ScalarType::Long});
  check.tensor("counts", counts, {"num_states", "vocab"}, {ScalarType::Int});
  check.tensor("count_indices", count_indices, {"n"}, {ScalarType::Long});
  check.tensor("presence", presence, {"n"}, {ScalarType::Float});
  check.tensor("frequency", frequency, {"n"}, {ScalarType::Float});
  check.tensor("repetition", repetition, {"n"}, {ScalarType::Float});
  return check;
}

void apply_penalties_cpu(Tensor logits, const Tensor& row_indices, const Tensor& counts, const Tensor& count_indices,
                         const Tensor& presence, const Tensor& frequency, const Tensor& repetition) {
  const Check check = check_apply(logits, row_indices, counts, count_indices, presence, frequency, repetition);
  check_ids(check, "row_indices", row_indices, check["num_rows"]);
  check_ids(check, "count_indices", count_indices, check["num_states"]);
  const Columns of{values<int64_t>(row_indices), values<int64_t>(count_indices), values<float>(presence),
                 values<float>(frequency), values<float>(repetition)};
  dispatch_float(logits.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    penalise_rows(static_cast<T*>(logits.data_ptr()), logits.stride(0), counts, of, row_indices.size(0));
  });
}

Check check_count(const Tensor& counts, const Tensor& count_indices, const Tensor& token_ids) {
  Check check("count_tokens", counts);
  check.tensor("counts", counts, {"num_states", "vocab"}, {ScalarType::Int});
  check.tensor("count_indices", count_indices, {"n"}, {ScalarType::Long});
  check.tensor("token_ids", token_ids, {"n"}, {ScalarType::Long});
  return check;
}

void count_tokens_cpu(Tensor counts, const Tensor& count_indices, const Tensor& token_ids) {
  const Check check = check_count(counts, count_indices, token_ids);
  check_ids(check, "count_indices", count_indices, check["num_states"]);
  check_ids(check, "token_ids", token_ids, check["vocab"], INT64_MIN);
  const int64_t *rows = values<int64_t>(count_indices), *tokens = values<int64_t>(token_ids);
  const int64_t n = check["n"], stride = counts.stride(0);
  auto* first = static_cast<int32_t*>(counts.data_ptr());
  for (int64_t i = 0; i < n; ++i)
    if (tokens[i] >= 0) first[rows[i] * stride + tokens[i]] += 2;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) {
  m.impl("apply_penalties", TORCH_BOX(&apply_penalties_cpu));
  m.impl("count_tokens", TORCH_BOX(&count_tokens_cpu));
}

#ifdef MINIVLLM_CUDA
namespace {

void apply_penalties_cuda(Tensor logits, const Tensor& row_indices, const Tensor& counts, const Tensor& count_indices,
                          const Tensor& presence, const Tensor& frequency, const Tensor& repetition) {
  const Check check = check_apply(logits, row_indices, counts, count_indices, presence, frequency, repetition);
  const CudaScope scope(logits);
  const PenaltyArguments arguments{logits.data_ptr(),
                                   logits.stride(0),
                                   values<int32_t>(counts),
                                   counts.stride(0),
                                   check["n"],
                                   check["vocab"],
                                   values<int64_t>(row_indices),
                                   values<int64_t>(count_indices),
                                   values<float>(presence),
                                   values<float>(frequency),
                                   values<float>(repetition),
                                   dtype_code(logits)};
  check_launch("apply_penalties", launch_apply_penalties(arguments, scope.stream()));
}

void count_tokens_cuda(Tensor counts, const Tensor& count_indices, const Tensor& token_ids) {
  const Check check = check_count(counts, count_indices, token_ids);
  const CudaScope scope(counts);
  check_launch("count_tokens", launch_count_tokens(static_cast<int32_t*>(counts.data_ptr()), counts.stride(0),
                                                   values<int64_t>(count_indices), values<int64_t>(token_ids), check["n"],
                                                   scope.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) {
  m.impl("apply_penalties", TORCH_BOX(&apply_penalties_cuda));
  m.impl("count_tokens", TORCH_BOX(&count_tokens_cuda));
}
#endif

}  // namespace minivllm
