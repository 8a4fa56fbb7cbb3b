"""apply_rope on views of a packed qkv tensor, against the usual formula x * cos + rotate_half(x) * sin and FlashInfer.

FlashInfer gets its best case: q and k contiguous.
"""

from __future__ import annotations

import torch
from cases import CPU_MODELS, GPU_BATCHES, Case, cases
from conftest import Measure
from peers import flashinfer
from timing import Call
from torch import Tensor

from minivllm import ops

MAX_POSITION = 4096


def rotated_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


@cases(
    "apply_rope",
    "minivllm torch flashinfer",
    "rows heads kv_heads head_dim",
    cpu=[(rows, m.num_heads, m.num_kv_heads, m.head_dim) for m in CPU_MODELS for rows in (1, 64, 1024)],
    cuda=[(rows, m.num_heads, m.num_kv_heads, m.head_dim) for m, rows in GPU_BATCHES],
)
def test_rope(measure: Measure, case: Case) -> None:
    rows, num_heads, num_kv_heads, head_dim = case.sizes
    table = ops.rope_cos_sin_cache(head_dim, MAX_POSITION, 1e6, device=case.device)

    def make() -> Call:
        heads = (num_heads, num_kv_heads, num_kv_heads)
        q, k, _ = case.randn(rows, sum(heads) * head_dim).unflatten(-1, (-1, head_dim)).split(heads, dim=1)
        positions = torch.randint(0, MAX_POSITION, (rows,), device=case.device)

        def in_torch() -> tuple[Tensor, Tensor]:
            cos, sin = table[positions].unsqueeze(1).to(q.dtype).chunk(2, dim=-1)
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            return q * cos + rotated_half(q) * sin, k * cos + rotated_half(k) * sin

        if case.way == "flashinfer":
            flat_q, flat_k = q.flatten(1).contiguous(), k.flatten(1).contiguous()
            rotate = flashinfer.apply_rope_with_cos_sin_cache_inplace
            return lambda: rotate(positions, flat_q, flat_k, head_dim, table)
        return in_torch if case.way == "torch" else lambda: ops.apply_rope(q, k, positions, table)

    touched = 2 * rows * (num_heads + num_kv_heads) * head_dim * case.dtype.itemsize
    measure(case, make, gigabytes=touched / 1e9)
