"""`minivllm generate`: continue prompts, batched, and stream the text as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

import click

from minivllm.errors import RequestError

if TYPE_CHECKING:
    from minivllm import LLM, CompletionOutput, Delta, RequestOutput


@click.command(epilog='Example: python -m minivllm generate --chat --stats "Please add 12 and 30."')
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--model", metavar="PATH|HUB_ID", help="Model folder or hub id.  [default: the bundled tiny model]")
@click.option("--chat", is_flag=True, help="Send each prompt as a user's message through the model's chat template.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Most tokens to generate for a prompt.")
@click.option("--n", type=int, default=1, show_default=True, help="Continuations of each prompt.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0 takes the most likely token.")
@click.option(
    "--top-p", type=float, default=0.95, show_default=True, help="Keep the likeliest tokens of this total mass."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest tokens; 0 keeps all.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Keep tokens this likely relative to the likeliest."
)
@click.option(
    "--presence-penalty", type=float, default=0.0, show_default=True, help="Lower the logits of tokens that came."
)
@click.option(
    "--frequency-penalty", type=float, default=0.0, show_default=True, help="Lower them each time that they came."
)
@click.option(
    "--repetition-penalty", type=float, default=1.0, show_default=True, help="Divide them; the prompt's tokens too."
)
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given again.")
@click.option("--seed", type=int, help="The same seed draws the same text.  [default: a new one each time]")
@click.option("--logprobs", type=int, metavar="N", help="Tell each token's logprob and the N likeliest, with --json.")
@click.option(
    "--prompt-file",
    multiple=True,
    type=click.File("r", encoding="utf-8"),
    metavar="F|-",
    help="A prompt from a file (- is stdin); may be given again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt instead of text.")
@click.option("--no-stream", is_flag=True, help="Print each text when it is complete.")
@click.option("--stats", is_flag=True, help="Print time to first token, tokens/s and cache use to stderr.")
@click.option("--trace", metavar="FILE", help="Record every step, for `minivllm trace FILE` and ui.perfetto.dev.")
@click.option("--max-model-len", type=int, help="Longest prompt and answer in tokens.  [default: the model's]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
def generate(
    prompts: tuple[str, ...],
    prompt_file: tuple[TextIO, ...],
    chat: bool,
    as_json: bool,
    no_stream: bool,
    stats: bool,
    model: str | None,
    trace: str | None,
    max_model_len: int | None,
    device: str,
    dtype: str,
    **sampling: Any,  # the options named like the fields of SamplingParams
) -> None:
    """Continue each PROMPT and stream the text; several prompts run as one batch and print in order."""
    start = time.monotonic()
    texts = [*prompts, *(_read(file) for file in prompt_file)]
    if not texts:
        raise click.UsageError("give at least one PROMPT or --prompt-file")
    if sampling["logprobs"] is not None and not as_json:
        raise click.UsageError("--logprobs are printed with --json only")
    import secrets

    from minivllm import LLM, SamplingParams

    params = SamplingParams(**sampling)
    engine_seed = secrets.randbits(62)  # a prompt without --seed draws anew each time
    with LLM(model, device=device, dtype=dtype, max_model_len=max_model_len, trace=trace, seed=engine_seed) as llm:
        ready = time.monotonic()
        conversations = [[{"role": "user", "content": text}] for text in texts]
        deltas = llm.stream_chat(conversations, params) if chat else llm.stream(texts, params)
        meter = _Meter(llm)
        printer = _JsonPrinter(texts) if as_json else _TextPrinter(texts, params.n, streaming=not no_stream)
        outputs = [delta.output for delta in printer.watch(meter.watch(deltas)) if delta.output is not None]
        if stats:
            meter.print(outputs, load_seconds=ready - start)


def _read(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt file {file.name} is not UTF-8 text: {error}") from error


class _TextPrinter:
    """Prints in the order of the prompts: the first unfinished continuation streams, later ones wait for their turn."""

    def __init__(self, texts: list[str], n: int, *, streaming: bool) -> None:
        self._texts = texts
        self._n = n
        self._streaming = streaming
        self._turns = iter([(index, sample) for index in range(len(texts)) for sample in range(n)])

    def watch(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        waiting: dict[tuple[int, int], list[str]] = defaultdict(list)
        ended = set()
        turn = self._next_turn()
        for delta in deltas:
            waiting[delta.index, delta.sample].append(delta.text)
            if delta.finish_reason is not None:
                ended.add((delta.index, delta.sample))
            while turn is not None:
                if self._streaming or turn in ended:
                    click.echo("".join(waiting.pop(turn, ())), nl=turn in ended)
                if turn not in ended:
                    break
                turn = self._next_turn()
            yield delta

    def _next_turn(self) -> tuple[int, int] | None:
        """Whose text comes next; prints its prompt, so that both read as one on a terminal and many are told apart."""
        turn = next(self._turns, None)
        if turn is None:
            return None
        text, sample = self._texts[turn[0]], turn[1]
        which = f", continuation {sample + 1}/{self._n}" if self._n > 1 else ""
        if len(self._texts) > 1 or which:
            first_line = text.partition("\n")[0]
            click.secho(f"--- {turn[0] + 1}/{len(self._texts)}{which}: {first_line[:70]}", dim=True)
        elif sys.stdout.isatty():
            click.secho(text, dim=True, nl=False)
        return turn


class _JsonPrinter:
    """Prints one object a prompt, in the order of the prompts."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def watch(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        outputs: dict[int, RequestOutput] = {}
        turn = 0
        for delta in deltas:
            if delta.output is not None:
                outputs[delta.index] = delta.output
            while turn in outputs:
                click.echo(json.dumps(_as_json(self._texts[turn], outputs.pop(turn)), ensure_ascii=False))
                turn += 1
            yield delta


