// sample on CUDA, the second kernel: one block a row. It puts together the parts of a row that several blocks have read, and
// for a row with filters it makes sure that the token drawn is one that they keep.
//
// With a small top-k the k-th largest chunk maximum bounds the k-th largest logit from below, so a few hundred candidates in
// shared memory are enough for all that follows. Without it nothing is sorted or searched: the token with the best score of all
// is drawn if the filters keep it, which is so when the tokens likelier than it are few enough and hold too little mass. Else
// only those are left, and the best score among them is the next to be asked. All others are out, so this ends at the largest
// logit at the latest; where top-p is 0.9, nine rows of ten end with the first token. Few chunks have a logit as large as that
// of a token that was drawn, and only those are read again.
#include <cuda_runtime.h>

#include "common/launch.cuh"
#include "sampling/plan.h"
#include "sampling/search.cuh"
#include "sampling/select.cuh"

namespace minivllm {
namespace {

constexpr Candidate kNone{-INFINITY, 0.0f, -1, 0};

struct FinishShared {
  SelectShared select;
  Candidate bests[kSelectWarps];
  float bound;
};

// Every warp finds it by itself.
__device__ Candidate best_part(const SamplePlan& plan, int64_t r, double inverse_temperature) {
  const Candidate* parts = plan.candidates + r * plan.splits;
  Candidate best = kNone;
  for (int i = threadIdx.x % 32; i < plan.splits; i += 32)
    if (beats(parts[i], best, inverse_temperature)) best = parts[i];
  return warp_best(best, inverse_temperature);
}

__device__ Candidate best_of_block(FinishShared& s, Candidate best, double inverse_temperature) {
  best = warp_best(best, inverse_temperature);
  __syncthreads();
  if (threadIdx.x % 32 == 0) s.bests[threadIdx.x / 32] = best;
  __syncthreads();
  return warp_best(s.bests[threadIdx.x % kSelectWarps], inverse_temperature);
}

// The best token of key <= limit in the whole row. `scores` tell what each sixteen's are at most, where that is known.
template <typename T, bool kAligned>
__device__ Candidate draw_up_to(FinishShared& s, const SelectRow<T, kAligned>& row, const float* scores, uint32_t limit,
                                uint64_t seed) {
  __syncthreads();
  if (threadIdx.x == 0) s.bound = -INFINITY;
  __syncthreads();
  Search<T> search(row.logits, row.layout.vocab, seed, row.temperature, &s.bound);
  const float least = row.least_logit(limit);
  row.each_sixteen(least, [&](int sixteen) {
    if (scores != nullptr && search.loses(scores[sixteen])) return;
    Logits<T> vectors[kVectors<T>];
    float larger[kPairs];
    const int v = row.load_sixteen(sixteen, vectors);
    const float largest = larger_of_pairs<T>(vectors, larger);
    search.visit(v, row.layout.threads, larger, largest, least);
  });
  return best_of_block(s, search.best, search.inverse_temperature);
}

// The mass of the row in units of the largest logit's.
template <typename T, bool kAligned>
__device__ double mass_of_row(FinishShared& s, const SelectRow<T, kAligned>& row, const float* masses) {
  const float scale = scale_of(row.temperature);
  double mass = 0.0;
#pragma unroll 8
  for (int c = threadIdx.x; c < row.layout.num_chunks(); c += kSelectThreads)
    mass += masses[c] * exp2_approximate((row.maxima[c] - row.largest) * scale);
  return block_sum(mass, s.select);
}

// For rows without a small top-k: `best` is the best token of all; or for those with one, kNone, for then it is not known.
template <typename T, bool kAligned>
__device__ Candidate draw_kept(FinishShared& s, const SelectRow<T, kAligned>& row, const SamplePlan& plan, int64_t r,
                               Candidate best) {
  const float* scores = best.index < 0 ? nullptr : plan.scores + r * row.layout.num_sixteens();
  const float scale = scale_of(row.temperature), top_p = plan.a.top_p[r], min_p = plan.a.min_p[r];
  const auto mass = [&](float logit) { return exp2_approximate((logit - row.largest) * scale); };
  const auto one = [](float) { return 1.0f; };
  uint32_t limit = min_p > 0.0f ? distance_key(logf(fminf(min_p, 1.0f))) : kLastFinite;  // of the keys that may be kept
  int top_k = plan.a.top_k[r] < row.layout.vocab ? max(plan.a.top_k[r], 0) : 0;
  double most = 0.0;  // likelier tokens must hold less than this
  if (top_p < 1.0f && top_k > 0) {  // rare: top-p needs to know what top-k keeps
    const uint32_t kept = min(kLastFinite, select_key(s.select, row.keys(), kLastFinite, of_count(top_k)));
    most = top_p * row.sum(s.select, row.least_logit(kept), mass);
    limit = min(limit, kept), top_k = 0;
  } else if (top_p < 1.0f) {
    most = top_p * mass_of_row(s, row, plan.masses + r * row.layout.num_chunks());
  }
  const auto keeps = [&](uint32_t key) {
    if (key > limit) return false;
    if (key == 0) return true;
    const float larger = row.least_logit(key - 1);
    return (top_k == 0 || row.sum(s.select, larger, one) < top_k) && (top_p >= 1.0f || row.sum(s.select, larger, mass) < most);
  };
  for (;; best = kNone) {
    if (best.index < 0) best = draw_up_to(s, row, scores, limit, static_cast<uint64_t>(plan.a.seeds[r]));
    const uint32_t key = row.key(best.logit);
    if (best.index < 0 || keeps(key)) return best;
    limit = min(limit, key - 1);
  }
}

// For rows with a small top-k.
template <typename T, bool kAligned>
__device__ Candidate draw_of_few(FinishShared& shared, const SelectRow<T, kAligned>& row, const SamplePlan& plan,
                                 int64_t r) {
  const SampleArguments& a = plan.a;
  SelectShared& s = shared.select;
  const int top_k = a.top_k[r];
  uint32_t limit = row.bound_of_count(s, top_k);  // key of the last token kept
  const int gathered = row.gather(s, limit);
  if (gathered < 0) return draw_kept(shared, row, plan, r, kNone);
  limit = min(limit, select_gathered(s, gathered, limit, of_count(top_k)));
  if (const float top_p = a.top_p[r]; top_p < 1.0f) limit = min(limit, select_gathered(s, gathered, limit, of_share(top_p)));
  if (const float min_p = a.min_p[r]; min_p > 0.0f) limit = min(limit, distance_key(logf(fminf(min_p, 1.0f))));
  const double inverse_temperature = 1.0 / static_cast<double>(row.temperature);
  const auto seed = static_cast<uint64_t>(a.seeds[r]);
  Candidate best = kNone;
  for (int i = threadIdx.x; i < gathered; i += kSelectThreads) {
    if (s.keys[i] > limit) continue;
    const int token = s.tokens[i];
    const uint4 words = philox(static_cast<uint32_t>(token) / 4, seed);
    const Candidate candidate{s.logits[i], gumbel(word_of(words, token % 4)), token, 0};
    if (beats(candidate, best, inverse_temperature)) best = candidate;
  }
  return best_of_block(shared, best, inverse_temperature);
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kSelectThreads, 2) finish_kernel(SamplePlan plan) {
  __shared__ FinishShared s;
  wait_for_predecessors();
  let_dependents_launch();
  const int64_t r = blockIdx.x, num_chunks = plan.layout.num_chunks();
  const RowOptions options(plan.a, r);
  const bool filtered = options.filtered(plan.layout.vocab), few = options.few(plan.layout.vocab);
  if (!filtered && threadIdx.x >= 32) return;
  Candidate best = few ? kNone : best_part(plan, r, options.inverse_temperature());
  if (few || (filtered && best.index >= 0)) {
    const T* logits = static_cast<const T*>(plan.a.logits) + r * plan.a.stride;
    SelectRow<T, kAligned> row{logits, plan.maxima + r * num_chunks, plan.layout, 0.0f, options.temperature};
    row.find_largest(s.select);
    if (!few) best = draw_kept(s, row, plan, r, best);
    else if (fabsf(row.largest) <= kLargestFloat) best = draw_of_few(s, row, plan, r);  // false for NaN
  }
  if (threadIdx.x == 0) plan.a.out[r] = max(best.index, -1);
}

template <typename T>
const char* launch(const SamplePlan& plan, cudaStream_t stream) {
  auto* kernel = vectors_aligned<T>(plan.a.logits, plan.a.stride) ? finish_kernel<T, true> : finish_kernel<T, false>;
  return launch_overlapped(kernel, static_cast<unsigned>(plan.a.num_rows), kSelectThreads, 0, stream, plan);
}

}  // namespace

const char* launch_finish(const SamplePlan& plan, void* stream) {
  return dispatch_dtype(plan.a.dtype, [&](auto* tag) {
    return launch<std::remove_pointer_t<decltype(tag)>>(plan, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace minivllm
