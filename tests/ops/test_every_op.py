"""What is asked of every op, whoever wrote it; `every_op.py` says how to make arguments for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from tests.ops.every_op import TABLE, Arguments, Maker, references
from tests.ops.support import DEVICES

OPS = sorted(ops.served_by())
REFERENCES = references()
CASES = [(name, dtype) for name in OPS if name in TABLE for dtype in TABLE[name].dtypes]
TENSORS = [
    (name, argument.name)
    for name in OPS
    for argument in getattr(torch.ops.minivllm, name).default._schema.arguments
    if str(argument.type) in ("Tensor", "Optional[Tensor]")
]


def fresh(name: str, device: str, dtype: torch.dtype, seed: int, *, fewer: bool = False) -> Arguments:
    entry = TABLE[name]
    arguments = entry.make(Maker(device, dtype, seed))
    if fewer and entry.fewer is not None:
        entry.fewer(arguments)
    return arguments


def tensors(arguments: Arguments) -> dict[str, Tensor]:
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor)}


def contiguous(arguments: Arguments) -> Arguments:
    """Copies that share no memory with each other."""
    return {
        k: v.clone(memory_format=torch.contiguous_format) if isinstance(v, Tensor) else v for k, v in arguments.items()
    }


def run(name: str, function: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """All that a call gives: its results, then the arguments that it wrote."""
    out = function(**arguments)
    results = [] if out is None or TABLE[name].opaque else [out] if isinstance(out, Tensor) else list(out)
    return results + [arguments[written] for written in TABLE[name].written]


def call(name: str, arguments: Arguments) -> list[Tensor]:
    return run(name, getattr(torch.ops.minivllm, name).default, arguments)


def poison(device: str, like: list[Tensor]) -> None:
    """Leaves bytes 0xff (NaN in every float dtype) in free memory, where the allocator will find it for results."""
    blocks = [
        torch.empty(t.numel() * t.element_size(), dtype=torch.uint8, device=device) for t in like for _ in range(3)
    ]
    blocks += [torch.empty(512 << i, dtype=torch.uint8, device=device) for i in range(14) for _ in range(3)]
    for block in blocks:
        block.fill_(0xFF)


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    """Bit for bit, but for the payload of NaN."""
    return len(got) == len(want) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(got, want, strict=True)
    )


def assert_close(got: Tensor, torch_result: Tensor, exact: Tensor) -> None:
    """NaN and infinities where the reference has them, the rest within twice its error and some roundings."""
    assert got.dtype == torch_result.dtype and got.shape == torch_result.shape
    if not got.is_floating_point() or not got.numel():
        assert torch.equal(got, torch_result)
        return
    assert torch.equal(got.isnan(), torch_result.isnan()) and torch.equal(got.isinf(), torch_result.isinf())
    assert torch.equal(got[got.isinf()], torch_result[got.isinf()])
    wide, narrow, exact = (t.double().nan_to_num(0, 0, 0) for t in (got, torch_result, exact))
    error, torch_error = (wide - exact).abs().max().item(), (narrow - exact).abs().max().item()
    rounding = (torch.finfo(got.dtype).eps + 32 * torch.finfo(torch.float32).eps) * exact.abs().max().item()
    limit = 2 * torch_error + rounding
    assert error <= limit, f"error {error:.3e} exceeds {limit:.3e} (the reference's own error is {torch_error:.3e})"


def test_a_compiled_library_serves_every_op_on_the_cpu() -> None:
    want = "reference" if ops.build_info().kind == "reference" else "kernel"
    assert {name: on["CPU"] for name, on in ops.served_by().items()} == dict.fromkeys(OPS, want)


def test_every_op_has_an_entry_and_a_reference() -> None:
    assert not set(OPS) - set(TABLE) and not set(OPS) - set(REFERENCES)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), CASES)
@pytest.mark.parametrize("fewer", (False, True))
def test_computes_what_the_reference_says(device: str, name: str, dtype: torch.dtype, fewer: bool, seed: int) -> None:
    arguments = fresh(name, device, dtype, seed, fewer=fewer)
    narrow = run(name, REFERENCES[name], fresh(name, device, dtype, seed, fewer=fewer))
    wide_arguments = {
        key: value.float() if isinstance(value, Tensor) and value.dtype == dtype else value
        for key, value in fresh(name, device, dtype, seed, fewer=fewer).items()
    }
    exact = run(name, REFERENCES[name], wide_arguments)
    poison(device, narrow)
    for got, torch_result, wide in zip(call(name, arguments), narrow, exact, strict=True):
        assert_close(got, torch_result, wide)
    untouched = fresh(name, device, dtype, seed, fewer=fewer)
    for key, value in tensors(arguments).items():
        assert key in TABLE[name].written or same([value], [untouched[key]]), f"{key} was written"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_opcheck(device: str, name: str, dtype: torch.dtype, seed: int) -> None:
    """Schema, fake kernel, autograd registration and dynamic shapes under AOTAutograd."""
    op = getattr(torch.ops.minivllm, name).default
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not TABLE[name].opaque:  # this one compares results, and scratch memory in a plan may hold anything
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (), contiguous(fresh(name, device, dtype, seed)), test_utils=checks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_composes_with_torch_compile(device: str, name: str, seed: int) -> None:
    dtype = TABLE[name].dtypes[-1]
    torch.compiler.reset()  # one function is compiled for all ops: forget the others, whose number is limited

    @torch.compile(fullgraph=True)
    def compiled(arguments: Arguments) -> Any:
        return getattr(torch.ops.minivllm, name).default(**arguments)

    arguments = contiguous(fresh(name, device, dtype, seed))
    got = run(name, lambda **given: compiled(given), arguments)
    assert same(got, call(name, contiguous(fresh(name, device, dtype, seed))))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_replays_in_a_cuda_graph_on_new_values(name: str, dtype: torch.dtype, seed: int) -> None:
    if TABLE[name].syncs and ops.served_by()[name]["CUDA"] == "reference":
        pytest.skip("the reference waits for the device")
    static = fresh(name, "cuda", dtype, seed)
    call(name, static)  # loads the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(name, static)
    for step, fewer in enumerate((False, True, False)):
        for key, value in tensors(fresh(name, "cuda", dtype, seed + step, fewer=fewer)).items():
            static[key].copy_(value)
        graph.replay()
        assert same(results, call(name, fresh(name, "cuda", dtype, seed + step, fewer=fewer)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_runs_on_the_current_stream(name: str, seed: int) -> None:
    dtype = TABLE[name].dtypes[-1]
    source, late = fresh(name, "cuda", dtype, seed), fresh(name, "cuda", dtype, seed + 1)
    want = call(name, fresh(name, "cuda", dtype, seed))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a kernel on any other stream would read the values of the next seed
        for key, value in tensors(source).items():
            late[key].copy_(value)
        got = call(name, late)
    stream.synchronize()
    assert same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_runs_on_a_device_that_is_not_current(name: str, seed: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    dtype = TABLE[name].dtypes[-1]
    want = call(name, fresh(name, "cuda:0", dtype, seed))
    got = call(name, fresh(name, "cuda:1", dtype, seed))
    assert torch.cuda.current_device() == 0 and all(t.device.index == 1 for t in got)
    assert same([t.cpu() for t in got], [t.cpu() for t in want])


def other_float(t: Tensor) -> Tensor:
    return t.half()


def of_float64(t: Tensor) -> Tensor:
    return t.double()


def strided(t: Tensor) -> Tensor:
    return torch.stack((t, t), dim=-1)[..., 0]


def of_one_more_dimension(t: Tensor) -> Tensor:
    return t.unsqueeze(0)


def on_another_device(t: Tensor) -> Tensor:
    return t.cpu() if t.is_cuda else t.cuda()


CHANGES = (
    of_float64,
    other_float,
    strided,
    of_one_more_dimension,
    pytest.param(on_another_device, marks=pytest.mark.gpu),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_wrong_tensor_is_named_and_nothing_is_written(
    device: str, name: str, argument: str, change: Callable[[Tensor], Tensor], seed: int
) -> None:
    entry = TABLE[name]
    dtype = torch.bfloat16 if torch.bfloat16 in entry.dtypes else entry.dtypes[0]
    arguments = fresh(name, device, dtype, seed)
    if argument not in tensors(arguments):
        pytest.skip("its entry leaves it out")
    floats = [key for key, value in tensors(arguments).items() if value.dtype == dtype]
    if change is other_float and (argument not in floats or len(floats) < 2):
        pytest.skip("its dtype binds no other argument")
    if change is of_one_more_dimension and argument in entry.leading:
        pytest.skip("it may have any number of dimensions")
    if change is on_another_device and len(tensors(arguments)) < 2:
        pytest.skip("it is the only tensor")
    wrong = arguments | {argument: change(arguments[argument])}
    # A wrong first tensor may show as another one that no longer fits it.
    named = argument if change in (of_float64, strided) else "(" + "|".join(tensors(arguments)) + ")"
    with pytest.raises(RuntimeError, match=rf"minivllm::{name}: {named}\b"):
        getattr(torch.ops.minivllm, name).default(**wrong)
    untouched = fresh(name, device, dtype, seed)
    assert all(same([value], [untouched[key]]) for key, value in tensors(arguments).items())
