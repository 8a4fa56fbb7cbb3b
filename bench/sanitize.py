"""Runs every op on small, awkward shapes on the GPU, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 9 python bench/sanitize.py

It fails when an op with a CUDA kernel is not among its calls. PyTorch's caching allocator would hide reads past the end
of a tensor in a larger piece of memory, so it is switched off; inputs come from the CPU in one copy each, so every byte
that an op may read was written.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first CUDA call

from collections.abc import Callable

import torch
from torch import Tensor

from minivllm import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS, KV_HEADS, BLOCK_SIZE, BLOCKS, EPS = 4, 2, 8, 16, 1e-6
CALLS: dict[str, Callable[[torch.dtype, int], object]] = {}


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype).cuda()


def ints(values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype).cuda()


def caches(dtype: torch.dtype, d: int) -> tuple[Tensor, Tensor]:
    return randn(BLOCKS, KV_HEADS, BLOCK_SIZE, d, dtype=dtype), randn(BLOCKS, KV_HEADS, BLOCK_SIZE, d, dtype=dtype)


def call(function: Callable[[torch.dtype, int], object]) -> Callable[[torch.dtype, int], object]:
    """A call of the op of its name, with a dtype and an odd or even width."""
    CALLS[function.__name__] = function
    return function


@call
def rms_norm(dtype: torch.dtype, d: int) -> object:
    return ops.rms_norm(randn(5, d, dtype=dtype), randn(d, dtype=dtype), EPS)


@call
def fused_add_rms_norm(dtype: torch.dtype, d: int) -> object:
    return ops.fused_add_rms_norm(randn(5, d, dtype=dtype), randn(5, d, dtype=dtype), randn(d, dtype=dtype), EPS)


@call
def silu_and_mul(dtype: torch.dtype, d: int) -> object:
    return ops.silu_and_mul(randn(5, 2 * d, dtype=dtype))


@call
def gelu_and_mul(dtype: torch.dtype, d: int) -> object:
    return [ops.gelu_and_mul(randn(5, 2 * d, dtype=dtype), approximate=way) for way in ("none", "tanh")]


@call
def apply_rope(dtype: torch.dtype, d: int) -> object:
    q, k = randn(3, HEADS, d, dtype=dtype), randn(3, KV_HEADS, d, dtype=dtype)
    table = ops.rope_cos_sin_cache(d // 2 * 2, 16).cuda()
    return [ops.apply_rope(q, k, ints([0, 7, 15]), table, interleaved=way) for way in (False, True)]


@call
def store_kv(dtype: torch.dtype, d: int) -> object:
    k, v = randn(4, KV_HEADS, d, dtype=dtype), randn(4, KV_HEADS, d, dtype=dtype)
    return ops.store_kv(k, v, *caches(dtype, d), ints([0, -1, 77, BLOCKS * BLOCK_SIZE - 1]))


@call
def qk_norm_rope_store(dtype: torch.dtype, d: int) -> object:
    heads = (HEADS, KV_HEADS, KV_HEADS)
    for weights in ((randn(d, dtype=dtype), randn(d, dtype=dtype)), (None, None)):
        q, k, v = randn(3, sum(heads), d, dtype=dtype).split(heads, dim=1)
        table = ops.rope_cos_sin_cache(d // 2 * 2, 16).cuda()
        slots = ints([3, -1, BLOCKS * BLOCK_SIZE - 1])
        ops.qk_norm_rope_store(q, k, v, *weights, ints([0, 7, 15]), table, *caches(dtype, d), slots, eps=EPS)
    return None


@call
def copy_blocks(dtype: torch.dtype, d: int) -> object:
    return ops.copy_blocks(*caches(dtype, d), ints([0, 3, BLOCKS - 1]), ints([3, BLOCKS - 1, 5]))


@call
def swap_blocks(dtype: torch.dtype, d: int) -> object:
    here = caches(dtype, d)[0]
    there = here.cpu().pin_memory()
    ops.swap_blocks(here, there, ints([0, BLOCKS - 1]), ints([5, 6]))
    return ops.swap_blocks(there, here, ints([0, BLOCKS - 1]), ints([5, 6]))


@call
def merge_attention_states(dtype: torch.dtype, d: int) -> object:
    outs = [randn(3, HEADS, d, dtype=dtype) for _ in range(2)]
    sums = [randn(3, HEADS, dtype=torch.float32) for _ in range(2)]
    sums[0][1] = -torch.inf
    return ops.merge_attention_states(outs[0], sums[0], outs[1], sums[1])


@call
def embedding(dtype: torch.dtype, d: int) -> object:
    return ops.embedding(ints([0, 9, 30, 4]), randn(10, d, dtype=dtype), 0)


ATTENTION = ({}, {"window": 7}, {"softcap": 20.0, "return_lse": True})


@call
def flash_attention(dtype: torch.dtype, d: int) -> object:
    q, k, v = (randn(37, heads, d, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    sums = ints([0, 5, 5, 37], torch.int32)
    for options in (*ATTENTION, {"causal": False}):
        ops.flash_attention(q, k, v, sums, sums, 32, 32, scale=0.1, **options)
    return None


def plan_of(seq_lens: Tensor, sums: Tensor, longest: int, d: int, window: int) -> Tensor:
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": d}
    return ops.plan_paged_attention(seq_lens, sums, longest, max_seqlen_k=80 * BLOCK_SIZE, window=window, **shape)


@call
def paged_attention(dtype: torch.dtype, d: int) -> object:
    caches_of_all = caches(dtype, d)
    tables = torch.full((3, 80), -1, dtype=torch.int32)  # what lies behind a sequence's blocks is never read
    tables[0, :2], tables[1, :1], tables[2] = torch.tensor([3, 15]), 7, torch.arange(80) % BLOCKS
    facts = tables.cuda(), ints([9, 8, 80 * BLOCK_SIZE - 3], torch.int32)
    for lengths in ((1, 1, 1), (9, 1, 20)):  # decode rows; a whole prompt, a decode row, and a chunk of a long prompt
        sums = ints([0, *torch.tensor(lengths).cumsum(0).tolist()], torch.int32)
        q = randn(sum(lengths), HEADS, d, dtype=dtype)
        for options in ATTENTION:
            plan = plan_of(facts[1], sums, max(lengths), d, options.get("window", 0))
            for planned in (plan, None):
                ops.paged_attention(q, *caches_of_all, *facts, sums, max(lengths), scale=0.1, plan=planned, **options)
    return None


@call
def plan_paged_attention(dtype: torch.dtype, d: int) -> object:
    return plan_of(ints([9, 0, 637], torch.int32), ints([0, 1, 2, 3], torch.int32), 1, d, 0)


@call
def sample(dtype: torch.dtype, d: int) -> object:
    for vocab in (1, d, 5000 + d):
        draws = {
            "temperature": torch.tensor([0.0, 1.0, 0.7, 1.0, 0.9]).cuda(),
            "top_k": ints([0, 0, 5, 0, 40], torch.int32),
            "top_p": torch.tensor([1.0, 1.0, 1.0, 0.9, 0.5]).cuda(),
            "min_p": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1]).cuda(),
        }
        ops.sample(randn(5, vocab, dtype=dtype), **draws, seeds=ints([1, 2, 3, 4, 5]))
    return None


@call
def apply_penalties(dtype: torch.dtype, d: int) -> object:
    counts = torch.randint(0, 4, (3, 500 + d), dtype=torch.int32).cuda()
    halves = torch.tensor([0.5, 0.5]).cuda()
    rows = ints([0, 3]), counts, ints([2, 1])
    return ops.apply_penalties(randn(4, 500 + d, dtype=dtype), *rows, halves, halves, halves + 1)


@call
def count_tokens(dtype: torch.dtype, d: int) -> object:
    return ops.count_tokens(torch.zeros(3, d, dtype=torch.int32).cuda(), ints([0, 2, 2]), ints([d - 1, 0, -1]))


@call
def token_logprobs(dtype: torch.dtype, d: int) -> object:
    logits = randn(3, 500 + d, dtype=dtype)
    return [ops.token_logprobs(logits, ints([0, 7, 499 + d]), top) for top in (0, 5, 40)]


def main() -> None:
    torch.manual_seed(0)
    with_kernel = {name for name, served in ops.served_by().items() if served["CUDA"] == "kernel"}
    if forgotten := with_kernel - CALLS.keys():
        raise SystemExit(f"no call here of {', '.join(sorted(forgotten))}")
    with torch.inference_mode():
        for name in sorted(with_kernel):
            for dtype in DTYPES:
                for width in (64, 65, 128):  # 65: no 16-byte vectors
                    CALLS[name](dtype, width)
            torch.cuda.synchronize()
            print(f"{name}: done", flush=True)
    print(f"{len(with_kernel)} ops run")


if __name__ == "__main__":
    main()
