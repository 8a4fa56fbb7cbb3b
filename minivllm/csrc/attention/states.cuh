// Softmax states of decode attention: how they are merged, and how thread blocks hand them to each other.
#pragma once

#include <cstdint>

#include "common/mma.cuh"

namespace minivllm::attention {

// An unnormalised softmax state of a column: the sum of p, and the maximum that p is relative to (base 2).
struct State {
  float l, m;
};

__device__ __forceinline__ float part(float m, float top) { return m == -INFINITY ? 0.0f : exp2_fast(m - top); }

__device__ __forceinline__ float4 scaled_sum(float4 a, float x, float4 b, float y) {
  return {__fmaf_rn(a.x, x, __fmul_rn(b.x, y)), __fmaf_rn(a.y, x, __fmul_rn(b.y, y)), __fmaf_rn(a.z, x, __fmul_rn(b.z, y)),
          __fmaf_rn(a.w, x, __fmul_rn(b.w, y))};
}

// Merges states into one in order, each with four elements of the output: sums of p v. In registers and from memory it is done alike,
// so that both give the same bits. The factors do not wait for the sums.
template <int N>
__device__ __forceinline__ void merge(State& into, float4& o, const State (&states)[N], const float4 (&outputs)[N]) {
  float old_part[N], new_part[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float top = fmaxf(into.m, states[i].m);
    old_part[i] = part(into.m, top), new_part[i] = part(states[i].m, top);
    into.m = top;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    o = scaled_sum(o, old_part[i], outputs[i], new_part[i]);
    into.l = __fmaf_rn(into.l, old_part[i], __fmul_rn(states[i].l, new_part[i]));
  }
}

// Counts, and hands on what this thread block wrote before its last barrier to whoever sees the count; what others handed on can be
// read after the next barrier.
__device__ __forceinline__ int32_t add_acquire_release(int32_t* counter, int32_t n) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(n) : "memory");
  return before;
}

// A look at the counter that makes nothing wait. Before what others handed on is read comes a fence.
__device__ __forceinline__ int32_t load_relaxed(const int32_t* counter) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

__device__ __forceinline__ void acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

}  // namespace minivllm::attention
