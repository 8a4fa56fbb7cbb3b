"""How many seconds a step takes: a sum of five terms, each a count of the batch times a coefficient.

A transformer's step reads all weights (fixed) and the keys and values of every decoding sequence, multiplies matrices
for every token, and attends from every prompt token to all before it. Being linear, the model can be fitted to a
recorded run, and each coefficient means something that can be checked against the hardware.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.batch import Batch
from minivllm.errors import ConfigError
from minivllm.options import check_choice, check_float, reject_unknown, show


class StepLoad(NamedTuple):
    """What a step computes.

    rows: sequences that decode one token. tokens: prompt tokens. kv: cached tokens that the decoding rows read, each
    its whole sequence up to and including the query. pairs: (query, key) pairs of the causal attention of the prompt
    chunks; a chunk of c tokens behind p others has c * p + c * (c + 1) / 2.
    """

    rows: int
    tokens: int
    kv: int
    pairs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Seconds a step: fixed + row * rows + token * tokens + kv * kv tokens + pair * pairs; all finite and >= 0."""

    fixed: float = 0.0
    row: float = 0.0
    token: float = 0.0
    kv: float = 0.0
    pair: float = 0.0

    def __post_init__(self) -> None:
        for name in COEFFICIENTS:
            check_float(f"cost coefficient {name}", getattr(self, name), 0.0, math.inf, ConfigError)

    def seconds(self, load: StepLoad) -> float:
        """Virtual seconds of one step."""
        rows, tokens, kv, pairs = load
        return self.fixed + self.row * rows + self.token * tokens + self.kv * kv + self.pair * pairs

    def __str__(self) -> str:
        return ",".join(f"{name}={getattr(self, name):.4g}" for name in COEFFICIENTS)


COEFFICIENTS = tuple(field.name for field in dataclasses.fields(CostModel))


def load_of(batch: Batch) -> StepLoad:
    """The counts of a batch; decode rows come first and bring no token ids."""
    counts, starts = batch.token_counts, batch.starts
    rows = counts.count(0)
    kv = sum(starts[:rows]) + rows
    if rows == len(counts):
        return StepLoad(rows, 0, kv, 0)
    chunks = list(zip(counts[rows:], starts[rows:], strict=True))
    pairs = sum(count * start + count * (count + 1) // 2 for count, start in chunks)
    return StepLoad(rows, sum(counts), kv, pairs)


class _Shape(NamedTuple):
    """A dense decoder. parameters: those that a step reads, which are all but the table of input embeddings."""

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


# Rates of one H200, in bytes and bfloat16 operations a second, as measured with large copies and matrix products; and
# seconds a step for all that is neither attention nor a matrix product (norms, sampling, launches), a good engine's.
_BANDWIDTH = 4.3e12
_COMPUTE = 620e12
_ELSE = 0.5e-3
# A common benchmark: 256 requests at once, 100 to 1024 tokens each way, 133,966 of them generated in 1,024 steps. The
# time of all products of its decode rows was computed step by step with the rates above, each bound by memory or by
# operations; what it takes beyond one read of the weights a step is spread evenly over the generated tokens.
_STEPS = 1024
_DECODED = 133_966


def _roofline(shape: _Shape, product_seconds: float) -> CostModel:
    """bfloat16: 2 bytes a parameter and a cached value, 2 operations a parameter and token, and 4 a (query, key) pair,
    head and channel."""
    read = 2 * shape.parameters / _BANDWIDTH
    return CostModel(
        fixed=read + _ELSE,
        row=max(0.0, product_seconds - _STEPS * read) / _DECODED,
        token=2 * shape.parameters / _COMPUTE,
        kv=2 * 2 * shape.layers * shape.kv_heads * shape.head_dim / _BANDWIDTH,
        pair=4 * shape.layers * shape.heads * shape.head_dim / _COMPUTE,
    )


PRESETS = {
    "qwen3-0.6b-h200": _roofline(_Shape(0.596e9, 28, 16, 8, 128), product_seconds=0.34),
    "qwen3-8b-h200": _roofline(_Shape(7.568e9, 36, 32, 8, 128), product_seconds=4.30),
}


def parse_cost(text: str) -> CostModel:
    """A preset, coefficients in seconds such as "fixed=1e-3,kv=3e-8", or a preset with some of its own: "NAME,row=0".

    Raises ConfigError for an unknown name and a value that is no finite number >= 0.
    """
    first, *rest = parts = text.split(",")
    model = CostModel()
    if "=" not in first:
        model, parts = PRESETS[check_choice("cost", first, PRESETS, ConfigError)], rest
    pairs = [part.partition("=")[::2] for part in parts]
    reject_unknown([name for name, _ in pairs], COEFFICIENTS, "cost", ConfigError)
    return dataclasses.replace(model, **{name: _number(name, value) for name, value in pairs})


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"cost coefficient {name} is {show(text)}; it must be a number of seconds") from None
