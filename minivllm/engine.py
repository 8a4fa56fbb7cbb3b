"""Token ids in, token ids out: the one place that sees both the scheduler and the runner.

A step is one straight line: schedule a batch, launch it, wait for its ids, tell the scheduler. A failure in the middle
of a step leaves the two in disagreement, so it ends the engine, loudly.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from minivllm.batch import Batch
from minivllm.cache.block_manager import BlockManager
from minivllm.config import EngineConfig, ModelConfig
from minivllm.errors import EngineDeadError, RequestError
from minivllm.options import check_choice, check_int, show
from minivllm.prompts import MAX_CACHE_SALT_CHARACTERS
from minivllm.request import FinishReason, Request, StepOutput
from minivllm.runner.model_runner import ModelRunner
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.trace import StepRecord, TraceWriter

POOLINGS = ("last", "mean")
# Odd, and unrelated to the step between the positions of one sequence, so that no two samples share their draws.
_SAMPLE_SEED_STEP = 0xD1B54A32D192ED03


class LLMEngine:
    """Runs one model. `folder` holds its config.json and weights.

    Raises:
        ConfigError: the folder, the model or an option cannot be used.
        WeightError: the checkpoint does not fit the model.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.config = config
        self.model_config = ModelConfig.from_hf(folder)
        self._trace = None if config.trace is None else TraceWriter(config.trace)
        self.runner = ModelRunner(folder, self.model_config, config)
        self.block_manager = BlockManager(
            self.runner.kv.num_blocks, config.block_size, prefix_caching=config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            self.block_manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
            policy=config.scheduling_policy,
            prefix_aware=config.prefix_aware_scheduling,
            max_num_waiting=config.max_num_waiting,
            observer=None if self._trace is None else self._trace.event,
        )
        self._seeds = random.Random(config.seed)
        self._failure: BaseException | None = None

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.has_unfinished

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return self.scheduler.num_waiting

    def close(self) -> None:
        """Finish the trace file. Requests that have not ended get no more tokens."""
        if self._trace is not None:
            self._trace.close()

    def check_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: str | None = None,
    ) -> None:
        """Raise what `add_request` would raise for these arguments in an idle engine; nothing is added."""
        self._require_alive()
        leader = self._make_request(request_id, prompt_token_ids, params, priority, cache_salt, pooling)
        self.scheduler.limits.most_tokens(request_id, len(leader.prompt_token_ids), leader.max_tokens)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        pooling: str | None = None,
    ) -> list[Request]:
        """Queue one request; its results come from `step`. Returns one sequence for each of params.num_samples.

        Args:
            priority: lower runs first, where the engine's scheduling_policy is "priority".
            cache_salt: prefixes are shared only among requests of the same salt.
            pooling: "last" or "mean": compute an embedding of the prompt, and no more than one token.

        Raises:
            RequestError: an id in use, an empty prompt, a token id outside the vocabulary, a parameter that needs text
            (stop strings, bad words as strings: `LLM` handles them), or a request that can never fit.
            QueueFullError: too many requests wait. EngineDeadError: an earlier step failed.
        """
        self._require_alive()
        leader = self._make_request(request_id, prompt_token_ids, params, priority, cache_salt, pooling)
        if params.seed is None:
            leader.seed = self._seeds.getrandbits(63)
        samples = [leader, *(self._sibling(leader, index) for index in range(1, params.num_samples))]
        self.scheduler.add(samples)
        return samples

    def abort(self, request_id: str) -> bool:
        """End a request, all its samples, at any moment; False where it is unknown or has ended. No output follows."""
        return self.scheduler.abort(request_id)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End one sequence that has not ended, for a reason that the engine cannot see. No output of it follows."""
        self.scheduler.finish(request, reason)

    def clear_cache(self) -> None:
        """Forget all cached prefixes; requests that run go on."""
        self.scheduler.clear_cache()

    def step(self) -> list[StepOutput]:
        """Run one batch; returns what each of its requests got. Nothing to run: an empty list.

        Raises:
            EngineDeadError: the batch failed; so will every later call.
        """
        self._require_alive()
        try:
            return self._step()
        except BaseException as error:
            self._failure = error
            if isinstance(error, Exception):
                raise EngineDeadError(f"a step failed ({type(error).__name__}: {error}); make a new engine") from error
            raise  # KeyboardInterrupt and its like go through as they are

    def _step(self) -> list[StepOutput]:
        begin = time.monotonic()
        expired = self.scheduler.expire()
        batch = self.scheduler.schedule()
        if batch is None:
            return expired
        scheduled = time.monotonic()
        pending = self.runner.launch(batch)
        launched = time.monotonic()
        result = pending.wait()
        waited = time.monotonic()
        outputs = self.scheduler.update(batch, result)
        if self._trace is not None:
            self._record(self._trace, batch, (begin, scheduled, launched, waited, time.monotonic()))
        return expired + outputs

    def _record(self, trace: TraceWriter, batch: Batch, times: tuple[float, float, float, float, float]) -> None:
        num_decodes, blocks = batch.token_counts.count(0), self.block_manager
        trace.step(
            StepRecord(
                *times,
                decode_rows=num_decodes,
                prefill_rows=len(batch.slots) - num_decodes,
                prefill_tokens=len(batch.token_ids),
                running=self.scheduler.num_running,
                waiting=self.scheduler.num_waiting,
                used_blocks=blocks.num_used,
                cached_blocks=blocks.num_cached,
                free_blocks=blocks.num_free,
            )
        )

    def _make_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str | None,
        pooling: str | None,
    ) -> Request:
        if params.stop:
            raise RequestError(f"stop is {show(params.stop)}, but the engine knows only token ids; use LLM")
        most = MAX_CACHE_SALT_CHARACTERS
        if cache_salt is not None and not (isinstance(cache_salt, str) and 1 <= len(cache_salt) <= most):
            raise RequestError(f"cache_salt is {show(cache_salt)}; it must be a str of 1 to {most} characters, or None")
        if pooling is not None:
            check_choice("pooling", pooling, POOLINGS, RequestError)
        stop_ids = frozenset(self._checked_ids("stop_token_ids", params.stop_token_ids))
        if not params.ignore_eos:
            stop_ids = stop_ids.union(self.model_config.eos_token_ids)
        self._check_edits(params, stop_ids)
        prompt = self._checked_ids("prompt_token_ids", prompt_token_ids)
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt[-(params.truncate_prompt_tokens or 0) :],
            params=params,
            max_tokens=params.max_tokens if pooling is None else 1,
            stop_ids=stop_ids,
            seed=0 if params.seed is None else params.seed,
            priority=check_int("priority", priority, -(2**31), 2**31 - 1, RequestError),
            cache_salt=cache_salt,
            pooling=pooling,
        )

    def _sibling(self, leader: Request, index: int) -> Request:
        """Sample number `index` of the leader's request; sample 0 draws what a request of one sample draws."""
        seed = (leader.seed + index * _SAMPLE_SEED_STEP + 2**63) % 2**64 - 2**63
        return replace(
            leader, index=index, leader=leader, seed=seed, output_token_ids=[], logprobs=[], prompt_logprobs=[]
        )

    def _check_edits(self, params: SamplingParams, stop_ids: frozenset[int]) -> None:
        """Every id that changes logits is in the vocabulary, as many tokens as are asked for too, and something is left
        to draw."""
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self.model_config.vocab_size:
                limit = f"the model's vocabulary has only {self.model_config.vocab_size} tokens"
                raise RequestError(f"{name} is {getattr(params, name)}, but {limit}; ask for fewer")
        self._checked_ids("logit_bias", [token for token, _ in params.logit_bias])
        for index, word in enumerate(params.bad_words):
            if isinstance(word, str):
                raise RequestError(f"bad_words[{index}] is {show(word)}, but the engine knows only token ids; use LLM")
            self._checked_ids(f"bad_words[{index}]", word)
        if params.allowed_token_ids is None:
            return
        allowed = set(self._checked_ids("allowed_token_ids", params.allowed_token_ids))
        if params.min_tokens and allowed <= stop_ids:
            raise RequestError(
                f"allowed_token_ids has only tokens that end the request, and min_tokens is {params.min_tokens}: "
                "nothing could be drawn; allow another token"
            )

    def _require_alive(self) -> None:
        if self._failure is not None:
            kind = type(self._failure).__name__
            raise EngineDeadError(f"the engine stopped in an earlier step ({kind}: {self._failure}); make a new one")

    def _checked_ids(self, name: str, ids: Iterable[int]) -> list[int]:
        vocab_size = self.model_config.vocab_size
        checked = list(ids)
        if set(map(type, checked)) <= {int} and (not checked or (min(checked) >= 0 and max(checked) < vocab_size)):
            return checked  # the quick way to what the rest gives
        ids, checked = checked, []
        for index, token in enumerate(ids):
            try:
                checked.append(check_int("id", token, 0, vocab_size - 1, RequestError))
            except RequestError:
                limit = f"it must be an integer from 0 to {vocab_size - 1}, the model's vocabulary"
                raise RequestError(f"{name}[{index}] is {show(token)}; {limit}") from None
        return checked
