// The checks of common/check.h. Compiled once: their error texts took a quarter of the time of each op's file.
#include "common/check.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace minivllm {
namespace {

std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

}  // namespace

void Check::fail(const std::string& text) const {
  throw std::runtime_error("minivllm::" + std::string(op_) + ": " + text);
}

void Check::tensor(const char* name, const Tensor& t, std::initializer_list<const char*> shape,
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

void Check::same_shape(const char* name, const Tensor& t, const Tensor& other) const {
  bool same = t.dim() == other.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == other.size(d);
  if (!same) fail(std::string(name) + " has shape " + shape_text(t) + ", expected " + shape_text(other));
}

int64_t Check::operator[](const char* word) const {
  for (int i = 0; i < count_; ++i)
    if (std::strcmp(words_[i], word) == 0) return sizes_[i];
  fail(std::string("internal: no size ") + word);
}

bool Check::bind(const char* word, int64_t size) {
  if (word[0] >= '0' && word[0] <= '9') return size == std::atoll(word);
  for (int i = 0; i < count_; ++i)
    if (std::strcmp(words_[i], word) == 0) return sizes_[i] == size;
  if (count_ == kMaxWords) fail("internal: too many size names");
  words_[count_] = word;
  sizes_[count_++] = size;
  return true;
}

void Check::check_dtype(const char* name, ScalarType got, std::initializer_list<ScalarType> dtypes) const {
  if (std::find(dtypes.begin(), dtypes.end(), got) != dtypes.end()) return;
  std::string wanted;
  for (ScalarType dtype : dtypes) wanted += (wanted.empty() ? "" : " or ") + std::string(torch::headeronly::toString(dtype));
  fail(std::string(name) + " has dtype " + torch::headeronly::toString(got) + ", expected " + wanted);
}

void Check::fail_shape(const char* name, const Tensor& t, std::initializer_list<const char*> shape) const {
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

void check_ids(const Check& check, const char* name, const Tensor& ids, int64_t size, int64_t lowest) {
  const int64_t* id = ids_of(ids);
  for (int64_t i = 0; i < ids.size(0); ++i)
    if (id[i] < lowest || id[i] >= size)
      check.fail(std::string(name) + " holds " + std::to_string(id[i]) + ", expected " +
                 (id[i] < lowest ? "at least " + std::to_string(lowest) : "less than " + std::to_string(size)));
}

Rows collapse_rows(const Check& check, const char* name, const Tensor& t) {
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
