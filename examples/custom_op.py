"""An op from outside beside minivllm's: a schema, a reference, a C++ kernel where there is a compiler.

softcap(x, cap) = cap * tanh(x / cap), which Gemma 2 puts on its logits. The reference serves every device; the kernel,
built against torch's stable ABI in seconds, takes over contiguous float32 tensors of the CPU and refuses others.
"""

from __future__ import annotations

import shutil

import torch
from torch import Tensor
from torch.utils import cpp_extension

from minivllm import ops

KERNEL = r"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <cmath>
using torch::stable::Tensor;
Tensor softcap(const Tensor& x, double cap) {
  if (x.scalar_type() != torch::headeronly::ScalarType::Float || !x.is_contiguous())
    throw std::runtime_error("example::softcap: x must be contiguous float32 on a CPU");
  Tensor out = torch::stable::new_empty(x, x.sizes());
  const auto* from = static_cast<const float*>(x.data_ptr());
  auto* to = static_cast<float*>(out.data_ptr());
  const auto c = static_cast<float>(cap);
  for (int64_t i = 0; i < x.numel(); ++i) to[i] = c * std::tanh(from[i] / c);
  return out;
}
STABLE_TORCH_LIBRARY_IMPL(example, CPU, m) { m.impl("softcap", TORCH_BOX(&softcap)); }
"""

library = torch.library.Library("example", "DEF")
library.define("softcap(Tensor x, float cap) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl("softcap", lambda x, cap: cap * torch.tanh(x / cap), "CompositeExplicitAutograd")
torch.library.register_fake("example::softcap", lambda x, cap: torch.empty_like(x), lib=library)


def head(x: Tensor, weight: Tensor, vocabulary: Tensor) -> Tensor:
    """One graph of minivllm's op, a matrix product, and the new op."""
    return torch.ops.example.softcap(ops.rms_norm(x, weight, 1e-6) @ vocabulary, 30.0)


def main() -> None:
    x, weight, vocabulary = torch.randn(4, 64), torch.randn(64), 10 * torch.randn(64, 100)
    expected = head(x, weight, vocabulary)  # the reference
    if shutil.which("c++"):
        cpp_extension.load_inline("example_softcap", KERNEL, is_python_module=False, no_implicit_headers=True)
    compiled = torch.compile(head, fullgraph=True)(x, weight, vocabulary)
    torch.testing.assert_close(compiled, expected)
    torch.library.opcheck(torch.ops.example.softcap.default, (x, 30.0))
    print("softcap: kernel, reference and torch.compile agree")


if __name__ == "__main__":
    main()
