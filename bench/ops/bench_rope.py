"""apply_rope on views of a packed qkv tensor against the usual formula x * cos + rotate_half(x) * sin."""

from __future__ import annotations

import pytest
import torch
from conftest import Measure, Model
from torch import Tensor

from minivllm import ops


def rotated_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


@pytest.mark.parametrize("rows", (1, 64, 1024))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_rope(measure: Measure, model: Model, device: str, dtype: torch.dtype, rows: int, implementation: str) -> None:
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads)
    packed = torch.randn(rows, sum(heads) * model.head_dim, device=device, dtype=dtype)
    q, k, _ = (
        part.unflatten(-1, (-1, model.head_dim)) for part in packed.split([n * model.head_dim for n in heads], -1)
    )
    positions = torch.randint(0, 4096, (rows,), device=device)
    table = ops.rope_cos_sin_cache(model.head_dim, 4096, 1e6, device=device)
    cos, sin = table[positions].unsqueeze(1).to(dtype).chunk(2, dim=-1)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def in_torch() -> tuple[Tensor, Tensor]:
        return q * cos + rotated_half(q) * sin, k * cos + rotated_half(k) * sin

    call = in_torch if implementation == "torch" else lambda: ops.apply_rope(q, k, positions, table)
    measure(call, gigabytes=2 * (q.nbytes + k.nbytes) / 1e9)
