from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.qk_norm_rope_store import qk_norm_rope_store_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, generator, no_device_sync, randn

EPS = 1e-6
MAX_POSITION = 4096
NUM_BLOCKS = 9


def arguments(
    device: str,
    dtype: torch.dtype,
    seed: int,
    *,
    tokens: int = 13,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    rotary_dim: int | None = None,
    block_size: int = 16,
    padding: int = 0,
) -> dict[str, Any]:
    """q, k and v as views of one packed tensor whose rows have `padding` more elements in front; a fifth skipped."""
    width = (heads + 2 * kv_heads) * head_dim
    packed = randn(tokens, padding + width, seed=seed, dtype=dtype, device=device, scale=3.0)
    q, k, v = packed[:, padding:].unflatten(-1, (-1, head_dim)).split((heads, kv_heads, kv_heads), dim=1)
    chosen = torch.randperm(NUM_BLOCKS * block_size, generator=generator(seed + 1))[:tokens]
    skipped = torch.rand(tokens, generator=generator(seed + 2)) < 0.2
    cache = (NUM_BLOCKS, kv_heads, block_size, head_dim)
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_weight": randn(head_dim, seed=seed + 3, dtype=dtype, device=device),
        "k_weight": randn(head_dim, seed=seed + 4, dtype=dtype, device=device),
        "positions": torch.randint(0, MAX_POSITION, (tokens,), generator=generator(seed + 5)).to(device),
        "cos_sin_cache": ops.rope_cos_sin_cache(rotary_dim or head_dim, MAX_POSITION, device=device),
        "k_cache": randn(*cache, seed=seed + 6, dtype=dtype, device=device),
        "v_cache": randn(*cache, seed=seed + 7, dtype=dtype, device=device),
        "slot_mapping": torch.where(skipped, -1 - chosen, chosen).to(device),
    }


def copies(given: dict[str, Any]) -> dict[str, Any]:
    """The same values in memory of their own, the views of the packed tensor with their strides."""
    return {
        name: None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
        for name, x in given.items()
    }


def double(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x is not None and x.is_floating_point() else x for name, x in given.items()}


