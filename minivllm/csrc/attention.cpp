// flash_attention and paged_attention: argument checks and the CPU kernels; attention/cpu_core.h computes.
#include "attention/cpu_core.h"
#include "common/check.h"
#include "common/cpu.h"
#include "common/kv_cache.h"

#include <utility>

namespace minivllm {
namespace {

using attention::Call;
using attention::Sequence;
using attention::Side;

const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.data_ptr()); }

// cu: [batch + 1] prefix sums that begin with 0, never fall, and end within `total` rows; no step above `longest`.
void check_prefix_sums(const Check& check, const char* name, const Tensor& cu, int64_t total, int64_t longest) {
  const int64_t n = cu.size(0);
  const int32_t* sums = ints(cu);
  const std::string which(name);
  check.require(n >= 1, "cu_seqlens_" + which + " is empty, expected batch + 1 numbers");
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

void check_heads(const Check& check) {
  const int64_t heads = check["num_heads"], kv_heads = check["num_kv_heads"], head_dim = check["head_dim"];
  if (kv_heads == 0 || heads % kv_heads != 0)
    check.fail("num_heads=" + std::to_string(heads) + " is not a multiple of num_kv_heads=" + std::to_string(kv_heads));
  if (head_dim < 1 || head_dim > 256)
    check.fail("head_dim=" + std::to_string(head_dim) + ", expected 1 to 256");
}

// Rows of the output that belong to no sequence are 0.
Tensor run(const Tensor& q, Call call) {
  Tensor out = torch::stable::new_empty(q, q.sizes());
  call.q = q.data_ptr(), call.q_token_stride = q.stride(0), call.q_head_stride = q.stride(1);
  call.out = out.data_ptr();
  call.num_heads = q.size(1), call.head_dim = q.size(2);
  const int64_t used = call.sequences.empty() ? 0 : call.sequences.back().q_begin + call.sequences.back().len_q;
  const int64_t row_bytes = call.num_heads * call.head_dim * static_cast<int64_t>(q.element_size());
  if (used < q.size(0)) std::memset(static_cast<char*>(call.out) + used * row_bytes, 0, (q.size(0) - used) * row_bytes);
  dispatch_float(q.scalar_type(), [&](auto* tag) { attention::run<std::remove_pointer_t<decltype(tag)>>(std::move(call)); });
  return out;
}

Tensor flash_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                           const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, double scale,
                           bool causal) {
  Check check("flash_attention", q);
  check.tensor("q", q, {"total_q", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check.tensor("k", k, {"total_k", "num_kv_heads", "head_dim"}, {q.scalar_type()});
  check.tensor("v", v, {"total_k", "num_kv_heads", "head_dim"}, {q.scalar_type()});
  check.tensor("cu_seqlens_q", cu_seqlens_q, {"batch+1"}, {ScalarType::Int});
  check.tensor("cu_seqlens_k", cu_seqlens_k, {"batch+1"}, {ScalarType::Int});
  check_heads(check);
  check_prefix_sums(check, "q", cu_seqlens_q, check["total_q"], max_seqlen_q);
  check_prefix_sums(check, "k", cu_seqlens_k, check["total_k"], max_seqlen_k);
  Call call{};
  call.num_kv_heads = check["num_kv_heads"], call.scale = static_cast<float>(scale), call.causal = causal;
  call.k = Side{k.data_ptr(), 0, k.stride(1), k.stride(0)};
  call.v = Side{v.data_ptr(), 0, v.stride(1), v.stride(0)};
  const int32_t *cu_q = ints(cu_seqlens_q), *cu_k = ints(cu_seqlens_k);
  for (int64_t i = 0; i + 1 < check["batch+1"]; ++i)
    call.sequences.push_back(Sequence{cu_q[i], cu_q[i + 1] - cu_q[i], cu_k[i], cu_k[i + 1] - cu_k[i], nullptr});
  return run(q, std::move(call));
}

// Every block that a sequence uses must exist; table entries beyond are never looked at.
void check_blocks(const Check& check, const Tensor& block_tables, const Tensor& seq_lens) {
  const int64_t num_blocks = check["num_blocks"], block_size = check["block_size"], max_blocks = check["max_blocks"];
  for (int64_t i = 0; i < check["num_seqs"]; ++i) {
    const int64_t length = ints(seq_lens)[i];
    if (length < 0 || length > max_blocks * block_size)
      check.fail("seq_lens[" + std::to_string(i) + "] is " + std::to_string(length) + ", expected 0 to " +
                 std::to_string(max_blocks * block_size) + " (max_blocks * block_size)");
    const int32_t* table = ints(block_tables) + i * block_tables.stride(0);
    for (int64_t b = 0; b * block_size < length; ++b)
      if (table[b] < 0 || table[b] >= num_blocks)
        check.fail("block_tables[" + std::to_string(i) + "][" + std::to_string(b) + "] is " + std::to_string(table[b]) +
                   ", expected 0 to " + std::to_string(num_blocks - 1));
  }
}

Side cache_side(const Tensor& cache) {
  return {cache.data_ptr(), cache.stride(0), cache.size(2) * cache.size(3), cache.size(3)};
}

Tensor paged_attention_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                           const Tensor& seq_lens, const Tensor& cu_seqlens_q, int64_t max_seqlen_q, double scale) {
  Check check("paged_attention", q);
  check.tensor("q", q, {"num_tokens", "num_heads", "head_dim"}, MINIVLLM_FLOATS);
  check_cache(check, "k_cache", k_cache, q.scalar_type());
  check_cache(check, "v_cache", v_cache, q.scalar_type());
  check.tensor("block_tables", block_tables, {"num_seqs", "max_blocks"}, {ScalarType::Int});
  check.tensor("seq_lens", seq_lens, {"num_seqs"}, {ScalarType::Int});
  check.tensor("cu_seqlens_q", cu_seqlens_q, {"num_seqs+1"}, {ScalarType::Int});
  const int64_t num_seqs = check["num_seqs"], block_size = check["block_size"];
  if (cu_seqlens_q.size(0) != num_seqs + 1)
    check.fail("cu_seqlens_q has " + std::to_string(cu_seqlens_q.size(0)) + " numbers, expected num_seqs + 1 = " +
               std::to_string(num_seqs + 1));
  check_heads(check);
  check_prefix_sums(check, "q", cu_seqlens_q, check["num_tokens"], max_seqlen_q);
  check_blocks(check, block_tables, seq_lens);
  Call call{};
  call.num_kv_heads = check["num_kv_heads"], call.scale = static_cast<float>(scale), call.causal = true;
  call.k = cache_side(k_cache), call.v = cache_side(v_cache);
  while ((int64_t{1} << call.block_shift) < block_size) ++call.block_shift;
  const int32_t* cu_q = ints(cu_seqlens_q);
  const int64_t table_stride = block_tables.stride(0);
  call.sequences.reserve(num_seqs);
  for (int64_t i = 0; i < num_seqs; ++i)
    call.sequences.push_back(
        Sequence{cu_q[i], cu_q[i + 1] - cu_q[i], 0, ints(seq_lens)[i], ints(block_tables) + i * table_stride});
  return run(q, std::move(call));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) {
  m.impl("flash_attention", TORCH_BOX(&flash_attention_cpu));
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
}

}  // namespace minivllm
