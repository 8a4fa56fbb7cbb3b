// paged_attention: argument checks, the CPU kernel's call (attention/cpu_core.cpp computes), the border to paged_attention.cu.
#include "paged_attention.h"

#include "attention/decode.h"
#include "attention/op.h"
#include "common/kv_cache.h"

#include <optional>

namespace minivllm {
namespace {

using attention::Result;
using attention::Scores;
using Plan = std::optional<Tensor>;

void check_sequences(Check& check, const Tensor& seq_lens, const Tensor& cu_seqlens_q) {
  check.tensor("seq_lens", seq_lens, {"num_seqs"}, {ScalarType::Int});
  check.tensor("cu_seqlens_q", cu_seqlens_q, {"num_seqs+1"}, {ScalarType::Int});
  if (check["num_seqs+1"] != check["num_seqs"] + 1)
    check.fail("cu_seqlens_q has " + std::to_string(check["num_seqs+1"]) + " numbers, expected num_seqs + 1 = " +
               std::to_string(check["num_seqs"] + 1));
}

Check check_paged(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                  const Tensor& seq_lens, const Tensor& cu_seqlens_q, const Scores& scores, const Plan& plan) {
  Check check("paged_attention", q);
  check.tensor("q", q, {"num_tokens", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check_cache(check, "k_cache", k_cache, q.scalar_type());
  check_cache(check, "v_cache", v_cache, q.scalar_type());
  check.tensor("block_tables", block_tables, {"num_seqs", "max_blocks"}, {ScalarType::Int});
  check_sequences(check, seq_lens, cu_seqlens_q);
  attention::check_heads(check);
  attention::check_scores(check, scores);
  if (plan) check.tensor("plan", *plan, {"plan_words"}, {ScalarType::Int});
  return check;
}

// Every block that a sequence uses must exist; table entries beyond are never looked at.
void check_blocks(const Check& check, const Tensor& block_tables, const Tensor& seq_lens) {
  const int64_t num_blocks = check["num_blocks"], block_size = check["block_size"], max_blocks = check["max_blocks"];
  for (int64_t i = 0; i < check["num_seqs"]; ++i) {
    const int64_t length = attention::ints(seq_lens)[i];
    if (length < 0 || length > max_blocks * block_size)
      check.fail("seq_lens[" + std::to_string(i) + "] is " + std::to_string(length) + ", expected 0 to " +
                 std::to_string(max_blocks * block_size) + " (max_blocks * block_size)");
    const int32_t* table = attention::ints(block_tables) + i * block_tables.stride(0);
    for (int64_t b = 0; b * block_size < length; ++b)
      if (table[b] < 0 || table[b] >= num_blocks)
        check.fail("block_tables[" + std::to_string(i) + "][" + std::to_string(b) + "] is " + std::to_string(table[b]) +
                   ", expected 0 to " + std::to_string(num_blocks - 1));
  }
}

attention::Side cache_side(const Tensor& cache) {
  return {cache.data_ptr(), cache.stride(0), cache.size(2) * cache.size(3), cache.size(3)};
}

int log2_of(int64_t power) {
  int shift = 0;
  while ((int64_t{1} << shift) < power) ++shift;
  return shift;
}

Result paged_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                           const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_seqlen_q, double scale,
                           int64_t window, double softcap, bool return_lse, Plan plan) {
  const Scores scores{scale, true, window, softcap};
  const Check check = check_paged(q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q, scores, plan);
  attention::check_prefix_sums(check, "q", cu_seqlens_q, check["num_tokens"], max_seqlen_q);
  check_blocks(check, block_tables, seq_lens);
  attention::Call call{};
  call.num_kv_heads = check["num_kv_heads"], call.block_shift = log2_of(check["block_size"]);
  call.k = cache_side(k_cache), call.v = cache_side(v_cache);
  const int32_t *cu_q = attention::ints(cu_seqlens_q), *lengths = attention::ints(seq_lens);
  const int32_t* tables = attention::ints(block_tables);
  const int64_t num_seqs = check["num_seqs"], table_stride = block_tables.stride(0);
  call.sequences.reserve(num_seqs);
  for (int64_t i = 0; i < num_seqs; ++i)
    call.sequences.push_back({cu_q[i], cu_q[i + 1] - cu_q[i], 0, lengths[i], tables + i * table_stride});
  return attention::run_cpu(q, scores, return_lse, std::move(call));
}

Check check_plan(const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_seqlen_k, int64_t num_heads,
                 int64_t num_kv_heads, int64_t head_dim, int64_t window) {
  Check check("plan_paged_attention", seq_lens);
  check_sequences(check, seq_lens, cu_seqlens_q);
  check.require(max_seqlen_k >= 0, "max_seqlen_k is " + std::to_string(max_seqlen_k) + ", expected 0 or more");
  attention::check_head_numbers(check, num_heads, num_kv_heads, head_dim);
  attention::check_scores(check, {1.0, true, window, 0.0});
  return check;
}

Tensor plan_paged_attention_cpu(const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t, int64_t max_seqlen_k,
                                int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, int64_t window) {
  check_plan(seq_lens, cu_seqlens_q, max_seqlen_k, num_heads, num_kv_heads, head_dim, window);
  return new_tensor(seq_lens, {0}, ScalarType::Int);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
  m.impl("plan_paged_attention", TORCH_BOX(&plan_paged_attention_cpu));
}

#ifdef MINIVLLM_CUDA
namespace {

attention::DecodeShape decode_shape(int64_t num_seqs, int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t num_heads,
                                    int64_t num_kv_heads, int64_t head_dim, int64_t window) {
  const auto number = [](int64_t v) { return static_cast<int>(v < INT32_MAX ? v : INT32_MAX); };
  const int group = number(num_heads / num_kv_heads);
  attention::DecodeShape shape{number(num_seqs), number(max_seqlen_k), number(num_kv_heads), group, number(head_dim),
                               attention::decoded_queries(max_seqlen_q, group), number(window), 0};
  shape.num_ctas = attention::decode_grid(shape);
  return shape;
}

Tensor new_plan(const Tensor& seq_lens, const Tensor& cu_seqlens_q, const attention::DecodeShape& shape, void* stream) {
  Tensor plan = new_tensor(seq_lens, {shape.words()}, ScalarType::Int);
  check_launch("plan_paged_attention", launch_plan(attention::ints(seq_lens), attention::ints(cu_seqlens_q), shape,
                                                   static_cast<int32_t*>(plan.data_ptr()), stream));
  return plan;
}

Tensor plan_paged_attention_cuda(const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_seqlen_q,
                                 int64_t max_seqlen_k, int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                 int64_t window) {
  const Check check = check_plan(seq_lens, cu_seqlens_q, max_seqlen_k, num_heads, num_kv_heads, head_dim, window);
  const CudaScope scope(seq_lens);
  const auto shape =
      decode_shape(check["num_seqs"], max_seqlen_q, max_seqlen_k, num_heads, num_kv_heads, head_dim, window);
  return new_plan(seq_lens, cu_seqlens_q, shape, scope.stream());
}

// Sequences with few queries go to the decode kernel where it can take them, all others to the prefill kernel.
Result paged_attention_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                            const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_seqlen_q, double scale,
                            int64_t window, double softcap, bool return_lse, Plan plan) {
  const Scores scores{scale, true, window, softcap};
  const Check check = check_paged(q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q, scores, plan);
  const CudaScope scope(q);
  const Result result = attention::new_result(q, return_lse);
  attention::Prefill problem = attention::cuda_problem(check, q, scores, result);
  const attention::Side k = cache_side(k_cache), v = cache_side(v_cache);
  problem.k = {k.data, k.block_stride, k.head_stride, k.row_stride};
  problem.v = {v.data, v.block_stride, v.head_stride, v.row_stride};
  problem.block_shift = log2_of(check["block_size"]);
  problem.cu_seqlens_q = attention::ints(cu_seqlens_q), problem.seq_lens = attention::ints(seq_lens);
  problem.block_tables = attention::ints(block_tables), problem.table_stride = block_tables.stride(0);
  problem.batch = static_cast<int>(seq_lens.size(0));

  const auto shape = decode_shape(seq_lens.size(0), max_seqlen_q, check["max_blocks"] * check["block_size"], q.size(1),
                                  check["num_kv_heads"], q.size(2), window);
  attention::DecodeCall decode{problem, nullptr, max_seqlen_q <= shape.max_queries, shape};
  if (shape.num_seqs > 0 && attention::can_decode(decode)) {
    if (!plan) plan = new_plan(seq_lens, cu_seqlens_q, shape, scope.stream());
    check.require(plan->size(0) == shape.words(),
                  "plan has " + std::to_string(plan->size(0)) + " words, expected " + std::to_string(shape.words()) +
                      "; make it with plan_paged_attention from the same lengths, shapes and window");
    decode.plan = static_cast<int32_t*>(plan->data_ptr());
    check_launch("paged_attention", attention::launch_decode(decode, scope.stream()));
    problem.decoded_queries = shape.max_queries;
    if (decode.alone) return result;
  }
  check_launch("paged_attention", launch_paged_attention(problem, scope.stream()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cuda));
  m.impl("plan_paged_attention", TORCH_BOX(&plan_paged_attention_cuda));
}
#endif

}  // namespace minivllm
