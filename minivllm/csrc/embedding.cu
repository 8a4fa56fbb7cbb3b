// embedding on CUDA: rows of the table as bytes, 16 at a time where addresses allow; a thread has four loads in flight.
// Floor: 2 x bytes of the result / bandwidth, or the launch for few tokens.
#include <algorithm>

#include "common/copy.cuh"
#include "common/vec.cuh"
#include "embedding.h"

namespace minivllm {
namespace {

constexpr int kThreads = 128;
constexpr int kUnroll = 4;

// threadIdx: vector of a row, token. blockIdx.y: piece of a long row.
template <typename V>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const int64_t* token_ids, int64_t num_tokens, const V* table,
                                                             int64_t row_stride, int64_t num_rows, int row, int64_t vocab_start,
                                                             V* out) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= num_tokens) return;
  // In unsigned numbers one comparison finds ids on either side of the shard; what would overflow wraps to a large number.
  const uint64_t index = static_cast<uint64_t>(token_ids[token]) - static_cast<uint64_t>(vocab_start);
  const bool here = index < static_cast<uint64_t>(num_rows);
  const V* source = table + (here ? static_cast<int64_t>(index) : 0) * row_stride;
  V* target = out + token * row;
  const int first = blockIdx.y * blockDim.x * kUnroll + threadIdx.x;
  V held[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int column = first + k * blockDim.x;
    held[k] = V{};
    if (here && column < row) held[k] = source[column];
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const int column = first + k * blockDim.x;
    if (column < row) target[column] = held[k];
  }
}

}  // namespace

const char* launch_embedding(const int64_t* token_ids, int64_t num_tokens, const EmbeddingTable& table, int64_t vocab_start,
                             void* out, void* stream) {
  if (num_tokens == 0 || table.hidden == 0) return nullptr;
  const uint64_t bytes = address(table.data) | address(out) | ((table.row_stride | table.hidden) * table.element_bytes);
  return dispatch_width(bytes, [&](auto* tag) -> const char* {
    using V = std::remove_pointer_t<decltype(tag)>;
    const int64_t per_vector = sizeof(V) / table.element_bytes, row = table.hidden / per_vector;
    const int x = static_cast<int>(std::min<int64_t>((row + kUnroll - 1) / kUnroll, kThreads));
    const int y = kThreads / x;
    const int64_t ctas = (num_tokens + y - 1) / y, pieces = (row + x * kUnroll - 1) / (x * kUnroll);
    if (ctas > 2147483647 || pieces > 65535) return "too many tokens or too long rows for one launch";
    const dim3 grid(static_cast<unsigned>(ctas), static_cast<unsigned>(pieces));
    embedding_kernel<V><<<grid, dim3(x, y), 0, static_cast<cudaStream_t>(stream)>>>(
        token_ids, num_tokens, static_cast<const V*>(table.data), table.row_stride / per_vector, table.num_rows,
        static_cast<int>(row), vocab_start, static_cast<V*>(out));
    return launch_error();
  });
}

}  // namespace minivllm