def _as_json(prompt: str, output: RequestOutput) -> dict[str, object]:
    metrics, completions = output.metrics, [_completion_as_json(completion) for completion in output.outputs]
    first, finish = metrics.first_token_time, metrics.finish_time
    return {
        "prompt": prompt,
        **completions[0],
        **({"outputs": completions} if len(completions) > 1 else {}),
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "ttft_seconds": None if first is None else round(first - metrics.arrival_time, 6),
        "seconds": None if finish is None else round(finish - metrics.arrival_time, 6),
    }


def _completion_as_json(completion: CompletionOutput) -> dict[str, object]:
    record: dict[str, object] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "completion_tokens": len(completion.token_ids),
        "token_ids": completion.token_ids,
    }
    if completion.logprobs is not None:
        record["cumulative_logprob"] = completion.cumulative_logprob
        record["logprobs"] = [
            [
                {"id": token, "token": one.decoded_token, "logprob": one.logprob, "rank": one.rank}
                for token, one in position.items()
            ]
            for position in completion.logprobs
        ]
    return record


class _Meter:
    """Watches the engine while it runs, for --stats."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._most_blocks = 0

    def watch(self, deltas: Iterable[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            self._most_blocks = max(self._most_blocks, self._llm.engine.block_manager.num_used)
            yield delta

    def print(self, outputs: list[RequestOutput], load_seconds: float) -> None:
        first_tokens = [output.metrics.first_token_time for output in outputs]
        arrivals = [output.metrics.arrival_time for output in outputs]
        ttft = [first - arrival for first, arrival in zip(first_tokens, arrivals, strict=True) if first is not None]
        ends = [output.metrics.finish_time for output in outputs if output.metrics.finish_time is not None]
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        seconds = max(ends) - min(arrivals)
        runner, cache = self._llm.engine.runner, self._llm.engine.block_manager.stats
        kv = runner.kv
        lines = [
            f"device {runner.device}, dtype {str(runner.dtype).removeprefix('torch.')}, ready in {load_seconds:.2f} s "
            f"(weights {runner.load_seconds:.2f} s)",
            f"prompts {len(outputs)}, prompt tokens {sum(len(output.prompt_token_ids) for output in outputs)}, "
            f"generated tokens {tokens} in {seconds:.3f} s = {tokens / seconds:.1f} tokens/s",
            f"time to first token {min(ttft) * 1e3:.1f} ms (slowest {max(ttft) * 1e3:.1f} ms), "
            f"command start to first token {load_seconds + min(ttft):.2f} s"
            if ttft
            else "no token was generated",
            f"KV cache: at most {self._most_blocks} of {kv.num_blocks} blocks of {kv.block_size} tokens in use",
            f"prefix cache: {cache.cached_tokens} of {cache.prompt_tokens} prompt tokens found "
            f"({cache.hit_rate:.1%}), {cache.evicted_blocks} blocks evicted",
        ]
        for line in lines:
            click.echo(line, err=True)
