"""A request's tokens turned into what its caller gets: text, logprobs with the text of their tokens, the best samples.

Tokens are taken in as they come, so that text can be streamed and stop strings can end it. A bug on the way is that
request's own: it ends there with the reason "error", the traceback goes to the log, and everybody else goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from minivllm.batch import TokenLogprobs
from minivllm.request import CompletionOutput, FinishReason, Logprob, Request, RequestMetrics, RequestOutput
from minivllm.sampling_params import SamplingParams
from minivllm.text.detokenizer import IncrementalDetokenizer
from minivllm.text.stop import StopStrings
from minivllm.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """New text of a sample, and why the sample ended, if it has.

    A sample may end here before its request has, on a stop string or an error: then the engine must be told.
    """

    text: str
    finish_reason: FinishReason | None


class RequestReader:
    """Reads what one request's sequences have got so far.

    Args:
        prompt: the text of the prompt, where there was one.
        params: as the caller gave them, with the stop strings that the engine does not see.
        requests: the request's sequences, one for each sample.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: str | None, params: SamplingParams, requests: Sequence[Request]
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._params = params
        self._samples = [_SampleReader(tokenizer, params, request) for request in requests]
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def finished(self) -> bool:
        """Whether every sample has ended, and been read to its end."""
        return all(sample.finish_reason is not None for sample in self._samples)

    def has_ended(self, index: int) -> bool:
        """Whether sample `index` has ended, and been read to its end."""
        return self._samples[index].finish_reason is not None

    def read(self, index: int) -> Piece:
        """Take in what came of sample `index` since the last call. Never raises; see the head of this file."""
        sample = self._samples[index]
        num_pieces = len(sample.pieces)
        try:
            if index == 0 and self._prompt_logprobs is None:
                self._read_prompt_logprobs(sample.request)
            sample.read()
        except Exception:
            name = sample.request.label
            logging.getLogger("minivllm").exception("the output of request %s cannot be made; it ends here", name)
            sample.finish_reason = FinishReason.ERROR
        return Piece("".join(sample.pieces[num_pieces:]), sample.finish_reason)

    def output(self) -> RequestOutput:
        """What the request has given so far: of more samples than the caller wants the likeliest, best first."""
        samples, wanted = self._samples, self._params.n
        if len(samples) > wanted:
            samples = sorted(samples, key=_SampleReader.rank)[:wanted]
        leader = self._samples[0].request
        return RequestOutput(
            request_id=leader.request_id,
            prompt=self._prompt,
            prompt_token_ids=list(leader.prompt_token_ids),
            num_cached_tokens=leader.num_cached_tokens,
            outputs=[sample.output(index) for index, sample in enumerate(samples)],
            finished=self.finished,
            metrics=self._metrics(),
            prompt_logprobs=self._prompt_logprobs,
        )

    def _read_prompt_logprobs(self, request: Request) -> None:
        """They are complete when the first token is drawn; a request that ends before has what it has."""
        if self._params.prompt_logprobs is not None and (request.output_token_ids or request.finish_reason):
            entries = [with_text(self._tokenizer, entry) for entry in request.prompt_logprobs]
            self._prompt_logprobs = [None, *entries]

    def _metrics(self) -> RequestMetrics:
        """The first sample's, but the end and the preemptions of all."""
        requests = [sample.request for sample in self._samples]
        ends = [request.finish_time for request in requests if request.finish_time is not None]
        return replace(
            requests[0].metrics,
            finish_time=max(ends) if len(ends) == len(requests) else None,
            num_preemptions=sum(request.num_preemptions for request in requests),
        )


class _SampleReader:
    """One sample: its text so far, in pieces, and how far its tokens were read."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, request: Request) -> None:
        self.request = request
        self.pieces: list[str] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._params = params
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stopper = StopStrings(params.stop, include=params.include_stop_str_in_output) if params.stop else None
        self._num_read = 0
        self._logprobs: list[dict[int, Logprob]] = []

    def read(self) -> None:
        """Read on to the last token, or to the one that completes a stop string."""
        ids, reason = self.request.output_token_ids, self.request.finish_reason
        step = len(ids) if self._stopper is None else 1
        while self._num_read < len(ids) and self.finish_reason is None:
            new = ids[self._num_read : self._num_read + step]
            self._num_read += len(new)
            self._add(self._detokenizer.push(new))
        if reason is not None and self.finish_reason is None:
            self._add(self._detokenizer.finish())
            self._finish(reason)
        if self._params.logprobs is not None:
            for entry in self.request.logprobs[len(self._logprobs) : self._num_read]:
                self._logprobs.append(with_text(self._tokenizer, entry))

    def rank(self) -> tuple[bool, float]:
        """Sort key: likelier samples are smaller, and failed ones last."""
        return self.finish_reason is FinishReason.ERROR, -self.request.cumulative_logprob

    def output(self, index: int) -> CompletionOutput:
        """The sample so far, as the caller's number `index`."""
        params, reason = self._params, self.finish_reason
        has_logprobs = params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self.pieces),
            token_ids=self.request.output_token_ids[: self._num_read],
            finish_reason=None if reason is None else reason.value,
            stop_reason=self._stop_reason(),
            cumulative_logprob=(
                self.request.cumulative_logprob if has_logprobs or params.num_samples > params.n else None
            ),
            logprobs=self._logprobs if has_logprobs else None,
        )

    def _add(self, text: str) -> None:
        if self._stopper is not None:
            text = self._stopper.push(text, may_stop=self._num_read >= self._params.min_tokens)
            if self._stopper.matched is not None:
                self.finish_reason = FinishReason.STOP
        self.pieces.append(text)

    def _finish(self, reason: FinishReason) -> None:
        """No more tokens come; what was held back is text, unless the last piece completed a stop string."""
        if self.finish_reason is None:
            self.finish_reason = reason
            if self._stopper is not None:
                self.pieces.append(self._stopper.finish())

    def _stop_reason(self) -> str | int | None:
        if self._stopper is not None and self._stopper.matched is not None:
            return self._stopper.matched
        ids = self.request.output_token_ids
        if self.finish_reason is FinishReason.STOP and ids[-1] in self._params.stop_token_ids:
            return ids[-1]
        return None


def with_text(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[int, Logprob]:
    """The logprobs at one position by token id: the token that stands there first, then the likeliest ones."""
    named = {entry.token_id: Logprob(entry.logprob, entry.rank, _text_of(tokenizer, entry.token_id))}
    rank, before = 1, None
    for place, (token, logprob) in enumerate(entry.top, 1):
        rank, before = (rank if logprob == before else place), logprob  # ties have the rank of the first of them
        if token not in named:
            named[token] = Logprob(logprob, rank, _text_of(tokenizer, token))
    return named


def _text_of(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)
