// What the ops flash_attention and paged_attention share on the host: checks of their arguments, and the CPU kernel's call.
#pragma once

#include "attention/cpu_core.h"
#include "attention/prefill.h"
#include "common/check.h"
#include "common/cuda_border.h"
#include "common/new_tensor.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>

namespace minivllm::attention {

using Result = std::tuple<Tensor, Tensor>;  // out, lse

// The options that change scores or hide keys, as they come from the dispatcher.
struct Scores {
  double scale;
  bool causal;
  int64_t window;
  double softcap;
};

inline const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

inline void check_head_numbers(const Check& check, int64_t heads, int64_t kv_heads, int64_t head_dim) {
  if (kv_heads <= 0 || heads < 0 || heads % kv_heads != 0)
    check.fail("num_heads=" + std::to_string(heads) + " is not a multiple of num_kv_heads=" + std::to_string(kv_heads));
  if (head_dim < 1 || head_dim > 256)
    check.fail("head_dim=" + std::to_string(head_dim) + ", expected 1 to 256");
}

inline void check_scores(const Check& check, const Scores& scores) {
  const std::string window = "window=" + std::to_string(scores.window);
  if (scores.window < 0) check.fail(window + ", expected 0 (off) or a number of keys");
  if (scores.window > 0 && !scores.causal) check.fail(window + " needs causal=True");
  if (!(scores.softcap >= 0.0 && std::isfinite(scores.softcap)))
    check.fail("softcap=" + std::to_string(scores.softcap) + ", expected 0 (off) or a positive number");
}

inline void check_heads(const Check& check) {
  check_head_numbers(check, check["num_heads"], check["num_kv_heads"], check["head_dim"]);
}

// cu: [batch + 1] with batch >= 0, prefix sums that begin with 0, never fall, and end within `total` rows; no step above
// `longest`. Looks at the values: on the CPU alone.
inline void check_prefix_sums(const Check& check, const char* name, const Tensor& cu, int64_t total, int64_t longest) {
  const int64_t n = cu.size(0);
  const int32_t* sums = ints(cu);
  const std::string which(name);
  check.require(sums[0] == 0, "cu_seqlens_" + which + " begins with " + std::to_string(sums[0]) + ", expected 0");
  for (int64_t i = 1; i < n; ++i) {
    const int64_t length = int64_t{sums[i]} - sums[i - 1];
    if (length < 0 || length > longest)
      check.fail("cu_seqlens_" + which + " gives sequence " + std::to_string(i - 1) + " a length of " +
                 std::to_string(length) + ", expected 0 to max_seqlen_" + which + "=" + std::to_string(longest));
  }
  if (sums[n - 1] > total)
    check.fail("cu_seqlens_" + which + " ends with " + std::to_string(sums[n - 1]) + ", but there are only " +
               std::to_string(total) + " rows");
}

inline Result new_result(const Tensor& q, bool return_lse) {
  return {new_tensor(q, q.sizes(), q.scalar_type()),
          new_tensor(q, {return_lse ? q.size(0) : 0, q.size(1)}, ScalarType::Float)};
}

// Rows that belong to no sequence are 0, and their sums -infinity. The caller fills keys, values and sequences.
inline Result run_cpu(const Tensor& q, const Scores& scores, bool return_lse, Call call) {
  Result result = new_result(q, return_lse);
  call.q = q.data_ptr(), call.q_token_stride = q.stride(0), call.q_head_stride = q.stride(1);
  call.out = std::get<0>(result).data_ptr();
  call.lse = return_lse ? static_cast<float*>(std::get<1>(result).data_ptr()) : nullptr;
  call.num_heads = q.size(1), call.head_dim = q.size(2);
  call.scale = static_cast<float>(scores.scale), call.softcap = static_cast<float>(scores.softcap);
  call.causal = scores.causal, call.window = scores.window;
  const int64_t used = call.sequences.empty() ? 0 : call.sequences.back().q_begin + call.sequences.back().len_q;
  const int64_t row_bytes = call.num_heads * call.head_dim * static_cast<int64_t>(q.element_size());
  if (used < q.size(0)) std::memset(static_cast<char*>(call.out) + used * row_bytes, 0, (q.size(0) - used) * row_bytes);
  if (return_lse)
    std::fill(call.lse + used * call.num_heads, call.lse + q.size(0) * call.num_heads, -std::numeric_limits<float>::infinity());
  run(q.scalar_type(), std::move(call));
  return result;
}

#ifdef MINIVLLM_CUDA
// What the CUDA kernels must know of all but keys, values and lengths, which the caller fills.
inline Prefill cuda_problem(const Check& check, const Tensor& q, const Scores& scores, const Result& result) {
  Prefill problem{};
  problem.q = q.data_ptr(), problem.q_token_stride = q.stride(0), problem.q_head_stride = q.stride(1);
  problem.out = std::get<0>(result).data_ptr();
  const Tensor& lse = std::get<1>(result);
  problem.lse = lse.size(0) == q.size(0) ? static_cast<float*>(lse.data_ptr()) : nullptr;
  check.require(q.size(0) < int64_t{1} << 31, "q has more than 2^31 - 1 rows");
  problem.num_tokens = static_cast<int>(q.size(0)), problem.head_dim = static_cast<int>(q.size(2));
  problem.num_heads = static_cast<int>(q.size(1)), problem.num_kv_heads = static_cast<int>(check["num_kv_heads"]);
  problem.scale = static_cast<float>(scores.scale), problem.softcap = static_cast<float>(scores.softcap);
  problem.window = scores.window, problem.causal = scores.causal, problem.dtype = dtype_code(q);
  return problem;
}
#endif

}  // namespace minivllm::attention
