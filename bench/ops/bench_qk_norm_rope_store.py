"""qk_norm_rope_store against the four ops that it fuses, ours and PyTorch's.

GB/s counts what the fused op must move: q read and written, k and v read and written to the cache.
"""

from __future__ import annotations

import torch
from bench_rope import MAX_POSITION, rotated_half
from cases import BLOCK_SIZE, CPU_MODELS, GPU_BATCHES, Case, cases
from conftest import Measure
from timing import Call
from torch.nn import functional

from minivllm import ops

EPS = 1e-6


@cases(
    "qk_norm_rope_store",
    "minivllm minivllm,separate torch",
    "rows heads kv_heads head_dim",
    cpu=[(rows, m.num_heads, m.num_kv_heads, m.head_dim) for m in CPU_MODELS for rows in (1, 64, 1024)],
    cuda=[(rows, m.num_heads, m.num_kv_heads, m.head_dim) for m, rows in GPU_BATCHES],
)
def test_qk_norm_rope_store(measure: Measure, case: Case) -> None:
    rows, num_heads, num_kv_heads, head_dim = case.sizes
    table = ops.rope_cos_sin_cache(head_dim, MAX_POSITION, 1e6, device=case.device)
    q_weight, k_weight = case.randn(2, head_dim)

    def make() -> Call:
        heads = (num_heads, num_kv_heads, num_kv_heads)
        q, k, v = case.randn(rows, sum(heads) * head_dim).unflatten(-1, (-1, head_dim)).split(heads, dim=1)
        positions = torch.randint(0, MAX_POSITION, (rows,), device=case.device)
        num_blocks = -(-rows // BLOCK_SIZE)
        k_cache, v_cache = case.randn(2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
        slots = torch.randperm(num_blocks * BLOCK_SIZE, device=case.device)[:rows]
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE

        def fused() -> None:
            ops.qk_norm_rope_store(q, k, v, q_weight, k_weight, positions, table, k_cache, v_cache, slots, eps=EPS)

        def separate() -> None:
            normed_q, normed_k = ops.rms_norm(q, q_weight, EPS), ops.rms_norm(k, k_weight, EPS)
            ops.apply_rope(normed_q, normed_k, positions, table)
            ops.store_kv(normed_k, v, k_cache, v_cache, slots)

        def in_torch() -> None:
            cos, sin = table[positions].unsqueeze(1).to(q.dtype).chunk(2, dim=-1)
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
            normed_q = functional.rms_norm(q, (head_dim,), q_weight, EPS)
            normed_k = functional.rms_norm(k, (head_dim,), k_weight, EPS)
            q.copy_(normed_q * cos + rotated_half(normed_q) * sin)
            k_cache[block, :, offset] = normed_k * cos + rotated_half(normed_k) * sin
            v_cache[block, :, offset] = v

        return {"minivllm": fused, "minivllm,separate": separate, "torch": in_torch}[case.way]

    touched = 2 * rows * (num_heads + 2 * num_kv_heads) * head_dim * case.dtype.itemsize
    measure(case, make, gigabytes=touched / 1e9)
