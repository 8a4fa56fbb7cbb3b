"""What a simulation is told besides its workload: the options of the scheduler and the cache, and the machine's.

The names are those of the engine's options where it has the same. A variant is a name and some of these, as text.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from minivllm.config import POLICIES
from minivllm.errors import ConfigError
from minivllm.options import check_bool, check_choice, check_float, check_int, reject_unknown, show
from simulation.cost import PRESETS, CostModel, parse_cost


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One machine and its scheduler. Raises ConfigError, naming the field, for what cannot be.

    max_tokens: what every request asks for, its answer ending earlier by an end token that nobody foresees; None: every
    request asks for exactly its answer, so the scheduler knows all lengths. depth: steps out at once; 1 waits for each
    step before the next is scheduled, 2 schedules while a step computes. scheduler_us: host time a step, in
    microseconds. speed_up: arrival times are divided by it. concurrency: most requests in the system at once; later
    ones come when an earlier one has ended. timeout_s: each request's deadline after its arrival.
    """

    policy: str = "fcfs"
    prefix_aware: bool = True
    prefix_caching: bool = True
    num_blocks: int = 32_768
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32_768
    max_num_waiting: int | None = None
    max_tokens: int | None = None
    depth: int = 1
    scheduler_us: float = 0.0
    speed_up: float = 1.0
    concurrency: int | None = None
    timeout_s: float | None = None
    cost: CostModel = PRESETS["qwen3-0.6b-h200"]

    def __post_init__(self) -> None:
        check_choice("policy", self.policy, POLICIES, ConfigError)
        check_choice("block_size", str(self.block_size), ("8", "16", "32", "64", "128", "256"), ConfigError)
        for name in ("prefix_aware", "prefix_caching"):
            check_bool(name, getattr(self, name), ConfigError)
        for name in ("num_blocks", "max_num_seqs", "depth"):
            check_int(name, getattr(self, name), 1, None, ConfigError)
        check_int("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs, None, ConfigError)
        check_int("max_model_len", self.max_model_len, 2, None, ConfigError)
        for name in ("max_num_waiting", "max_tokens", "concurrency"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1, None, ConfigError)
        check_float("scheduler_us", self.scheduler_us, 0.0, math.inf, ConfigError)
        check_float("speed_up", self.speed_up, 0.0, math.inf, ConfigError, low_excluded=True)
        if self.timeout_s is not None:
            check_float("timeout_s", self.timeout_s, 0.0, math.inf, ConfigError, low_excluded=True)


FIELDS = {field.name: str(field.type) for field in dataclasses.fields(Settings)}


def parse_variant(text: str, base: Settings) -> tuple[str, Settings]:
    """(name, settings) of "NAME:FIELD=VALUE,FIELD=VALUE"; what is not named stays as in `base`.

    Truth is written 0 or 1, no limit as "none", and a cost as the name of a preset. Raises ConfigError.
    """
    name, _, rest = text.partition(":")
    pairs = [part.partition("=")[::2] for part in rest.split(",") if part]
    reject_unknown([field for field, _ in pairs], FIELDS, f"variant {show(name)}", ConfigError)
    return name, dataclasses.replace(base, **{field: _value(field, value) for field, value in pairs})


def _value(name: str, text: str) -> Any:
    kind = FIELDS[name]
    if "None" in kind and text == "none":
        return None
    if kind == "CostModel":
        return parse_cost(text)
    if kind == "bool":
        return check_choice(name, text, ("0", "1"), ConfigError) == "1"
    if kind == "str":
        return text
    try:
        return int(text) if kind.startswith("int") else float(text)
    except ValueError:
        raise ConfigError(f"{name} is {show(text)}; it must be a number") from None
