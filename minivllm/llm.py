"""`LLM`: text in, text out, for offline use. It has an `LLMEngine` and a `Tokenizer` and adds the text to the tokens.

Every method turns its prompts into jobs, which are all checked before any is started, and runs them in the one loop of
`JobLoop`; the methods differ in what they ask for and in what they do with what comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minivllm.beam_search import BeamSearchOutput, BeamSearchParams, NextTokens, beam_search, make_beams
from minivllm.config import EngineConfig
from minivllm.engine import POOLINGS, LLMEngine
from minivllm.errors import ConfigError, RequestError
from minivllm.hub import model_folder
from minivllm.jobs import Delta, Job, JobLoop
from minivllm.options import check_bool, check_choice
from minivllm.prompts import (
    Messages,
    ParsedPrompt,
    Prompt,
    params_for_each,
    params_for_engine,
    parse_continuations,
    parse_conversations,
    parse_prompts,
    priorities_for_each,
)
from minivllm.request import FinishReason, Request, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.scoring import Embedding, Score, make_embedding, make_score
from minivllm.text import Tokenizer

ParamsForEach: TypeAlias = "SamplingParams | Sequence[SamplingParams] | None"

# Options of requests whose drawn token is of no use.
_ONE_TOKEN: dict[str, Any] = {"temperature": 0.0, "max_tokens": 1, "ignore_eos": True}


class LLM:
    """A model ready to generate. Use it as a context manager, or call `close()`.

    Args:
        model: folder of the model, or an id on the Hugging Face hub; None takes the bundled tiny model.
        options: the fields of `minivllm.EngineConfig`: device, dtype, max_model_len, max_num_seqs,
            max_num_batched_tokens, block_size, num_kv_blocks, scheduling_policy, trace, seed, ...

    Raises:
        ConfigError: an unknown option, a bad value, or a model that cannot be used.
        WeightError, TokenizerError: files of the model folder that are missing or damaged.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.config = EngineConfig(model=None if model is None else str(model), **options)
        folder = model_folder(self.config.model)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self._loop = JobLoop(LLMEngine(folder, self.config), self.tokenizer)
        self._request_numbers = count()
        self._require_same_vocabulary(folder)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the model's memory and finish the trace. Later calls raise EngineDeadError."""
        self._loop.close()

    @property
    def engine(self) -> LLMEngine:
        """What runs the model. Raises EngineDeadError after `close`."""
        return self._loop.engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ParamsForEach = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue one prompt or many, batched; returns one result a prompt, in order.

        Args:
            prompts: a str, a list of str, a list of token-id lists, or dicts with `prompt_token_ids` (or `prompt`) and
                perhaps a `cache_salt`, also mixed.
            sampling_params: one for all prompts or one for each; None takes `SamplingParams()`.
            priority: one for all prompts or one for each; lower runs first where scheduling_policy is "priority".
            progress: show a progress bar on a terminal while more than one prompt runs.

        Raises:
            RequestError: a bad prompt or parameter; nothing was started.
            EngineDeadError: the engine failed, or this LLM was closed.
        """
        return self._collect(self._jobs(parse_prompts(self.tokenizer, prompts), sampling_params, priority), progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: ParamsForEach = None,
        *,
        priority: int | Sequence[int] = 0,
        progress: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or many: each a list of {"role": ..., "content": ...}, rendered with the model's
        template.

        Raises:
            ChatTemplateError: messages that the template refuses, or a model without a template.
            RequestError, EngineDeadError: as `generate`.
        """
        prompts = parse_conversations(self.tokenizer, messages, tools, chat_template_kwargs or {})
        return self._collect(self._jobs(prompts, sampling_params, priority), progress)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: ParamsForEach = None,
        *,
        priority: int | Sequence[int] = 0,
    ) -> Iterator[Delta]:
        """Like `generate`, but yields each piece of text as it comes. Leaving the loop early aborts what still runs.

        Raises RequestError also for best_of > n: which samples are the best is known only at the end.
        """
        return self._stream(parse_prompts(self.tokenizer, prompts), sampling_params, priority)

    def stream_chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: ParamsForEach = None,
        *,
        priority: int | Sequence[int] = 0,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Delta]:
        """Like `chat`, but yields each piece of text as it comes; see `stream`."""
        prompts = parse_conversations(self.tokenizer, messages, tools, chat_template_kwargs or {})
        return self._stream(prompts, sampling_params, priority)

    def score(
        self, prompts: Prompt | Sequence[Prompt], continuations: Any = None, *, progress: bool = True
    ) -> list[Score]:
        """How likely the model finds each prompt, token by token.

        Args:
            prompts: as for `generate`.
            continuations: a str or token ids for each prompt, which are put behind its tokens; total and perplexity are
                then about these alone.

        Raises:
            RequestError, EngineDeadError: as `generate`; RequestError also where the model's logits were not numbers.
        """
        parsed = parse_prompts(self.tokenizer, prompts)
        num_scored = [len(prompt.token_ids) - 1 for prompt in parsed]
        if continuations is not None:
            ends = parse_continuations(self.tokenizer, continuations, len(parsed))
            num_scored = [len(end) for end in ends]
            parsed = [_extended(prompt, end) for prompt, end in zip(parsed, ends, strict=True)]
        leaders = self._leaders(self._jobs(parsed, SamplingParams(**_ONE_TOKEN, prompt_logprobs=0)), progress)
        return [
            make_score(leader.prompt_token_ids, leader.prompt_logprobs, number)
            for leader, number in zip(leaders, num_scored, strict=True)
        ]

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str = "last",
        normalize: bool = True,
        progress: bool = True,
    ) -> list[Embedding]:
        """An embedding of each prompt: the model's hidden states behind its last layer and norm, made one vector.

        Args:
            prompts: as for `generate`.
            pooling: "last" takes the last token's state, which has seen all others; "mean" the mean of all.
            normalize: make its Euclidean length 1.

        Raises:
            RequestError, EngineDeadError: as `generate`; RequestError also where the model's logits were not numbers.
        """
        check_choice("pooling", pooling, POOLINGS, RequestError)
        check_bool("normalize", normalize, RequestError)
        parsed, params = parse_prompts(self.tokenizer, prompts), SamplingParams(**_ONE_TOKEN)
        leaders = self._leaders(self._jobs(parsed, params, pooling=pooling), progress)
        return [make_embedding(leader.prompt_token_ids, leader.embedding, normalize) for leader in leaders]

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        beam_width: int = 4,
        max_tokens: int = 16,
        length_penalty: float = 1.0,
        ignore_eos: bool = False,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations as a whole, by keeping the `beam_width` likeliest beginnings at each length.

        Each step computes one token of every beam of every prompt; the prefix cache has the rest.

        Args:
            prompts: as for `generate`.
            beam_width: beams that are kept, and continuations returned; 1 to 64.
            max_tokens: length at which a beam ends; also bounded by the model's context length.
            length_penalty: beams are compared by cumulative logprob / length ** length_penalty; -10 to 10.
            ignore_eos: take the model's end tokens for tokens like any other.

        Raises:
            RequestError, EngineDeadError: as `generate`; RequestError also where the model's logits were not numbers.
        """
        params = BeamSearchParams(beam_width, max_tokens, length_penalty, ignore_eos)
        parsed = parse_prompts(self.tokenizer, prompts)
        stop_ids = () if ignore_eos else self.engine.model_config.eos_token_ids
        next_tokens = self._next_tokens(parsed, params.num_next_tokens(len(stop_ids)))
        found = beam_search(self._room(parsed, max_tokens), next_tokens, params, stop_ids)
        return [
            BeamSearchOutput(prompt.text, prompt.token_ids, make_beams(self.tokenizer, one, params))
            for prompt, one in zip(parsed, found, strict=True)
        ]

    def clear_prefix_cache(self) -> None:
        """Forget what was computed for earlier prompts; what runs goes on."""
        self.engine.clear_cache()

    def _jobs(
        self,
        prompts: Sequence[ParsedPrompt],
        sampling_params: ParamsForEach,
        priority: int | Sequence[int] = 0,
        pooling: str | None = None,
    ) -> list[Job]:
        """A job a prompt, all of them checked."""
        params = params_for_each(sampling_params, len(prompts))
        distinct = {id(one): one for one in params}  # most calls have one for all their prompts
        for_engine = {key: params_for_engine(self.tokenizer, one) for key, one in distinct.items()}
        columns = zip(prompts, params, priorities_for_each(priority, len(prompts)), strict=True)
        jobs = [
            Job(
                index=index,
                request_id=f"request-{next(self._request_numbers)}",
                prompt=prompt,
                params=one,
                engine_params=for_engine[id(one)],
                priority=urgency,
                pooling=pooling,
            )
            for index, (prompt, one, urgency) in enumerate(columns)
        ]
        self._loop.check(jobs)
        return jobs

    def _stream(
        self, prompts: list[ParsedPrompt], sampling_params: ParamsForEach, priority: int | Sequence[int]
    ) -> Iterator[Delta]:
        jobs = self._jobs(prompts, sampling_params, priority)
        for job in jobs:
            if job.params.num_samples > job.params.n:
                raise RequestError(
                    f"best_of is {job.params.best_of} and n is {job.params.n}, but which samples are the best is known "
                    "only when all have ended; stream with best_of=None, or use generate"
                )
        return self._loop.run(jobs, streaming=True)

    def _collect(self, jobs: list[Job], progress: bool) -> list[RequestOutput]:
        """Run the jobs to their ends; returns one result a job, in order."""
        outputs: dict[int, RequestOutput] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        shown = progress and len(jobs) > 1 and console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("generating", total=len(jobs))
            for delta in self._loop.run(jobs, streaming=False):
                if delta.output is not None:
                    outputs[delta.index] = delta.output
                    bar.advance(task)
        return [outputs[index] for index in range(len(jobs))]

    def _leaders(self, jobs: list[Job], progress: bool) -> list[Request]:
        """Run jobs of one sample and one token each; returns what the engine knows of each, in order."""
        self._collect(jobs, progress)
        leaders = [job.requests[0] for job in jobs]
        for index, leader in enumerate(leaders):
            reason = leader.finish_reason
            if reason is not None and reason is not FinishReason.LENGTH:
                raise RequestError(
                    f"sequence {index + 1} of {len(jobs)} could not be computed: it ended with {reason.value!r}; "
                    "an error means that the model's logits were not numbers"
                )
        return leaders

    def _next_tokens(self, prompts: list[ParsedPrompt], number: int) -> NextTokens:
        """Answers a beam search: the `number` likeliest tokens after each of the sequences it asks about."""
        params = SamplingParams(**_ONE_TOKEN, logprobs=number)

        def answer(sequences: list[tuple[int, list[int]]]) -> list[Sequence[tuple[int, float]]]:
            jobs = self._jobs([_extended(prompts[index], ids) for index, ids in sequences], params)
            return [leader.logprobs[0].top for leader in self._leaders(jobs, progress=False)]

        return answer

    def _room(self, prompts: list[ParsedPrompt], max_tokens: int) -> list[int]:
        """`max_tokens`, lowered for each prompt to what the context length leaves behind it."""
        limits = self.engine.scheduler.limits
        return [
            limits.most_tokens(f"prompts[{index}]", len(prompt.token_ids), max_tokens)
            for index, prompt in enumerate(prompts)
        ]

    def _require_same_vocabulary(self, folder: Path) -> None:
        tokenizer, model = self.tokenizer.vocab_size, self.engine.model_config.vocab_size
        if tokenizer > model:
            raise ConfigError(
                f"the tokenizer in {folder} has {tokenizer} ids, but the model's vocabulary is {model}; "
                "the two do not belong together"
            )


def _extended(prompt: ParsedPrompt, ids: list[int]) -> ParsedPrompt:
    """The prompt with more tokens behind it."""
    return prompt._replace(token_ids=prompt.token_ids + ids)
