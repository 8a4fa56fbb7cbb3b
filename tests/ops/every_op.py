"""One entry for each op of the library: how to make arguments for it. `test_every_op.py` asks the same things of all.

Arguments are dictionaries by the names of the schema. The same device, dtype and seed give the same values in the same
layout (views of packed tensors where an engine has them), so a second set of arguments is as good as a copy.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minivllm import ops
from tests.ops.support import FLOAT_DTYPES

Arguments = dict[str, Any]


class Maker:
    """Draws on the CPU, so that every device sees the same."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def ints(self, *shape: int, below: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, dtype=dtype).to(self.device)

    def distinct(self, count: int, *, below: int) -> Tensor:
        return torch.randperm(below, generator=self.generator)[:count].to(self.device)

    def lengths(self, *lengths: int) -> Tensor:
        """Prefix sums of lengths, in an order that the seed shuffles."""
        order = torch.randperm(len(lengths), generator=self.generator)
        sums = torch.tensor([0, *lengths])[torch.cat((torch.zeros(1, dtype=torch.int64), 1 + order))].cumsum(0)
        return sums.to(self.device, torch.int32)

    def caches(self, num_blocks: int, heads: int, block_size: int, dim: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer in one allocation: blocks lie apart."""
        both = self.floats(num_blocks, 2, heads, block_size, dim)
        return both[:, 0], both[:, 1]

    def qkv(self, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Tensor, ...]:
        """q, k and v as views of one packed tensor."""
        parts = self.floats(tokens, heads + 2 * kv_heads, dim).split((heads, kv_heads, kv_heads), dim=1)
        return tuple(parts)


def _rms_norm(make: Maker) -> Arguments:
    return {"x": make.floats(6, 5, 64)[:, 1:4], "weight": make.floats(64), "eps": 1e-6}


def _fused_add_rms_norm(make: Maker) -> Arguments:
    return {"x": make.floats(6, 130)[:, :128], "residual": make.floats(6, 128), "weight": make.floats(128), "eps": 1e-6}


def _activation(make: Maker) -> Arguments:
    return {"x": make.floats(7, 2 * 72)}


def _apply_rope(make: Maker) -> Arguments:
    q, k, _ = make.qkv(9, 4, 2, 64)
    table = ops.rope_cos_sin_cache(32, 40, device=make.device)
    return {"q": q, "k": k, "positions": make.ints(9, below=40), "cos_sin_cache": table}


def _store_kv(make: Maker) -> Arguments:
    _, k, v = make.qkv(12, 4, 2, 64)
    k_cache, v_cache = make.caches(3, 2, 16, 64)
    return {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": make.distinct(12, below=48)}


def _qk_norm_rope_store(make: Maker) -> Arguments:
    q, k, v = make.qkv(12, 4, 2, 64)
    k_cache, v_cache = make.caches(3, 2, 16, 64)
    return {
        **{"q": q, "k": k, "v": v, "q_weight": make.floats(64), "k_weight": make.floats(64)},
        **{"positions": make.ints(12, below=40), "cos_sin_cache": ops.rope_cos_sin_cache(64, 40, device=make.device)},
        **{"k_cache": k_cache, "v_cache": v_cache, "slot_mapping": make.distinct(12, below=48), "eps": 1e-6},
    }


def _skip_tokens(arguments: Arguments) -> None:
    arguments["slot_mapping"][5:] = -1


def _copy_blocks(make: Maker) -> Arguments:
    k_cache, v_cache = make.caches(9, 2, 16, 8)
    return {
        **{"k_cache": k_cache, "v_cache": v_cache},
        **{"sources": make.ints(6, below=9), "targets": make.distinct(6, below=9)},
    }


def _copy_to_themselves(arguments: Arguments) -> None:
    arguments["sources"][2:] = arguments["targets"][2:]


def _swap_blocks(make: Maker) -> Arguments:
    return {
        **{"source": make.caches(5, 2, 16, 8)[1], "target": make.caches(9, 2, 16, 8)[0]},
        **{"source_ids": make.ints(6, below=5), "target_ids": make.distinct(6, below=9)},
    }


def _embedding(make: Maker) -> Arguments:
    return {"token_ids": 30 + make.ints(11, below=20), "weight": make.floats(20, 80)[:, :72], "vocab_start": 30}


def _ids_elsewhere(arguments: Arguments) -> None:
    arguments["token_ids"][4:] = -1


def _flash_attention(make: Maker) -> Arguments:
    q, k, v = make.qkv(40, 4, 2, 64)
    sums = make.lengths(0, 23, 1, 9)
    return {
        **{"q": q, "k": k, "v": v, "cu_seqlens_q": sums, "cu_seqlens_k": sums.clone()},
        **{"max_seqlen_q": 40, "max_seqlen_k": 40, "scale": 0.125},
    }


def _shorter_sequences(arguments: Arguments) -> None:
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        arguments[name].clamp_(max=12)


def _paged_attention(make: Maker) -> Arguments:
    k_cache, v_cache = make.caches(13, 2, 16, 64)
    return {
        **{"q": make.qkv(30, 4, 2, 64)[0], "k_cache": k_cache, "v_cache": v_cache},
        **{"block_tables": make.distinct(12, below=13).view(3, 4).int()},
        **{"seq_lens": 20 + make.ints(3, below=45, dtype=torch.int32), "cu_seqlens_q": make.lengths(1, 1, 17)},
        **{"max_seqlen_q": 30, "scale": 0.125},
    }


def _fewer_sequences(arguments: Arguments) -> None:
    """The last sequence is padding: no query, no key, no block."""
    arguments["seq_lens"][2:] = 0
    arguments["block_tables"][2:] = -1
    arguments["cu_seqlens_q"].clamp_(max=int(arguments["cu_seqlens_q"][2]))


def _plan_paged_attention(make: Maker) -> Arguments:
    given = _paged_attention(make)
    return {name: given[name] for name in ("seq_lens", "cu_seqlens_q", "max_seqlen_q")} | {
        **{"max_seqlen_k": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    }


def _merge_attention_states(make: Maker) -> Arguments:
    single = torch.float32
    return {
        **{"out_a": make.qkv(7, 4, 2, 64)[0], "lse_a": make.floats(7, 4, dtype=single)},
        **{"out_b": make.floats(7, 4, 64), "lse_b": make.floats(7, 6, dtype=single)[:, :4]},
    }


def _one_side_empty(arguments: Arguments) -> None:
    arguments["lse_b"][3:] = -torch.inf
    arguments["out_b"][3:] = torch.nan
    arguments["lse_a"][5:] = -torch.inf


def _packed_linear(make: Maker) -> Arguments:
    packed = ops.pack_linear_weight(make.floats(70, 48))
    return {"x": make.floats(5, 50)[:, :48], "packed": packed, "out_features": 70}


def _apply_penalties(make: Maker) -> Arguments:
    return {
        **{"logits": make.floats(6, 330)[:, :321], "row_indices": make.distinct(4, below=6)},
        **{"counts": make.ints(5, 321, below=6, dtype=torch.int32), "count_indices": make.ints(4, below=5)},
        **{"presence": make.uniform(4), "frequency": make.uniform(4), "repetition": 0.5 + make.uniform(4)},
    }


def _count_tokens(make: Maker) -> Arguments:
    return {
        "counts": make.ints(5, 321, below=6, dtype=torch.int32),
        **{"count_indices": make.ints(40, below=5), "token_ids": make.ints(40, below=9)},
    }


def _sample(make: Maker) -> Arguments:
    return {
        **{"logits": make.floats(8, 500)[:, :499], "temperature": make.uniform(8)},
        **{
            "top_k": make.ints(8, below=50, dtype=torch.int32),
            "top_p": make.uniform(8),
            "min_p": 0.1 * make.uniform(8),
        },
        "seeds": make.ints(8, below=2**62),
    }


def _other_requests(arguments: Arguments) -> None:
    for name, value in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0)):
        arguments[name][3:] = value
    arguments["logits"][7] = torch.nan


def _token_logprobs(make: Maker) -> Arguments:
    return {"logits": make.floats(6, 330)[:, :321], "token_ids": make.ints(6, below=321), "num_top": 4}


@dataclass(frozen=True)
class Entry:
    """make: arguments of a device, dtype and seed. written: the arguments that the op writes.

    fewer: changes arguments in place, as a later replay of a CUDA graph may do: fewer rows, other lengths. leading:
    arguments that may have any number of dimensions. syncs: the reference waits for the device. opaque: the results
    mean something to another op alone and are not looked at.
    """

    make: Callable[[Maker], Arguments]
    written: tuple[str, ...] = ()
    fewer: Callable[[Arguments], None] | None = None
    leading: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    syncs: bool = False
    opaque: bool = False


_CACHES = ("k_cache", "v_cache")
TABLE: dict[str, Entry] = {
    "apply_penalties": Entry(_apply_penalties, ("logits",)),
    "apply_rope": Entry(_apply_rope, ("q", "k")),
    "copy_blocks": Entry(_copy_blocks, _CACHES, _copy_to_themselves),
    "count_tokens": Entry(_count_tokens, ("counts",), _ids_elsewhere, dtypes=(torch.float32,)),
    "embedding": Entry(_embedding, fewer=_ids_elsewhere),
    "flash_attention": Entry(_flash_attention, fewer=_shorter_sequences, syncs=True),
    "fused_add_rms_norm": Entry(_fused_add_rms_norm, ("x", "residual")),
    "gelu_and_mul": Entry(_activation, leading=("x",)),
    "merge_attention_states": Entry(_merge_attention_states, fewer=_one_side_empty),
    "packed_linear": Entry(_packed_linear, dtypes=(torch.float32,)),
    "paged_attention": Entry(_paged_attention, fewer=_fewer_sequences, syncs=True),
    "plan_paged_attention": Entry(_plan_paged_attention, dtypes=(torch.float32,), opaque=True),
    "qk_norm_rope_store": Entry(_qk_norm_rope_store, ("q", *_CACHES), _skip_tokens),
    "rms_norm": Entry(_rms_norm, leading=("x",)),
    "sample": Entry(_sample, fewer=_other_requests),
    "silu_and_mul": Entry(_activation, leading=("x",)),
    "store_kv": Entry(_store_kv, _CACHES, _skip_tokens),
    "swap_blocks": Entry(_swap_blocks, ("target",)),
    "token_logprobs": Entry(_token_logprobs, fewer=_ids_elsewhere),
}


def references() -> dict[str, Callable[..., Any]]:
    """op -> its reference: every file of the library names the reference of op X `X_reference`."""
    suffix, found = "_reference", {}
    for info in pkgutil.iter_modules(ops.__path__):
        for name, value in vars(importlib.import_module(f"minivllm.ops.{info.name}")).items():
            if name.endswith(suffix):
                found[name.removesuffix(suffix)] = value
    return found
