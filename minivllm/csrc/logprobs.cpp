// token_logprobs: argument checks, the CPU kernel, and the border to the CUDA kernels of logprobs.cu. On the CPU one pass
// over a row in chunks of 128 logits: the sum of exponentials is kept relative to the largest logit so far and rescaled when
// that grows (Milakov and Gimelshein 2018, arXiv:1805.02867), the likeliest tokens are kept in a heap, and a chunk whose
// largest logit could not enter it costs the heap nothing.
#include "common/check.h"
#include "common/cuda_border.h"
#include "common/new_tensor.h"
#include "common/simd.h"
#include "logprobs.h"

#include <algorithm>
#include <cfloat>
#include <tuple>
#include <vector>

namespace minivllm {
namespace {

constexpr int64_t kLogprobsChunk = 128;

struct Candidate {
  float logit;
  int64_t id;
};

inline bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// The likeliest of the tokens offered, as a heap with the least likely of them in front. Tokens are offered by ascending id, so one
// that only equals the front does not enter.
class Top {
 public:
  explicit Top(int64_t capacity) : capacity_(capacity) { heap_.reserve(capacity); }

  void clear() { heap_.clear(); }

  bool wants(float logit) const {
    return static_cast<int64_t>(heap_.size()) < capacity_ || (capacity_ > 0 && logit > heap_.front().logit);
  }

  void offer(float logit, int64_t id) {
    if (!wants(logit)) return;
    if (static_cast<int64_t>(heap_.size()) == capacity_) {
      std::pop_heap(heap_.begin(), heap_.end(), likelier);
      heap_.pop_back();
    }
    heap_.push_back({logit, id});
    std::push_heap(heap_.begin(), heap_.end(), likelier);
  }

  // Likeliest first; the heap is none afterwards.
  const std::vector<Candidate>& sort() {
    std::sort_heap(heap_.begin(), heap_.end(), likelier);
    return heap_;
  }

 private:
  int64_t capacity_;
  std::vector<Candidate> heap_;
};

inline float largest_of(const float* chunk) {
  Vec best = load(chunk);
  for (int64_t i = kLanes; i < kLogprobsChunk; i += kLanes) {
    const Vec next = load(chunk + i);
    best = next > best ? next : best;
  }
  float largest = best[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = best[lane] > largest ? best[lane] : largest;
  return largest;
}

// What one row is asked for and what a pass over it gives.
struct RowSums {
  float chosen;  // tokens with a larger logit are counted
  int64_t num_larger = 0;
  float largest = -INFINITY;
  double mass = 0.0;  // sum of exp(logit - largest)

  double logprob(float logit) const { return static_cast<double>(logit) - largest - std::log(mass); }

  // False where a logit of the chunk is NaN or +infinity.
  bool count(const float* chunk) {
    int32_t invalid = 0, larger = 0;
#pragma omp simd reduction(+ : invalid, larger)
    for (int64_t i = 0; i < kLogprobsChunk; ++i) {
      invalid += !(chunk[i] <= FLT_MAX);
      larger += chunk[i] > chosen;
    }
    num_larger += larger;
    return invalid == 0;
  }

  void add(const float* chunk, float largest_in_chunk) {
    if (largest_in_chunk == -INFINITY) return;
    if (largest_in_chunk > largest) {
      mass *= std::exp(static_cast<double>(largest) - largest_in_chunk);
      largest = largest_in_chunk;
    }
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < kLogprobsChunk; ++i) part += fast_exp(chunk[i] - largest);
    mass += part;
  }
};

// False for a row without probabilities: with NaN or +infinity, or without a finite logit.
template <typename T>
bool read_row(const T* logits, int64_t vocab, RowSums& row, Top& top) {
  alignas(64) float chunk[kLogprobsChunk];
  for (int64_t start = 0; start < vocab; start += kLogprobsChunk) {
    const int64_t size = std::min(kLogprobsChunk, vocab - start);
    to_float(logits + start, chunk, size);
    std::fill(chunk + size, chunk + kLogprobsChunk, -INFINITY);
    if (!row.count(chunk)) return false;
    const float largest = largest_of(chunk);
    row.add(chunk, largest);
    if (top.wants(largest))
      for (int64_t i = 0; i < size; ++i) top.offer(chunk[i], start + i);
  }
  return row.largest != -INFINITY;
}

struct Out {
  float* logprobs;
  int64_t *ranks, *top_ids;
  float* top_logprobs;
};

template <typename T>
void score_rows(const T* logits, int64_t stride, int64_t vocab, const int64_t* token_ids, int64_t num_rows,
                int64_t num_top, const Out& out) {
  parallel_items(num_rows, 2 * vocab, [&](int64_t begin, int64_t end) {
    Top top(num_top);
    for (int64_t r = begin; r < end; ++r) {
      const T* in = logits + r * stride;
      const bool asked = token_ids[r] >= 0;
      RowSums row{asked ? static_cast<float>(in[token_ids[r]]) : INFINITY};
      top.clear();
      const bool valid = read_row(in, vocab, row, top);
      out.logprobs[r] = asked && valid ? static_cast<float>(row.logprob(row.chosen)) : NAN;
      out.ranks[r] = asked && valid ? row.num_larger + 1 : 0;
      int64_t* ids = out.top_ids + r * num_top;
      float* logprobs = out.top_logprobs + r * num_top;
      if (!valid) {
        std::fill_n(ids, num_top, int64_t{-1});
        std::fill_n(logprobs, num_top, NAN);
        continue;
      }
      for (const Candidate& candidate : top.sort()) {
        *ids++ = candidate.id;
        *logprobs++ = static_cast<float>(row.logprob(candidate.logit));
      }
    }
  });
}

Check check_logprobs(const Tensor& logits, const Tensor& token_ids, int64_t num_top) {
  Check check("token_logprobs", logits);
  check.tensor("logits", logits, {"n", "vocab"}, MINIVLLM_FLOATS);
  check.tensor("token_ids", token_ids, {"n"}, {ScalarType::Long});
  const int64_t vocab = check["vocab"];
  if (num_top < 0 || num_top > vocab)
    check.fail("num_top is " + std::to_string(num_top) + ", expected 0 to " + std::to_string(vocab) + " (vocab)");
  return check;
}

struct Results {
  Tensor logprobs, ranks, top_ids, top_logprobs;

