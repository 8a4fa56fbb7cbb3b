// packed_linear: float32 x times weights packed in panels of 32 outputs (ops/packed_linear.py). A register tile of kRows x kColumns
// outputs runs along a slice of the inputs; the slice of the panel stays in the L1 cache while all rows of x pass over it, so weights
// come from memory once. For one row that is a matrix-vector product at the speed of memory, for many rows a matrix product at the
// speed of the FMA units. Each output is summed in one fixed order whatever the tile, so a row does not depend on its neighbours.
#include "common/check.h"
#include "common/new_tensor.h"
#include "common/simd.h"

#include <algorithm>

namespace minivllm {
namespace {

constexpr int64_t kPanel = 32;
constexpr int64_t kSlice = 256;  // inputs summed before they are added to the output; 16 or 32 KiB of a panel
constexpr int64_t kChain = 128;  // inputs summed in one register: rounding errors grow with the length of such a chain
constexpr int64_t kInputs = 65536;  // inputs of the rows that pass over a panel together; 256 KiB, a part of the L2 cache

// A tile keeps two vectors of sums a row, two of weights and one input in registers: 12 rows of 32, or 6 of 16.
constexpr int kRows = kVectorRegisters == 32 ? 12 : 6;
constexpr int kColumns = 2 * kLanes;  // of a tile; a panel holds kPanel / kColumns of them

// tile[M][kPanel] = x[M][0..depth) * panel[0..depth)[kPanel]. The weights at `ahead` are fetched meanwhile, one row a step.
template <int M, typename W>
void multiply(const float* x, int64_t x_stride, const W* panel, int64_t depth, const W* ahead, float* tile) {
  for (int64_t column = 0; column < kPanel; column += kColumns)
    for (int64_t begin = 0; begin < depth; begin += kChain) {
      const int64_t end = std::min(begin + kChain, depth);
      Vec sums[M][2];
      for (int m = 0; m < M; ++m) sums[m][0] = sums[m][1] = Vec{};
      const W* weights = panel + begin * kPanel + column;
      for (int64_t k = begin; k < end; ++k, weights += kPanel) {
        const Vec w0 = load(weights), w1 = load(weights + kLanes);
        if (ahead != nullptr) __builtin_prefetch(ahead + k * kPanel + column);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const float input = x[m * x_stride + k];
          sums[m][0] = multiply_add(input, w0, sums[m][0]);
          sums[m][1] = multiply_add(input, w1, sums[m][1]);
        }
      }
      for (int m = 0; m < M; ++m)
        for (int half = 0; half < 2; ++half) {
          float* target = tile + m * kPanel + column + half * kLanes;
          store(target, begin == 0 ? sums[m][half] : sums[m][half] + load(target));
        }
    }
}

// The same for 1 <= rows <= M, with the height known to the compiler.
template <int M, typename W>
void multiply_rows(int64_t rows, const float* x, int64_t x_stride, const W* panel, int64_t depth, const W* ahead,
                   float* tile) {
  if constexpr (M > 1)
    if (rows < M) return multiply_rows<M - 1>(rows, x, x_stride, panel, depth, ahead, tile);
  multiply<M>(x, x_stride, panel, depth, ahead, tile);
}

struct Shape {
  int64_t rows, in_features, out_features, x_stride;
};

// Rows of x against one panel.
template <typename W>
void multiply_panel(const float* x, const W* panel, int64_t first_output, const Shape& shape, float* out) {
  alignas(64) float tile[kRows * kPanel];
  const int64_t columns = std::min(kPanel, shape.out_features - first_output);
  const int64_t tiles = (shape.rows + kRows - 1) / kRows;
  const int64_t height = (shape.rows + tiles - 1) / tiles;  // tiles of about equal height: a low one wastes loads
  for (int64_t begin = 0; begin < shape.in_features; begin += kSlice) {
    const int64_t depth = std::min(kSlice, shape.in_features - begin);
    const W* slice = panel + begin * kPanel;
    for (int64_t row = 0; row < shape.rows; row += height) {
      const int64_t rows = std::min(height, shape.rows - row);
      const W* ahead = row == 0 ? slice + depth * kPanel : nullptr;  // the next slice, or the next panel: they are neighbours
      multiply_rows<kRows>(rows, x + row * shape.x_stride + begin, shape.x_stride, slice, depth, ahead, tile);
      for (int64_t m = 0; m < rows; ++m) {
        float* target = out + (row + m) * shape.out_features + first_output;
        const float* source = tile + m * kPanel;
        if (begin == 0) {
          std::memcpy(target, source, columns * sizeof(float));
        } else {
#pragma omp simd
          for (int64_t i = 0; i < columns; ++i) target[i] += source[i];
        }
      }
    }
  }
}

template <typename W>
void multiply_all(const float* x, const W* packed, const Shape& shape, float* out) {
  const int64_t panels = (shape.out_features + kPanel - 1) / kPanel;
  // A panel costs about as much as touching an eighth of its weights in other ops, and as much again for every two more rows.
  const int64_t cost = shape.in_features * (kPanel / 8) * ((shape.rows + 1) / 2);
  const int64_t most_rows = std::max<int64_t>(kRows, kInputs / shape.in_features / kRows * kRows);
  parallel_items(panels, cost, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < shape.rows; row += most_rows) {
      Shape part = shape;
      part.rows = std::min(most_rows, shape.rows - row);
      for (int64_t p = begin; p < end; ++p)
        multiply_panel(x + row * shape.x_stride, packed + p * shape.in_features * kPanel, p * kPanel, part,
                       out + row * shape.out_features);
    }
  });
}

Tensor packed_linear_cpu(const Tensor& x, const Tensor& packed, int64_t out_features) {
  Check check("packed_linear", x);
  check.tensor("x", x, {"num_tokens", "in_features"}, {ScalarType::Float});
  check.tensor("packed", packed, {"panels", "in_features", "32"}, {ScalarType::Float, ScalarType::BFloat16});
  check.require(packed.is_contiguous(), "packed must be contiguous, as pack_linear_weight returns it");
  check.require(out_features >= 0 && (out_features + kPanel - 1) / kPanel == check["panels"],
                "out_features=" + std::to_string(out_features) + " does not belong to " +
                    std::to_string(check["panels"]) + " panels of 32");
  const Shape shape{check["num_tokens"], check["in_features"], out_features, x.stride(0)};
  Tensor out = new_tensor(x, {shape.rows, out_features}, x.scalar_type());
  if (shape.in_features == 0) return torch::stable::fill_(out, 0.0);
  const auto* input = static_cast<const float*>(x.data_ptr());
  auto* output = static_cast<float*>(out.data_ptr());
  if (packed.scalar_type() == ScalarType::Float)
    multiply_all(input, static_cast<const float*>(packed.data_ptr()), shape, output);
  else
    multiply_all(input, static_cast<const BFloat16*>(packed.data_ptr()), shape, output);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(minivllm, CPU, m) { m.impl("packed_linear", TORCH_BOX(&packed_linear_cpu)); }

}  // namespace minivllm
