// Argument checks of the compiled ops: shapes written as words, bound by the first tensor that has them (ops/_check.py says the
// same for the references). Every failure is one RuntimeError that names the op, the argument, what was wanted and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <string>

namespace minivllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

class Check {
 public:
  Check(const char* op, const Tensor& first) : op_(op), device_(first.device()) {}

  [[noreturn]] void fail(const std::string& text) const {
    throw std::runtime_error("minivllm::" + std::string(op_) + ": " + text);
  }

  // The tensors checked from here on lie where `t` does.
  void expect_device_of(const Tensor& t) { device_ = t.device(); }

  // Device, dtype, shape and a contiguous last dimension. A leading "..." takes any dimensions.
  void tensor(const char* name, const Tensor& t, std::initializer_list<const char*> shape,
              std::initializer_list<ScalarType> dtypes) {
    if (t.device() != device_) fail(std::string(name) + " is on another device than the first argument");
    check_dtype(name, t.scalar_type(), dtypes);
    auto word = shape.begin();
    int64_t dim = 0, extra = t.dim() - static_cast<int64_t>(shape.size());
    if (shape.size() && std::strcmp(*word, "...") == 0) {
      if (extra < -1) fail_shape(name, t, shape);
      dim = extra + 1;
      ++word;
    } else if (extra != 0) {
      fail_shape(name, t, shape);
    }
    for (; word != shape.end(); ++word, ++dim)
      if (!bind(*word, t.size(dim))) fail_shape(name, t, shape);
    const int64_t last = t.dim() - 1;
    if (last >= 0 && t.size(last) > 1 && t.stride(last) != 1)
      fail(std::string(name) + " must be contiguous in its last dimension; call .contiguous() first");
  }

  void same_shape(const char* name, const Tensor& t, const Tensor& other) const {
    bool same = t.dim() == other.dim();
    for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == other.size(d);
    if (!same) fail(std::string(name) + " has shape " + shape_text(t) + ", expected " + shape_text(other));
  }

  void require(bool ok, const std::string& text) const {
    if (!ok) fail(text);
  }

  int64_t operator[](const char* word) const {
    for (int i = 0; i < count_; ++i)
      if (std::strcmp(words_[i], word) == 0) return sizes_[i];
    fail(std::string("internal: no size ") + word);
  }

 private:
  static constexpr int kMaxWords = 16;
  const char* op_;
  torch::stable::Device device_;
  const char* words_[kMaxWords];
  int64_t sizes_[kMaxWords];
  int count_ = 0;

  bool bind(const char* word, int64_t size) {
    if (word[0] >= '0' && word[0] <= '9') return size == std::atoll(word);
    for (int i = 0; i < count_; ++i)
      if (std::strcmp(words_[i], word) == 0) return sizes_[i] == size;
    if (count_ == kMaxWords) fail("internal: too many size names");
    words_[count_] = word;
    sizes_[count_++] = size;
    return true;
  }

  void check_dtype(const char* name, ScalarType got, std::initializer_list<ScalarType> dtypes) const {
    if (std::find(dtypes.begin(), dtypes.end(), got) != dtypes.end()) return;
    std::string wanted;
    for (ScalarType dtype : dtypes) wanted += (wanted.empty() ? "" : " or ") + std::string(torch::headeronly::toString(dtype));
    fail(std::string(name) + " has dtype " + torch::headeronly::toString(got) + ", expected " + wanted);
  }

  static std::string shape_text(const Tensor& t) {
    std::string text = "[";
    for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
    return text + "]";
  }

  [[noreturn]] void fail_shape(const char* name, const Tensor& t, std::initializer_list<const char*> shape) const {
    std::string text = std::string(name) + " has shape " + shape_text(t) + ", expected [";
    bool first = true;
    for (const char* word : shape) {
      text += (first ? "" : ", ") + std::string(word);
      first = false;
    }
    text += "] with ";
    for (int i = 0; i < count_; ++i) text += (i ? ", " : "") + std::string(words_[i]) + "=" + std::to_string(sizes_[i]);
    fail(text);
  }
};

// Each of ids: [n] int64, on the CPU, lies in [lowest, size).
inline void check_ids(const Check& check, const char* name, const Tensor& ids, int64_t size, int64_t lowest = 0) {
  const auto* id = static_cast<const int64_t*>(ids.data_ptr());
  for (int64_t i = 0; i < ids.size(0); ++i)
    if (id[i] < lowest || id[i] >= size)
      check.fail(std::string(name) + " holds " + std::to_string(id[i]) + ", expected " +
                 (id[i] < lowest ? "at least " + std::to_string(lowest) : "less than " + std::to_string(size)));
}

#define MINIVLLM_FLOATS {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half}

// The leading dimensions of a tensor as two strides: row r lies at (r / inner) * outer_stride + (r % inner) * inner_stride.
// One stride is enough for a matrix; two for the heads of a packed qkv tensor.
struct Rows {
  int64_t count = 1, inner = 1, outer_stride = 0, inner_stride = 0;
  int64_t offset(int64_t r) const { return (r / inner) * outer_stride + (r % inner) * inner_stride; }
};

inline Rows collapse_rows(const Check& check, const char* name, const Tensor& t) {
  Rows rows;
  int levels = 0;  // strides found so far, innermost first
  for (int64_t d = t.dim() - 2; d >= 0; --d) {
    const int64_t size = t.size(d), stride = t.stride(d);
    rows.count *= size;
    if (size == 1) continue;
    if (levels == 0) {
      rows.inner = size, rows.inner_stride = stride, levels = 1;
    } else if (levels == 1 && stride == rows.inner * rows.inner_stride) {
      rows.inner *= size;
    } else if (levels == 1) {
      rows.outer_stride = stride, levels = 2;
    } else {
      const int64_t outer = rows.count / size / rows.inner;
      check.require(stride == outer * rows.outer_stride,
                    std::string(name) + ": its leading dimensions need more than two strides; call .contiguous() first");
    }
  }
  return rows;
}

}  // namespace minivllm
