"""Token ids in, token ids out: the one place that sees both the scheduler and the runner.

A step is one straight line: schedule a batch, launch it, wait for its ids, tell the scheduler. A failure in the middle
of a step leaves the two in disagreement, so it ends the engine, loudly.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from minivllm.cache.block_manager import BlockManager
from minivllm.config import EngineConfig, ModelConfig
from minivllm.errors import EngineDeadError, RequestError
from minivllm.options import check_int, show
from minivllm.request import Request
from minivllm.runner.model_runner import ModelRunner
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler, StepOutput


class LLMEngine:
    """Runs one model. `folder` holds its config.json and weights.

    Raises:
        ConfigError: the folder, the model or an option cannot be used.
        WeightError: the checkpoint does not fit the model.
    """

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.config = config
        self.model_config = ModelConfig.from_hf(folder)
        self.runner = ModelRunner(folder, self.model_config, config)
        self.block_manager = BlockManager(self.runner.kv.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            self.block_manager,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self.runner.max_model_len,
        )
        self._seeds = random.Random(config.seed)
        self._failure: BaseException | None = None

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return self.scheduler.has_unfinished

    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams) -> Request:
        """Queue one request; its results come from `step`.

        Raises:
            RequestError: an id in use, an empty prompt, a token id outside the vocabulary, or a request that can never
            fit. EngineDeadError: an earlier step failed.
        """
        self._require_alive()
        stop_token_ids = self._checked_ids("stop_token_ids", params.stop_token_ids)
        request = Request(
            request_id=request_id,
            prompt_token_ids=self._checked_ids("prompt_token_ids", prompt_token_ids),
            params=params,
            max_tokens=params.max_tokens,
            stop_ids=frozenset(stop_token_ids).union(() if params.ignore_eos else self.model_config.eos_token_ids),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
        )
        self.scheduler.add(request)
        return request

    def abort(self, request_id: str) -> bool:
        """End a request at any moment; False where it is unknown or has ended. No output of it follows."""
        return self.scheduler.abort(request_id)

    def step(self) -> list[StepOutput]:
        """Run one batch; returns what each of its requests got. Nothing to run: an empty list.

        Raises:
            EngineDeadError: the batch failed; so will every later call.
        """
        self._require_alive()
        try:
            batch = self.scheduler.schedule()
            if batch is None:
                return []
            return self.scheduler.update(batch, self.runner.launch(batch).wait())
        except BaseException as error:
            self._failure = error
            if isinstance(error, Exception):
                raise EngineDeadError(f"a step failed ({type(error).__name__}: {error}); make a new engine") from error
            raise  # KeyboardInterrupt and its like go through as they are

    def _require_alive(self) -> None:
        if self._failure is not None:
            kind = type(self._failure).__name__
            raise EngineDeadError(f"the engine stopped in an earlier step ({kind}: {self._failure}); make a new one")

    def _checked_ids(self, name: str, ids: Iterable[int]) -> list[int]:
        vocab_size = self.model_config.vocab_size
        checked: list[int] = []
        for index, token in enumerate(ids):
            try:
                checked.append(check_int("id", token, 0, vocab_size - 1, RequestError))
            except RequestError:
                limit = f"it must be an integer from 0 to {vocab_size - 1}, the model's vocabulary"
                raise RequestError(f"{name}[{index}] is {show(token)}; {limit}") from None
        return checked
