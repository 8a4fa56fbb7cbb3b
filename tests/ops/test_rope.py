from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.rope import apply_rope_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, generator, randn

MAX_POSITION = 262_144


@pytest.fixture(scope="module")
def long_table() -> Tensor:
    return ops.rope_cos_sin_cache(128, MAX_POSITION, 1e6)


def exact_rope(x: Tensor, positions: Tensor, rotary_dim: int, theta: float, interleaved: bool) -> Tensor:
    """x: [num_tokens, heads, head_dim]; every pair as a complex number times e^(i angle), in float64."""
    x = x.double()
    frequencies = theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.outer(positions.cpu().double(), frequencies).to(x.device)
    turn = torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    rotary, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        turned = torch.view_as_real(torch.view_as_complex(rotary.contiguous().unflatten(-1, (-1, 2))) * turn).flatten(
            -2
        )
    else:
        a, b = rotary.chunk(2, dim=-1)
        product = torch.complex(a, b) * turn
        turned = torch.cat((product.real, product.imag), dim=-1)
    return torch.cat((turned, rest), dim=-1)


def packed_qkv(
    tokens: int, heads: int, kv_heads: int, head_dim: int, seed: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k as views of one packed tensor, and that tensor."""
    packed = randn(tokens, (heads + 2 * kv_heads) * head_dim, seed=seed, dtype=dtype, device=device)
    q = packed[:, : heads * head_dim].unflatten(-1, (heads, head_dim))
    k = packed[:, heads * head_dim : (heads + kv_heads) * head_dim].unflatten(-1, (kv_heads, head_dim))
    return q, k, packed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(("head_dim", "rotary_dim"), ((2, 2), (64, 64), (128, 128), (80, 32), (96, 6), (128, 34)))
@pytest.mark.parametrize("tokens", (0, 1, 37))
def test_rope_of_packed_qkv_matches_float64(
    device: str, dtype: torch.dtype, interleaved: bool, head_dim: int, rotary_dim: int, tokens: int, seed: int
) -> None:
    q, k, packed = packed_qkv(tokens, 3, 2, head_dim, seed, dtype, device)
    before = packed.clone()
    positions = torch.randint(0, 4096, (tokens,), generator=generator(seed)).to(device)
    table = ops.rope_cos_sin_cache(rotary_dim, 4096, 10000.0, device=device)
    exact_q, exact_k = (exact_rope(x, positions, rotary_dim, 10000.0, interleaved) for x in (q, k))
    reference_q, reference_k = q.clone(), k.clone()
    apply_rope_reference(reference_q, reference_k, positions, table, interleaved=interleaved)
    ops.apply_rope(q, k, positions, table, interleaved=interleaved)
    assert_close_to_exact(q, exact_q, reference_q)
    assert_close_to_exact(k, exact_k, reference_k)
    untouched = 5 * head_dim
    assert torch.equal(packed[:, untouched:], before[:, untouched:])  # the values
    assert torch.equal(q[..., rotary_dim:], before[:, : 3 * head_dim].unflatten(-1, (3, head_dim))[..., rotary_dim:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), ((33, 7, 128), (70, 9, 96), (2, 1, 640)))
def test_a_head_does_not_depend_on_its_neighbours(
    device: str, dtype: torch.dtype, interleaved: bool, heads: int, kv_heads: int, head_dim: int, seed: int
) -> None:
    q, k, packed = packed_qkv(900, heads, kv_heads, head_dim, seed, dtype, device)
    positions = torch.randint(0, 512, (900,), generator=generator(seed)).to(device)
    table = ops.rope_cos_sin_cache(head_dim, 512, device=device)
    alone, before = torch.cat((q, k), dim=1), packed.clone()
    for head in range(heads + kv_heads):
        one = alone[:, head : head + 1]
        ops.apply_rope(one, one[:, :0], positions, table, interleaved=interleaved)
    ops.apply_rope(q, k, positions, table, interleaved=interleaved)
    assert torch.equal(torch.cat((q, k), dim=1), alone)
    assert torch.equal(packed[:, (heads + kv_heads) * head_dim :], before[:, (heads + kv_heads) * head_dim :])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
def test_long_positions_stay_exact(device: str, index_dtype: torch.dtype, long_table: Tensor, seed: int) -> None:
    edges = torch.tensor([0, 1, 65_535, 131_071, 200_003, MAX_POSITION - 1])
    positions = torch.cat((edges, torch.randint(0, MAX_POSITION, (26,), generator=generator(seed))))
    q = randn(len(positions), 2, 128, seed=seed, dtype=torch.float32, device=device)
    k = randn(len(positions), 1, 128, seed=seed + 1, dtype=torch.float32, device=device)
    exact_q, exact_k = (exact_rope(x, positions, 128, 1e6, False) for x in (q, k))
    ops.apply_rope(q, k, positions.to(device, index_dtype), long_table.to(device))
    # A table of float32 angles would be wrong by up to 262144 * 2^-24 = 0.016.
    assert (q - exact_q).abs().max().item() < 2e-6
    assert (k - exact_k).abs().max().item() < 2e-6


def test_table_is_float64_rounded_once(long_table: Tensor) -> None:
    assert long_table.shape == (MAX_POSITION, 128) and long_table.dtype == torch.float32
    for position in (0, 1, 16_383, 16_384, 16_385, MAX_POSITION - 1):
        for i in (0, 1, 31, 63):
            angle = position * 1e6 ** (-2 * i / 128)
            assert long_table[position, i].item() == pytest.approx(math.cos(angle), abs=3e-8)
            assert long_table[position, 64 + i].item() == pytest.approx(math.sin(angle), abs=3e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_does_not_depend_on_its_neighbours(device: str, seed: int) -> None:
    table = ops.rope_cos_sin_cache(64, 512, device=device)
    positions = torch.randint(0, 512, (300,), generator=generator(seed)).to(device)
    q, k, packed = packed_qkv(300, 4, 2, 64, seed, torch.bfloat16, device)
    alone = packed[77:78].clone()
    ops.apply_rope(q, k, positions, table)
    alone_q, alone_k = alone[:, :256].unflatten(-1, (4, 64)), alone[:, 256:384].unflatten(-1, (2, 64))
    ops.apply_rope(alone_q, alone_k, positions[77:78], table)
    assert torch.equal(alone, packed[77:78])


def good_arguments(device: str) -> dict[str, Any]:
    return {
        "q": torch.ones(3, 4, 8, device=device),
        "k": torch.ones(3, 2, 8, device=device),
        "positions": torch.tensor([0, 1, 2], device=device),
        "cos_sin_cache": torch.ones(16, 8, device=device),
    }


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "q is a matrix": ("q", lambda t: t.flatten(1), r"q has shape \[3, 32\]"),
    "q of int": ("q", lambda t: t.int(), "q has dtype"),
    "q strided": ("q", lambda t: t.new_ones(3, 8, 4).transpose(1, 2), "q must be contiguous in its last dimension"),
    "k of another dtype": ("k", lambda t: t.half(), "k has dtype"),
    "k of another head_dim": ("k", lambda t: t[..., :6].contiguous(), r"k has shape \[3, 2, 6\]"),
    "too few positions": ("positions", lambda t: t[:2], r"positions has shape \[2\], expected \[num_tokens\]"),
    "float positions": ("positions", lambda t: t.float(), "positions has dtype"),
    "odd rotary_dim": (
        "cos_sin_cache",
        lambda t: t[:, :7].contiguous(),
        "rotary_dim=7, expected an even number up to head_dim=8",
    ),
    "large rotary_dim": ("cos_sin_cache", lambda t: t.new_ones(16, 10), "rotary_dim=10, expected an even number"),
    "half table": ("cos_sin_cache", lambda t: t.half(), "cos_sin_cache has dtype"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    name, change, message = BAD[case]
    arguments = good_arguments(device)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        ops.apply_rope(**arguments)


@pytest.mark.parametrize("bad", (-1, 16, 2**40))
@pytest.mark.parametrize("implementation", (ops.apply_rope, apply_rope_reference))
def test_a_position_outside_the_table_is_an_error_and_writes_nothing(
    bad: int, implementation: Callable[..., None]
) -> None:
    arguments = good_arguments("cpu")
    arguments["positions"] = torch.tensor([0, bad, 1])
    with pytest.raises(RuntimeError, match=rf"positions holds {bad}, expected 0 to 15"):
        implementation(**arguments)
    assert torch.equal(arguments["q"], torch.ones(3, 4, 8))


@pytest.mark.parametrize(
    ("rotary_dim", "max_position", "theta"), ((7, 4, 1e4), (0, 4, 1e4), (8, 0, 1e4), (8, 4, 0.0), (8, 4, math.nan))
)
def test_bad_tables_are_refused(rotary_dim: int, max_position: int, theta: float) -> None:
    with pytest.raises(RuntimeError, match="minivllm::rope_cos_sin_cache: "):
        ops.rope_cos_sin_cache(rotary_dim, max_position, theta)


@pytest.mark.gpu
def test_offsets_beyond_int32(seed: int) -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of device memory")
    table = ops.rope_cos_sin_cache(128, 100, device="cuda")
    positions = torch.tensor([4, 99], device="cuda")
    q, k = (randn(2, heads, 128, seed=seed, dtype=torch.bfloat16, device="cuda") for heads in (4, 2))
    storage = torch.empty(2**31 + 1024, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((2, 4, 128), (2**31, 128, 1))
    far.copy_(q)
    ops.apply_rope(far, k.clone(), positions, table)
    ops.apply_rope(q, k, positions, table)
    assert torch.equal(far, q)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", (False, True))
def test_vectors_and_elements_give_the_same_bits(interleaved: bool, seed: int) -> None:
    table = ops.rope_cos_sin_cache(64, 512, device="cuda")
    positions = torch.randint(0, 512, (70,), generator=generator(seed)).cuda()
    storage = randn(70, 1 + 6 * 128, seed=seed, dtype=torch.bfloat16, device="cuda")
    odd = storage[:, 1:].unflatten(-1, (6, 128))  # no head at an address of 16 bytes
    even = odd.clone()
    ops.apply_rope(odd[:, :4], odd[:, 4:], positions, table, interleaved=interleaved)
    ops.apply_rope(even[:, :4], even[:, 4:], positions, table, interleaved=interleaved)
    assert torch.equal(odd, even)