def exact(given: dict[str, Any], *, interleaved: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """q, k_cache and v_cache after the op, in float64 without roundings."""
    a = double(given)
    rotary_dim = a["cos_sin_cache"].shape[1]
    cos, sin = a["cos_sin_cache"][a["positions"]].unsqueeze(1).chunk(2, dim=-1)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
        x, result = x.clone(), x.clone()
        pairs = (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
        halves = (slice(0, rotary_dim // 2), slice(rotary_dim // 2, rotary_dim))
        first, second = pairs if interleaved else halves
        result[..., first] = x[..., first] * cos - x[..., second] * sin
        result[..., second] = x[..., second] * cos + x[..., first] * sin
        return result

    q, k = turned(a["q"], a["q_weight"]), turned(a["k"], a["k_weight"])
    k_cache, v_cache, block_size = a["k_cache"].clone(), a["v_cache"].clone(), a["k_cache"].shape[2]
    for token, slot in enumerate(a["slot_mapping"].tolist()):
        if slot >= 0:
            k_cache[slot // block_size, :, slot % block_size] = k[token]
            v_cache[slot // block_size, :, slot % block_size] = a["v"][token]
    return q, k_cache, v_cache


def in_three_ops(given: dict[str, Any], *, interleaved: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    a = copies(given)
    q = a["q"].clone() if a["q_weight"] is None else ops.rms_norm(a["q"], a["q_weight"], EPS)
    k = a["k"].clone() if a["k_weight"] is None else ops.rms_norm(a["k"], a["k_weight"], EPS)
    ops.apply_rope(q, k, a["positions"], a["cos_sin_cache"], interleaved=interleaved)
    ops.store_kv(k, a["v"], a["k_cache"], a["v_cache"], a["slot_mapping"])
    return q, a["k_cache"], a["v_cache"]


SHAPES = {
    "qwen3": {"heads": 16, "kv_heads": 8, "head_dim": 128},
    "bundled": {"heads": 4, "kv_heads": 2, "head_dim": 64, "block_size": 32},
    "one kv head": {"heads": 6, "kv_heads": 1, "head_dim": 256},
    "many heads": {"heads": 80, "kv_heads": 9, "head_dim": 128},
    "partial": {"heads": 3, "kv_heads": 3, "head_dim": 128, "rotary_dim": 64},
    "small part": {"heads": 2, "kv_heads": 1, "head_dim": 80, "rotary_dim": 32},
    "not a power of two": {"heads": 5, "kv_heads": 2, "head_dim": 96},
    "odd rotary": {"heads": 5, "kv_heads": 2, "head_dim": 96, "rotary_dim": 6},
    "odd head": {"heads": 2, "kv_heads": 1, "head_dim": 35, "rotary_dim": 10},
    "tiny head": {"heads": 2, "kv_heads": 1, "head_dim": 2},
    "huge head": {"heads": 2, "kv_heads": 1, "head_dim": 576, "rotary_dim": 64},
    "odd address": {"heads": 4, "kv_heads": 2, "head_dim": 64, "padding": 1},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(device: str, dtype: torch.dtype, interleaved: bool, shape: str, seed: int) -> None:
    given = arguments(device, dtype, seed, **SHAPES[shape])
    before_k, before_v = given["k"].clone(), given["v"].clone()
    want_q, want_k, want_v = exact(given, interleaved=interleaved)
    reference = copies(given)
    qk_norm_rope_store_reference(**reference, eps=EPS, interleaved=interleaved)
    ops.qk_norm_rope_store(**given, eps=EPS, interleaved=interleaved)
    assert_close_to_exact(given["q"], want_q, reference["q"])
    assert_close_to_exact(given["k_cache"], want_k, reference["k_cache"])
    assert torch.equal(given["v_cache"].double(), want_v)
    assert torch.equal(given["k"], before_k) and torch.equal(given["v"], before_v)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("tokens", (1, 40, 1500))
@pytest.mark.parametrize("norm", ("both", "q", "k", "none"))
def test_equals_the_three_ops_to_the_bit(
    device: str, dtype: torch.dtype, interleaved: bool, tokens: int, norm: str, seed: int
) -> None:
    block_size = 256
    given = arguments(device, dtype, seed, tokens=tokens, heads=16, kv_heads=8, head_dim=128, block_size=block_size)
    given["q_weight"] = given["q_weight"] if norm in ("both", "q") else None
    given["k_weight"] = given["k_weight"] if norm in ("both", "k") else None
    want_q, want_k, want_v = in_three_ops(given, interleaved=interleaved)
    ops.qk_norm_rope_store(**given, eps=EPS, interleaved=interleaved)
    assert torch.equal(given["q"], want_q)
    assert torch.equal(given["k_cache"], want_k) and torch.equal(given["v_cache"], want_v)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), ((33, 128, 128), (33, 96, 32), (90, 128, 64)))
def test_many_tokens_equal_few(interleaved: bool, heads: int, head_dim: int, rotary_dim: int, seed: int) -> None:
    shape = {"heads": heads, "kv_heads": 5, "head_dim": head_dim, "rotary_dim": rotary_dim, "block_size": 256}
    given = arguments("cuda", torch.bfloat16, seed, tokens=2000, **shape)
    pieces = copies(given)
    ops.qk_norm_rope_store(**given, eps=EPS, interleaved=interleaved)
    per_token = ("q", "k", "v", "positions", "slot_mapping")
    for start in range(0, 2000, 40):
        piece = {name: x[start : start + 40] if name in per_token else x for name, x in pieces.items()}
        ops.qk_norm_rope_store(**piece, eps=EPS, interleaved=interleaved)
    for name in ("q", "k_cache", "v_cache"):
        assert torch.equal(given[name], pieces[name])


@pytest.mark.parametrize("device", DEVICES)
def test_no_tokens(device: str, seed: int) -> None:
    given = arguments(device, torch.bfloat16, seed, tokens=0)
    before = given["k_cache"].clone()
    ops.qk_norm_rope_store(**given, eps=EPS)
    assert torch.equal(given["k_cache"], before)


@pytest.mark.parametrize("device", DEVICES)
def test_skipped_tokens_still_get_their_queries(device: str, seed: int) -> None:
    given = arguments(device, torch.float32, seed)
    given["slot_mapping"] = torch.full_like(given["slot_mapping"], -(2**62))
    want_q, _, _ = in_three_ops(given)
    before = given["k_cache"].clone(), given["v_cache"].clone()
    ops.qk_norm_rope_store(**given, eps=EPS)
    assert torch.equal(given["q"], want_q)
    assert torch.equal(given["k_cache"], before[0]) and torch.equal(given["v_cache"], before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_keys_and_values_in_one_allocation_and_int32_positions(device: str, seed: int) -> None:
    given = arguments(device, torch.bfloat16, seed, head_dim=128)
    both = torch.stack((given["k_cache"], given["v_cache"]), dim=1)
    _, want_k, want_v = in_three_ops(given)
    given["k_cache"], given["v_cache"] = both[:, 0], both[:, 1]
    given["positions"] = given["positions"].int()
    ops.qk_norm_rope_store(**given, eps=EPS)
    assert torch.equal(both, torch.stack((want_k, want_v), dim=1))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_head(device: str, seed: int) -> None:
    given = arguments(device, torch.bfloat16, seed, head_dim=128)
    given["slot_mapping"] = torch.arange(13, device=device)
    given["q"][3, 1, 7] = float("nan")
    given["k"][5, 0, 100] = float("inf")
    ops.qk_norm_rope_store(**given, eps=EPS)
    bad_q, bad_k = given["q"].isnan(), given["k_cache"].isnan()
    assert bad_q[3, 1].all() and bad_q.sum() == 128
    assert bad_k[0, 0, 5].any() and bad_k.sum() == bad_k[0, 0, 5].sum()


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_int32(device: str, seed: int) -> None:
    # Blocks 2^31 elements apart, and q's tokens too: the last of them is only reached with 64-bit offsets. On a CPU the
    # untouched pages cost no memory.
    given = arguments(device, torch.float16, seed, tokens=2, heads=1, kv_heads=1, head_dim=64)
    want_q, want_k, want_v = in_three_ops(given | {"slot_mapping": torch.tensor([3, 16 + 5], device=device)})
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of device memory")
    storage = torch.empty(2**31 + 16 * 64 + 2 * 64, dtype=torch.float16, device=device)
    cache = storage.as_strided((2, 1, 16, 64), (2**31, 16 * 64, 64, 1))
    q = storage.as_strided((2, 1, 64), (2**31, 64, 1), 16 * 64)
    cache.copy_(given["k_cache"][:2])
    q.copy_(given["q"])
    given |= {"q": q, "k_cache": cache, "v_cache": given["v_cache"][:2].clone()}
    given["slot_mapping"] = torch.tensor([3, 16 + 5], device=device)
    ops.qk_norm_rope_store(**given, eps=EPS)
    assert torch.equal(q, want_q) and torch.equal(cache, want_k[:2]) and torch.equal(given["v_cache"], want_v[:2])


def good_arguments(device: str) -> dict[str, Any]:
    return arguments(device, torch.float32, 0, tokens=3, heads=4, kv_heads=2, head_dim=8) | {
        "slot_mapping": torch.tensor([3, -1, 1], device=device)
    }


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "q is a matrix": ("q", lambda t: t.flatten(1), r"q has shape \[3, 32\]"),
    "q of int": ("q", lambda t: t.int(), "q has dtype"),
    "k of another dtype": ("k", lambda t: t.half(), "k has dtype"),
    "v of other heads": ("v", lambda t: t[:, :1], r"v has shape \[3, 1, 8\]"),
    "v strided": ("v", lambda t: t.new_ones(3, 8, 2).transpose(1, 2), "v must be contiguous in its last dimension"),
    "long q_weight": ("q_weight", lambda t: t.new_ones(9), r"q_weight has shape \[9\], expected \[head_dim\]"),
    "k_weight of another dtype": ("k_weight", lambda t: t.half(), "k_weight has dtype"),
    "too few positions": ("positions", lambda t: t[:2], r"positions has shape \[2\], expected \[num_tokens\]"),
    "odd rotary_dim": ("cos_sin_cache", lambda t: t[:, :7].contiguous(), "rotary_dim=7, expected an even number"),
    "block_size 12": ("k_cache", lambda t: t.new_ones(9, 2, 12, 8), "k_cache has block_size=12"),
    "v_cache of other heads": ("v_cache", lambda t: t[:, :1], r"v_cache has shape \[9, 1, 16, 8\]"),
    "heads last": ("k_cache", lambda t: t.new_ones(9, 16, 2, 8).transpose(1, 2), "expected each block"),
    "int32 slots": ("slot_mapping", lambda t: t.int(), "slot_mapping has dtype"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    name, change, message = BAD[case]
    given = good_arguments(device)
    given[name] = change(given[name])
    with pytest.raises(RuntimeError, match=message):
        ops.qk_norm_rope_store(**given, eps=EPS)


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    (
        ("positions", -1, "positions holds -1, expected 0 to 4095"),
        ("positions", 2**40, f"positions holds {2**40}, expected 0 to 4095"),
        ("slot_mapping", 144, "slot_mapping holds 144, expected less than 144"),
    ),
)
@pytest.mark.parametrize("implementation", (ops.qk_norm_rope_store, qk_norm_rope_store_reference))
def test_a_value_out_of_range_is_an_error_and_writes_nothing(
    name: str, bad: int, message: str, implementation: Callable[..., None]
) -> None:
    given = good_arguments("cpu")
    given[name] = torch.tensor([0, bad, 1])
    before = copies(given)
    with pytest.raises(RuntimeError, match=message):
        implementation(**given, eps=EPS)
    assert all(torch.equal(given[written], before[written]) for written in ("q", "k_cache", "v_cache"))


@pytest.mark.gpu
def test_cuda_graph_replays_with_other_slots_and_fewer_tokens(seed: int) -> None:
    static = arguments("cuda", torch.bfloat16, seed, tokens=24, heads=16, kv_heads=8, head_dim=128)
    ops.qk_norm_rope_store(**static, eps=EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.qk_norm_rope_store(**static, eps=EPS)
    for trial, live in enumerate((24, 5, 1)):
        fresh = arguments("cuda", torch.bfloat16, seed + 10 * trial, tokens=24, heads=16, kv_heads=8, head_dim=128)
        fresh["slot_mapping"][live:] = -1  # padding of a smaller batch
        want_q, want_k, want_v = in_three_ops(fresh)
        for name, x in fresh.items():
            static[name].copy_(x)
        with no_device_sync():
            graph.replay()
        assert torch.equal(static["q"], want_q)
        assert torch.equal(static["k_cache"], want_k) and torch.equal(static["v_cache"], want_v)


@pytest.mark.gpu
def test_a_producer_and_a_consumer_on_each_side(seed: int) -> None:
    # Kernels whose launches overlap must still see what the one before wrote; poison in between shows what does not.
    given = arguments("cuda", torch.bfloat16, seed, tokens=64, heads=16, kv_heads=8, head_dim=128)
    want_q, want_k, _ = in_three_ops(given)
    weight = torch.ones(128, dtype=torch.bfloat16, device="cuda")
    expected = ops.rms_norm(want_q, weight, EPS)
    source, keys = given["q"].clone(), given["k_cache"].clone()
    for _ in range(200):
        given["q"].fill_(float("nan"))
        given["k_cache"].copy_(keys)
        given["q"].copy_(source)
        ops.qk_norm_rope_store(**given, eps=EPS)
        got = ops.rms_norm(given["q"], weight, EPS)
        ops.rms_norm(got, weight, EPS)
        assert torch.equal(got, expected) and torch.equal(given["k_cache"], want_k)
