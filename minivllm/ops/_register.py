"""The one way an op comes into being: `define(name, schema, reference, fake)`.

The schema and the PyTorch reference are registered from Python; the reference serves every device under the dispatch
key CompositeExplicitAutograd. The compiled library later adds kernels under CPU and CUDA for the same schema, and the
dispatcher prefers them. So an op without a kernel for a device, or a machine without a compiler, runs the reference and
nothing else changes. `@torch.library.custom_op` is avoided on purpose: it roughly doubles the cost of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "minivllm"
_library = torch.library.Library(NAMESPACE, "DEF")
_names: list[str] = []


def define(name: str, schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op and return its callable.

    Args:
        name: op name; it becomes `torch.ops.minivllm.<name>`.
        schema: arguments and results in the dispatcher's schema language, e.g. `(Tensor x, float eps) -> Tensor`;
            arguments that are written carry an alias annotation (`Tensor(a!) x`).
        reference: plain PyTorch implementation; the meaning of the op.
        fake: shapes, dtypes and strides of the results without computing them (for `torch.compile`).
    """
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    _names.append(name)
    op: Callable[..., Any] = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def has_kernel(name: str, device_type: str) -> bool:
    """Whether a compiled kernel, not the reference, serves op `name` on "CPU" or "CUDA"."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", device_type))


def served_by() -> dict[str, dict[str, str]]:
    """op -> device type ("CPU", "CUDA") -> "kernel" (compiled) or "reference" (PyTorch)."""
    return {
        name: {device: "kernel" if has_kernel(name, device) else "reference" for device in ("CPU", "CUDA")}
        for name in sorted(_names)
    }
