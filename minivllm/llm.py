"""`LLM`: text in, text out, for offline use. It has an `LLMEngine` and a `Tokenizer` and adds the text to the tokens.

All of `generate`, `chat` and `stream` are one loop over `LLMEngine.step`; they differ in what they do with each delta.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.errors import ConfigError, EngineDeadError
from minivllm.hub import model_folder
from minivllm.prompts import Messages, ParsedPrompt, Prompt, params_for_each, parse_conversations, parse_prompts
from minivllm.request import CompletionOutput, Request, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.text import IncrementalDetokenizer, Tokenizer


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one prompt's continuation: which prompt, its new text (may be empty), and with the last piece the
    result."""

    index: int
    text: str
    output: RequestOutput | None


@dataclass(slots=True)
class _Stream:
    """What is known of one prompt while it runs; `inbox` is where the call that started it waits for its text.

    A streaming call wants a delta for each token; any other only the last one, with the whole text.
    """

    index: int
    prompt: str | None
    request: Request
    detokenizer: IncrementalDetokenizer
    inbox: deque[Delta]
    streaming: bool
    num_told: int = 0  # output tokens that became text
    pieces: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.request.finish_reason is not None

    def tell(self) -> None:
        """Turn the tokens that came since into text and hand it on."""
        if not (self.finished or self.streaming):
            return
        ids = self.request.output_token_ids
        text = self.detokenizer.push(ids[self.num_told :])
        self.num_told = len(ids)
        if self.finished:
            text += self.detokenizer.finish()
        self.pieces.append(text)
        self.inbox.append(Delta(self.index, text, self.output() if self.finished else None))

    def output(self) -> RequestOutput:
        request = self.request
        reason = None if request.finish_reason is None else request.finish_reason.value
        completion = CompletionOutput(0, "".join(self.pieces), list(request.output_token_ids), reason)
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            num_cached_tokens=0,
            outputs=[completion],
            finished=reason is not None,
            metrics=request.metrics,
        )


class LLM:
    """A model ready to generate. Use it as a context manager, or call `close()`.

    Args:
        model: folder of the model, or an id on the Hugging Face hub; None takes the bundled tiny model.
        options: the fields of `minivllm.EngineConfig`: device, dtype, max_model_len, max_num_seqs,
        max_num_batched_tokens,
            block_size, num_kv_blocks, gpu_memory_utilization, load_format, seed, ...

    Raises:
        ConfigError: an unknown option, a bad value, or a model that cannot be used.
        WeightError, TokenizerError: files of the model folder that are missing or damaged.
    """

    def __init__(self, model: str | Path | None = None, **options: Any) -> None:
        self.config = EngineConfig(model=None if model is None else str(model), **options)
        folder = model_folder(self.config.model)
        self.tokenizer = Tokenizer.from_pretrained(folder)
        self.engine = LLMEngine(folder, self.config)
        self._request_numbers = count()
        self._streams: dict[str, _Stream] = {}  # by request id: all that run, of every open call
        self._closed = False
        self._require_same_vocabulary(folder)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the model's memory. Later calls raise EngineDeadError."""
        if not self._closed:
            self._closed = True
            self._streams.clear()
            del self.engine

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue one prompt or many, batched; returns one result a prompt, in order.

        Args:
            prompts: a str, a list of str, a list of token-id lists, or dicts with `prompt_token_ids` (or `prompt`),
            also mixed.
            sampling_params: one for all prompts or one for each; None takes `SamplingParams()`.
            progress: show a progress bar on a terminal while more than one prompt runs.

        Raises:
            RequestError: a bad prompt or parameter; nothing was started.
            EngineDeadError: the engine failed.
        """
        return self._collect(parse_prompts(self.tokenizer, prompts), sampling_params, progress)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
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
        return self._collect(prompts, sampling_params, progress)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[Delta]:
        """Like `generate`, but yields each piece of text as it comes. Leaving the loop early aborts what still runs."""
        return self._run(parse_prompts(self.tokenizer, prompts), sampling_params)

    def stream_chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[Delta]:
        """Like `chat`, but yields each piece of text as it comes. Leaving the loop early aborts what still runs."""
        return self._run(
            parse_conversations(self.tokenizer, messages, tools, chat_template_kwargs or {}), sampling_params
        )

    def _collect(
        self,
        prompts: list[ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool,
    ) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = Console(stderr=True)
        shown = progress and len(prompts) > 1 and console.is_terminal
        with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
            task = bar.add_task("generating", total=len(prompts))
            for delta in self._run(prompts, sampling_params, streaming=False):
                if delta.output is not None:
                    outputs[delta.index] = delta.output
                    bar.advance(task)
        return [outputs[index] for index in range(len(prompts))]

    def _run(
        self,
        prompts: list[ParsedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        *,
        streaming: bool = True,
    ) -> Iterator[Delta]:
        """The one loop: add all prompts, step until they have ended, hand on each token's text.

        Several such loops may be open on one engine; whoever steps it fills everybody's inbox.
        """
        inbox: deque[Delta] = deque()
        mine = self._add_all(prompts, params_for_each(sampling_params, len(prompts)), inbox, streaming)
        try:
            while inbox or not all(stream.finished for stream in mine):
                if inbox:
                    yield inbox.popleft()
                else:
                    self._step()
            for stream in mine:
                if self._streams.pop(stream.request.request_id, None) is not None:
                    stream.tell()  # aborted through the engine, which is not a step's output
                    yield inbox.popleft()
        finally:
            self._drop(mine)

    def _step(self) -> None:
        for step in self.engine.step():
            stream = self._streams.get(step.request_id)
            if stream is not None:  # else a caller added the request to the engine itself
                stream.tell()
                if stream.finished:
                    del self._streams[step.request_id]

    def _add_all(
        self,
        prompts: list[ParsedPrompt],
        params: Sequence[SamplingParams],
        inbox: deque[Delta],
        streaming: bool,
    ) -> list[_Stream]:
        if self._closed:
            raise EngineDeadError("this LLM was closed; make a new one")
        added: list[_Stream] = []
        try:
            for index, ((prompt, ids), one) in enumerate(zip(prompts, params, strict=True)):
                request_id = f"request-{next(self._request_numbers)}"
                request = self.engine.add_request(request_id, ids, one)
                stream = _Stream(index, prompt, request, IncrementalDetokenizer(self.tokenizer), inbox, streaming)
                self._streams[request_id] = stream
                added.append(stream)
        except BaseException:
            self._drop(added)
            raise
        return added

    def _drop(self, streams: list[_Stream]) -> None:
        """Abort those of `streams` that still run."""
        for stream in streams:
            if self._streams.pop(stream.request.request_id, None) is not None:
                self.engine.abort(stream.request.request_id)

    def _require_same_vocabulary(self, folder: Path) -> None:
        tokenizer, model = self.tokenizer.vocab_size, self.engine.model_config.vocab_size
        if tokenizer > model:
            raise ConfigError(
                f"the tokenizer in {folder} has {tokenizer} ids, but the model's vocabulary is {model}; "
                "the two do not belong together"
            )