  Results(const Tensor& logits, int64_t n, int64_t num_top)
      : logprobs(new_tensor(logits, {n}, ScalarType::Float)),
        ranks(new_tensor(logits, {n}, ScalarType::Long)),
        top_ids(new_tensor(logits, {n, num_top}, ScalarType::Long)),
        top_logprobs(new_tensor(logits, {n, num_top}, ScalarType::Float)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> tuple() const { return {logprobs, ranks, top_ids, top_logprobs}; }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs_cpu(const Tensor& logits, const Tensor& token_ids,
                                                              int64_t num_top) {
  const Check check = check_logprobs(logits, token_ids, num_top);
  check_ids(check, "token_ids", token_ids, check["vocab"], INT64_MIN);
  const int64_t n = logits.size(0);
  const Results results(logits, n, num_top);
  const Out out{static_cast<float*>(results.logprobs.data_ptr()), static_cast<int64_t*>(results.ranks.data_ptr()),
                static_cast<int64_t*>(results.top_ids.data_ptr()), static_cast<float*>(results.top_logprobs.data_ptr())};
  dispatch_float(logits.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    score_rows(static_cast<const T*>(logits.data_ptr()), logits.stride(0), logits.size(1),
               static_cast<const int64_t*>(token_ids.data_ptr()), n, num_top, out);
  });
  return results.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("token_logprobs", TORCH_BOX(&token_logprobs_cpu)); }

#ifdef MINIVLLM_CUDA
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> token_logprobs_cuda(const Tensor& logits, const Tensor& token_ids,
                                                               int64_t num_top) {
  check_logprobs(logits, token_ids, num_top);
  const CudaScope scope(logits);
  const int64_t n = logits.size(0), vocab = logits.size(1);
  const Results results(logits, n, num_top);
  Tensor workspace = new_tensor(logits, {logprobs_workspace_bytes(n, vocab)}, ScalarType::Byte);
  const LogprobsArguments arguments{logits.data_ptr(),
                                    logits.stride(0),
                                    n,
                                    vocab,
                                    num_top,
                                    static_cast<const int64_t*>(token_ids.data_ptr()),
                                    static_cast<float*>(results.logprobs.data_ptr()),
                                    static_cast<int64_t*>(results.ranks.data_ptr()),
                                    static_cast<int64_t*>(results.top_ids.data_ptr()),
                                    static_cast<float*>(results.top_logprobs.data_ptr()),
                                    workspace.data_ptr(),
                                    dtype_code(logits)};
  check_launch("token_logprobs", launch_token_logprobs(arguments, scope.stream()));
  return results.tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CUDA, m) { m.impl("token_logprobs", TORCH_BOX(&token_logprobs_cuda)); }
#endif

}  // namespace minivllm
