"""The cost model's coefficients from a recorded run, by non-negative least squares.

Every step counts the same: the errors are relative to the step's time, so long prompts do not drown the decode steps.
With so few coefficients the exact solution is found by trying each set of them that may be positive.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from rich.table import Table

from minivllm.errors import ConfigError
from simulation.cost import COEFFICIENTS, CostModel, StepLoad
from simulation.recorded import read_recording


@dataclass(frozen=True, slots=True)
class Fit:
    """cost: the model. steps: recorded steps. seconds, predicted_s: their time, and what the model says.

    median_error, p90_error: of |predicted / recorded - 1| over the steps. host_us: median microseconds of scheduling a
    step and taking its results. skipped: steps of the recording that could not be used.
    """

    cost: CostModel
    steps: int
    seconds: float
    predicted_s: float
    median_error: float
    p90_error: float
    host_us: float = 0.0
    skipped: int = 0

    @property
    def options(self) -> str:
        """What repeats this fit on the command line."""
        return f"--cost {self.cost} --scheduler-us {self.host_us:.0f}"

    def table(self) -> Table:
        """How well the model predicts."""
        table = Table("", "figure", title=f"cost model of {self.steps:,} recorded steps")
        table.add_row("recorded / predicted, s", f"{self.seconds:.4g} / {self.predicted_s:.4g}")
        table.add_row("steps left out", f"{self.skipped:,}")
        table.add_row("error of a step, median / p90", f"{self.median_error:.1%} / {self.p90_error:.1%}")
        return table


def non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x >= 0 with the least |matrix @ x - target|; matrix is [rows, columns] with few columns, target [rows].

    The best x is the plain least-squares solution over those columns where it is positive; so is every candidate here
    that has no negative value, hence the best of them is it. 2 ** columns small solutions.
    """
    count = matrix.shape[1]
    best, least = np.zeros(count), float(np.sum(target**2))
    for size in range(1, count + 1):
        for columns in map(list, combinations(range(count), size)):
            values = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            error = float(np.sum((matrix[:, columns] @ values - target) ** 2))
            if np.all(values >= 0) and error < least:
                best, least = np.zeros(count), error
                best[columns] = values
    return best


def fit(loads: list[StepLoad], seconds: list[float]) -> Fit:
    """The model that predicts best how long each step took. Raises ConfigError for no steps or a time <= 0."""
    if not seconds or min(seconds) <= 0:
        raise ConfigError(f"{len(seconds)} steps were recorded, all of which must have taken time; record a run first")
    times = np.asarray(seconds)
    counts = np.column_stack([np.ones(len(loads)), np.asarray(loads, dtype=float)])
    weighted = counts / times[:, None]
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)  # columns of one size, for the sake of rounding
    values = non_negative_least_squares(weighted / scale, np.ones(len(times))) / scale
    cost = CostModel(**dict(zip(COEFFICIENTS, map(float, values), strict=True)))
    predicted = counts @ values
    errors = np.abs(predicted / times - 1)
    return Fit(
        cost, len(times), float(times.sum()), float(predicted.sum()),
        float(np.median(errors)), float(np.percentile(errors, 90)),
    )  # fmt: skip


def fit_file(path: Path) -> Fit:
    """The fit of a recorded run. Raises ConfigError."""
    recording = read_recording(path)
    found = fit(recording.loads, recording.seconds)
    host_us = float(np.median(recording.host_seconds)) * 1e6
    return dataclasses.replace(found, host_us=host_us, skipped=recording.skipped)
