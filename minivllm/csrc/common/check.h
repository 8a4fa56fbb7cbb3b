// Argument checks of the compiled ops: shapes written as words, bound by the first tensor that has them (ops/_check.py says the
// same for the references). Every failure is one RuntimeError that names the op, the argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <string>

namespace minivllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Check {
 public:
  Check(const char* op, const Tensor& first) : op_(op), device_(first.device()) {}

  [[noreturn]] void fail(const std::string& text) const;

  // The tensors checked from here on lie where `t` does.
  void expect_device_of(const Tensor& t) { device_ = t.device(); }

  // Device, dtype, shape and a contiguous last dimension. A leading "..." takes any dimensions.
  void tensor(const char* name, const Tensor& t, std::initializer_list<const char*> shape,
              std::initializer_list<ScalarType> dtypes);

  void same_shape(const char* name, const Tensor& t, const Tensor& other) const;

  void require(bool ok, const std::string& text) const {
    if (!ok) fail(text);
  }

  // The size that a word of the shapes was bound to.
  int64_t operator[](const char* word) const;

 private:
  static constexpr int kMaxWords = 16;
  const char* op_;
  torch::stable::Device device_;
  const char* words_[kMaxWords];
  int64_t sizes_[kMaxWords];
  int count_ = 0;

  bool bind(const char* word, int64_t size);
  void check_dtype(const char* name, ScalarType got, std::initializer_list<ScalarType> dtypes) const;
  [[noreturn]] void fail_shape(const char* name, const Tensor& t, std::initializer_list<const char*> shape) const;
};

inline const int64_t* ids_of(const Tensor& t) { return static_cast<const int64_t*>(t.data_ptr()); }

// Each of ids: [n] int64, on the CPU, lies in [lowest, size).
void check_ids(const Check& check, const char* name, const Tensor& ids, int64_t size, int64_t lowest = 0);

#define MINIVLLM_FLOATS {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}

// The leading dimensions of a tensor as two strides: row r lies at (r / inner) * outer_stride + (r % inner) * inner_stride.
// One stride is enough for a matrix; two for the heads of a packed qkv tensor.
struct Rows {
  int64_t count = 1, inner = 1, outer_stride = 0, inner_stride = 0;
  int64_t offset(int64_t r) const { return (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

Rows collapse_rows(const Check& check, const char* name, const Tensor& t);

}  // namespace minivllm
