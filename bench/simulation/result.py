"""What a simulation measured, in memory that hardly grows: a few bytes a request, and a timeline of bounded length."""

from __future__ import annotations

import resource
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minivllm.request import Request
from simulation.settings import Settings


class Sample(NamedTuple):
    """The system after a step was scheduled, at `time` virtual seconds. Blocks are shares of all blocks."""

    time: float
    running: int
    waiting: int
    used: float
    cached: float


class Timeline:
    """At most `limit` samples (an even number), evenly spaced in steps: when full, every other one is dropped."""

    def __init__(self, limit: int = 4096) -> None:
        assert limit % 2 == 0, "the samples kept must fall on the new stride"
        self.samples: list[Sample] = []
        self.stride = 1
        self._limit = limit

    def wants(self, step: int) -> bool:
        """Whether step number `step` is one of those kept."""
        return step % self.stride == 0

    def add(self, sample: Sample) -> None:
        """The sample of a step that `wants` said yes to."""
        if len(self.samples) == self._limit:
            del self.samples[1::2]
            self.stride *= 2
        self.samples.append(sample)


LATENCIES = ("ttft", "tpot", "end_to_end", "queueing")
QUANTILES = {"mean": None, "p50": 50, "p90": 90, "p99": 99}


@dataclass(slots=True)
class Result:
    """Figures of one run of `total` requests; times in virtual seconds unless said.

    ttft: arrival to first token. tpot: mean time between the tokens after it, of answers of two tokens or more.
    end_to_end: arrival to last token. queueing: arrival to first slot. All four are of requests that were answered in
    full, in order of their ends, and `priorities` goes with ttft.
    refused: the queue was full. impossible: the request can never fit. unsent: later turns of chats that broke off.
    busy_s: seconds in which a step computed; rows, tokens, running and used_blocks are sums over steps, the last two
    times the step's seconds. rss: (requests ended, peak MiB of the process) at each tenth of the requests.
    real_s: seconds the simulation took; scheduler_s: of these, in the scheduler; check_s: in audits.
    """

    name: str
    settings: Settings
    total: int
    ttft: array[float] = field(default_factory=lambda: array("f"))
    tpot: array[float] = field(default_factory=lambda: array("f"))
    end_to_end: array[float] = field(default_factory=lambda: array("f"))
    queueing: array[float] = field(default_factory=lambda: array("f"))
    priorities: array[int] = field(default_factory=lambda: array("B"))
    ends: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    impossible: int = 0
    unsent: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    preemptions: int = 0
    evicted_blocks: int = 0
    steps: int = 0
    rows: int = 0
    computed_tokens: int = 0
    running: float = 0.0
    used_blocks: float = 0.0
    most_used_blocks: int = 0
    busy_s: float = 0.0
    makespan_s: float = 0.0
    timeline: Timeline = field(default_factory=Timeline)
    rss: list[tuple[int, float]] = field(default_factory=list)
    real_s: float = 0.0
    scheduler_s: float = 0.0
    check_s: float = 0.0
    checks: int = 0

    @property
    def ended(self) -> int:
        """Requests that nothing more will come of."""
        return sum(self.ends.values()) + self.refused + self.impossible + self.unsent

    def record(self, request: Request, admitted: float) -> None:
        """The times of a request that was answered in full."""
        first, last, count = request.first_token_time, request.finish_time, len(request.output_token_ids)
        assert first is not None, "an answered request has a first token"
        assert last is not None, "an answered request has an end"
        self.ttft.append(first - request.arrival_time)
        self.end_to_end.append(last - request.arrival_time)
        self.queueing.append(admitted - request.arrival_time)
        self.priorities.append(request.priority)
        if count > 1:
            self.tpot.append((last - first) / (count - 1))

    def record_rss(self) -> None:
        """The process's peak memory so far."""
        self.rss.append((self.ended, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

    def latency(self, name: str, priority: int | None = None) -> dict[str, float | None]:
        """Mean and percentiles of one of LATENCIES; None where there is no value. priority: of those requests only."""
        values = np.asarray(getattr(self, name))
        if priority is not None:
            values = values[np.asarray(self.priorities) == priority]
        if not len(values):
            return dict.fromkeys(QUANTILES)
        return {key: float(np.mean(values) if q is None else np.percentile(values, q)) for key, q in QUANTILES.items()}

    def figures(self) -> dict[str, Any]:
        """Everything but the raw arrays and the timeline, by names with units, fit for JSON."""
        span, busy, steps = self.makespan_s or 1.0, self.busy_s or 1.0, self.steps or 1
        levels = sorted(set(self.priorities))
        return {
            **{f"{name}_s": self.latency(name) for name in LATENCIES},
            "ttft_s_by_priority": {level: self.latency("ttft", level) for level in levels} if len(levels) > 1 else {},
            "requests": {**self.ends, "refused": self.refused, "impossible": self.impossible, "unsent": self.unsent},
            "makespan_s": self.makespan_s,
            "busy_share": self.busy_s / span,
            "requests_per_s": len(self.ttft) / span,
            "answer_tokens_per_s": self.answer_tokens / span,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "hit_rate": self.cached_tokens / (self.prompt_tokens or 1),
            "answer_tokens": self.answer_tokens,
            "computed_tokens": self.computed_tokens,
            "preemptions": self.preemptions,
            "evicted_blocks": self.evicted_blocks,
            "steps": self.steps,
            "mean_rows": self.rows / steps,
            "mean_batched_tokens": self.computed_tokens / steps,
            "mean_running": self.running / busy,
            "mean_block_use": self.used_blocks / busy / self.settings.num_blocks,
            "peak_block_use": self.most_used_blocks / self.settings.num_blocks,
            "real_s": self.real_s,
            "real_scheduler_us_per_step": self.scheduler_s / steps * 1e6,
            "real_check_s": self.check_s,
            "checks": self.checks,
            "simulated_requests_per_real_s": self.ended / (self.real_s or 1.0),
            "peak_rss_mib": [{"ended": ended, "mib": mib} for ended, mib in self.rss],
        }
