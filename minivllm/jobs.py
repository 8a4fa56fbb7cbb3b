"""The one loop over `LLMEngine.step`: jobs in, pieces of text out.

A job is one prompt of one call. Several calls may be open on one engine: whoever asks for its next piece steps the
engine for all of them, and what the others get waits in their inboxes. Jobs enter the engine as its queue has room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from minivllm.engine import LLMEngine
from minivllm.errors import EngineDeadError, QueueFullError
from minivllm.output import RequestReader
from minivllm.prompts import ParsedPrompt
from minivllm.request import Request, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.text import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one continuation: its new text, which may be empty.

    index: of which prompt. sample: which of its continuations (`SamplingParams.n`).
    finish_reason: why this continuation ended, with its last piece. output: the result, with the prompt's last piece.
    """

    index: int
    text: str
    output: RequestOutput | None
    sample: int = 0
    finish_reason: str | None = None


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One prompt of one call, from its check to its result.

    index: which prompt of the call. params: as the caller gave them; engine_params: what of them the engine is told.
    requests: its sequences, once the engine has it.
    """

    index: int
    request_id: str
    prompt: ParsedPrompt
    params: SamplingParams
    engine_params: SamplingParams
    priority: int = 0
    pooling: str | None = None
    requests: list[Request] = field(default_factory=list)

    def give_to(self, method: Callable[..., T]) -> T:
        """Call `LLMEngine.check_request` or `add_request` for it."""
        return method(
            self.request_id,
            self.prompt.token_ids,
            self.engine_params,
            priority=self.priority,
            cache_salt=self.prompt.cache_salt,
            pooling=self.pooling,
        )


@dataclass(slots=True, eq=False)
class _Call:
    """One open call. waiting: jobs that the engine does not have yet. running: by request id, oldest first."""

    waiting: deque[Job]
    streaming: bool
    running: dict[str, _Run] = field(default_factory=dict)
    inbox: deque[Delta] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class _Run:
    """A job that the engine works on, who asked for it, and who reads its tokens.

    reads_all: whether each token is read as it comes, for a piece of text or to look for stop strings, or all of them
    at the end.
    """

    job: Job
    call: _Call
    reader: RequestReader
    reads_all: bool


class JobLoop:
    """Runs jobs on one engine, which is closed with it."""

    def __init__(self, engine: LLMEngine, tokenizer: Tokenizer) -> None:
        self._open_engine: LLMEngine | None = engine
        self._tokenizer = tokenizer
        self._runs: dict[str, _Run] = {}  # by request id: all that run, of every open call

    @property
    def engine(self) -> LLMEngine:
        """The engine. Raises EngineDeadError after `close`."""
        if self._open_engine is None:
            raise EngineDeadError("this LLM was closed; make a new one")
        return self._open_engine

    def close(self) -> None:
        """Close the engine and let go of it. Open calls and later ones raise EngineDeadError."""
        if self._open_engine is not None:
            self._open_engine.close()
        self._open_engine = None
        self._runs.clear()

    def check(self, jobs: Sequence[Job]) -> None:
        """Raise RequestError for the first job that the engine would refuse. Nothing is started."""
        for job in jobs:
            job.give_to(self.engine.check_request)

    def run(self, jobs: Sequence[Job], *, streaming: bool) -> Iterator[Delta]:
        """Add the jobs, step until they have ended, and yield what comes. Leaving early aborts what still runs."""
        call = _Call(deque(jobs), streaming)
        try:
            while call.waiting or call.running or call.inbox:
                if call.inbox:
                    yield call.inbox.popleft()
                    continue
                self._add_waiting(call)
                self._notice_abort(call)
                if not call.inbox:
                    self._step()
        finally:
            for request_id in call.running:
                if self._runs.pop(request_id, None) is not None:
                    self.engine.abort(request_id)

    def _add_waiting(self, call: _Call) -> None:
        """Add the next jobs, as many as the engine's queue takes."""
        engine = self.engine
        while call.waiting and engine.num_waiting < engine.config.max_num_waiting:
            job = call.waiting[0]
            try:
                job.requests = job.give_to(engine.add_request)
            except QueueFullError:  # its samples do not fit beside those that wait
                return
            call.waiting.popleft()
            reader = RequestReader(self._tokenizer, job.prompt.text, job.params, job.requests)
            run = _Run(job, call, reader, call.streaming or bool(job.params.stop))
            self._runs[job.request_id] = call.running[job.request_id] = run

    def _notice_abort(self, call: _Call) -> None:
        """Read a request that was aborted through the engine, which no step's output tells.

        Looking at the oldest is enough: the call cannot end before it has.
        """
        oldest = next(iter(call.running.values()), None)
        if oldest is not None and all(request.finish_reason is not None for request in oldest.job.requests):
            for index in range(len(oldest.job.requests)):
                if not oldest.reader.has_ended(index):
                    self._read(oldest, index)

    def _step(self) -> None:
        runs = self._runs
        for step in self.engine.step():
            run = runs.get(step.request_id)  # None where a caller added the request to the engine itself
            if run is not None and (run.reads_all or step.finish_reason is not None):
                self._read(run, step.sample)

    def _read(self, run: _Run, index: int) -> None:
        """Hand on the new text of sample `index`; end the sample in the engine where the text says so."""
        job, call, request = run.job, run.call, run.job.requests[index]
        piece = run.reader.read(index)
        if piece.finish_reason is not None and request.finish_reason is None:
            self.engine.finish(request, piece.finish_reason)
        output = run.reader.output() if run.reader.finished else None
        if call.streaming or output is not None:
            reason = None if piece.finish_reason is None else piece.finish_reason.value
            call.inbox.append(Delta(job.index, piece.text, output, index, reason))
        if output is not None:
            del self._runs[job.request_id], call.running[job.request_id]
