// The border between the registered ops (.cpp, stable ABI) and the CUDA launchers (.cu, torch-free): device and stream of a call, a
// code for the dtype, and an error text carried back. No CUDA header is needed on this side.
#pragma once

#ifdef MINIVLLM_CUDA
#include "common/dtype.h"
#include "common/rows.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

namespace minivllm {

// Makes the tensor's device current for the life of the object and knows the stream PyTorch would launch on.
class CudaScope {
 public:
  explicit CudaScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()), index_(tensor.get_device_index()) {}

  void* stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return stream;
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t index_;
};

inline DtypeCode dtype_code(const torch::stable::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  if (dtype == torch::headeronly::ScalarType::Float) return DtypeCode::kFloat32;
  return dtype == torch::headeronly::ScalarType::BFloat16 ? DtypeCode::kBFloat16 : DtypeCode::kFloat16;
}

// x: [num_tokens, count, head_dim].
inline HeadLayout head_layout(const torch::stable::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), static_cast<int>(x.size(1))};
}

// A launcher returns null, or the text of the CUDA error.
inline void check_launch(const char* op, const char* error) {
  if (error != nullptr) throw std::runtime_error("minivllm::" + std::string(op) + ": CUDA launch failed: " + error);
}

}  // namespace minivllm
#endif
