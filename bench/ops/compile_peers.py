"""Compiles what the benchmarks call of FlashInfer, each family in its own process, all at once:

    python bench/ops/compile_peers.py [FAMILY ...]     # all of FAMILIES below by default

The benchmarks would compile the same at each first use, one after the other, which takes minutes.
"""

from __future__ import annotations

import subprocess
import sys
import time

import torch
from peers import flashinfer, workspace
from torch import Tensor

TYPES = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def norm() -> None:
    flashinfer.rmsnorm(randn(4, 1024), randn(1024))
    flashinfer.fused_add_rmsnorm(randn(4, 1024), randn(4, 1024), randn(1024))


def activation() -> None:
    flashinfer.silu_and_mul(randn(4, 2048))
    flashinfer.gelu_tanh_and_mul(randn(4, 2048))


def rope() -> None:
    table = torch.randn(64, HEAD_DIM, device="cuda")
    flashinfer.apply_rope_with_cos_sin_cache_inplace(ints(1, 2).long(), randn(2, 512), randn(2, 256), HEAD_DIM, table)


def sampling() -> None:
    logits = randn(2, 1000).float()
    flashinfer.sampling.sampling_from_logits(logits, seed=1, offset=0)
    flashinfer.sampling.top_k_top_p_sampling_from_probs(flashinfer.sampling.softmax(logits), 50, 0.9, seed=1, offset=0)


def cascade() -> None:
    out, lse = randn(4, KV_HEADS, HEAD_DIM), randn(4, KV_HEADS).float()
    flashinfer.merge_state(out, lse, out, lse)


def page() -> None:
    k, cache = randn(2, KV_HEADS, HEAD_DIM), randn(2, KV_HEADS, 16, HEAD_DIM)
    where = ints(0, 0), ints(0, 1)
    flashinfer.append_paged_kv_cache(
        k, k, *where, (cache, cache.clone()), ints(0), ints(0, 1), ints(2), kv_layout="HND"
    )


def decode(tensor_cores: bool) -> None:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND", use_tensor_cores=tensor_cores)
    pages = ints(0, 1).cpu(), ints(0), ints(16).cpu()
    wrapper.plan(*pages, HEADS, KV_HEADS, HEAD_DIM, 16, **TYPES)
    wrapper.run(randn(1, HEADS, HEAD_DIM), (randn(1, KV_HEADS, 16, HEAD_DIM), randn(1, KV_HEADS, 16, HEAD_DIM)))


def prefill(backend: str) -> None:
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend=backend)
    wrapper.plan(ints(0, 64), ints(0, 64), HEADS, KV_HEADS, HEAD_DIM, causal=True, **TYPES)
    wrapper.run(randn(64, HEADS, HEAD_DIM), *randn(2, 64, KV_HEADS, HEAD_DIM))


FAMILIES = {
    "sampling": sampling,
    "fa3": lambda: prefill("fa3"),
    "fa2": lambda: prefill("fa2"),
    "decode-tensor": lambda: decode(True),
    "decode-cuda": lambda: decode(False),
    "norm": norm,
    "rope": rope,
    "page": page,
    "cascade": cascade,
    "activation": activation,
}


def main() -> None:
    if flashinfer is None:
        print("FlashInfer is not installed: nothing to compile")
        return
    names = sys.argv[1:] or list(FAMILIES)
    if len(names) == 1:
        FAMILIES[names[0]]()
        torch.cuda.synchronize()
        return
    start = time.monotonic()
    builds = {name: subprocess.Popen([sys.executable, __file__, name]) for name in names}
    failed = [name for name, build in builds.items() if build.wait()]
    print(f"compiled {len(builds)} families in {time.monotonic() - start:.0f} s; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
