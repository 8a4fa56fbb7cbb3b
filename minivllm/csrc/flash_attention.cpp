// flash_attention: argument checks, the CPU kernel's call (attention/cpu_core.cpp computes), the border to flash_attention.cu.
#include "flash_attention.h"

#include "attention/op.h"

namespace minivllm {
namespace {

using attention::Result;
using attention::Scores;

Check check_flash(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                  const Scores& scores) {
  Check check("flash_attention", q);
  check.tensor("q", q, {"total_q", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check.tensor("k", k, {"total_k", "num_kv_heads", "head_dim"}, {q.scalar_type()});
  check.tensor("v", v, {"total_k", "num_kv_heads", "head_dim"}, {q.scalar_type()});
  check.tensor("cu_seqlens_q", cu_seqlens_q, {"batch+1"}, {ScalarType::Int});
  check.tensor("cu_seqlens_k", cu_seqlens_k, {"batch+1"}, {ScalarType::Int});
  attention::check_heads(check);
  attention::check_scores(check, scores);
  check.require(cu_seqlens_q.size(0) >= 1, "cu_seqlens_q is empty, expected batch + 1 numbers");
  return check;
}

Result flash_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                           const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, bool causal,
                           int64_t window, double softcap, bool return_lse) {
  const Scores scores{scale, causal, window, softcap};
  const Check check = check_flash(q, k, v, cu_seqlens_q, cu_seqlens_k, scores);
  attention::check_prefix_sums(check, "q", cu_seqlens_q, check["total_q"], max_seqlen_q);
  attention::check_prefix_sums(check, "k", cu_seqlens_k, check["total_k"], max_seqlen_k);
  attention::Call call{};
  call.num_kv_heads = check["num_kv_heads"];
  call.k = {k.data_ptr(), 0, k.stride(1), k.stride(0)};
  call.v = {v.data_ptr(), 0, v.stride(1), v.stride(0)};
  const int32_t *cu_q = attention::ints(cu_seqlens_q), *cu_k = attention::ints(cu_seqlens_k);
  for (int64_t i = 0; i + 1 < check["batch+1"]; ++i)
    call.sequences.push_back({cu_q[i], cu_q[i + 1] - cu_q[i], cu_k[i], cu_k[i + 1] - cu_k[i], nullptr});
  return attention::run_cpu(q, scores, return_lse, std::move(call));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("flash_attention", TORCH_BOX(&flash_attention_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

Result flash_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                            const Tensor& cu_seqlens_k, int64_t, int64_t, double scale, bool causal, int64_t window,
                            double softcap, bool return_lse) {
  const Scores scores{scale, causal, window, softcap};
  const Check check = check_flash(q, k, v, cu_seqlens_q, cu_seqlens_k, scores);
  const CudaScope scope(q);
  const Result result = attention::new_result(q, return_lse);
  attention::Prefill problem = attention::cuda_problem(check, q, scores, result);
  problem.k = {k.data_ptr(), 0, k.stride(1), k.stride(0)};
  problem.v = {v.data_ptr(), 0, v.stride(1), v.stride(0)};
  problem.cu_seqlens_q = attention::ints(cu_seqlens_q), problem.cu_seqlens_k = attention::ints(cu_seqlens_k);
  problem.batch = static_cast<int>(cu_seqlens_q.size(0) - 1);
  check_launch("flash_attention", launch_flash_attention(problem, scope.stream()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("flash_attention", TORCH_BOX(&flash_attention_cuda)); }
#endif

}  // namespace minivllm
