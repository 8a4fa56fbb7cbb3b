"""`minivllm generate`: continue prompts, batched, and stream the text as it comes."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

import click

from minivllm.errors import RequestError

if TYPE_CHECKING:
    from minivllm import LLM, Delta, RequestOutput


@click.command(epilog='Example: python -m minivllm generate --chat --stats "Please add 12 and 30."')
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("--model", metavar="PATH|HUB_ID", help="Model folder or hub id.  [default: the bundled tiny model]")
@click.option("--chat", is_flag=True, help="Send each prompt as a user's message through the model's chat template.")
@click.option("--max-tokens", type=int, default=128, show_default=True, help="Most tokens to generate for a prompt.")
@click.option("--temperature", type=float, default=0.7, show_default=True, help="0 takes the most likely token.")
@click.option(
    "--top-p", type=float, default=0.95, show_default=True, help="Keep the likeliest tokens of this total mass."
)
@click.option("--top-k", type=int, default=0, show_default=True, help="Keep the k likeliest tokens; 0 keeps all.")
@click.option(
    "--min-p", type=float, default=0.0, show_default=True, help="Keep tokens this likely relative to the likeliest."
)
@click.option("--seed", type=int, help="The same seed draws the same text.  [default: a new one each time]")
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
@click.option("--max-model-len", type=int, help="Longest prompt and answer in tokens.  [default: the model's]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
def generate(
    prompts: tuple[str, ...],
    model: str | None,
    chat: bool,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int | None,
    prompt_file: tuple[TextIO, ...],
    as_json: bool,
    no_stream: bool,
    stats: bool,
    max_model_len: int | None,
    device: str,
    dtype: str,
) -> None:
    """Continue each PROMPT and stream the text; several prompts run as one batch and print in order."""
    start = time.monotonic()
    texts = [*prompts, *(_read(file) for file in prompt_file)]
    if not texts:
        raise click.UsageError("give at least one PROMPT or --prompt-file")
    import secrets

    from minivllm import LLM, SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, max_tokens=max_tokens, seed=seed
    )
    engine_seed = secrets.randbits(62)  # a prompt without --seed draws anew each time
    with LLM(model, device=device, dtype=dtype, max_model_len=max_model_len, seed=engine_seed) as llm:
        ready = time.monotonic()
        conversations = [[{"role": "user", "content": text}] for text in texts]
        deltas = llm.stream_chat(conversations, params) if chat else llm.stream(texts, params)
        meter = _Meter(llm)
        outputs = _print(meter.watch(deltas), texts, as_json, streaming=not (no_stream or as_json))
        if stats:
            meter.print(outputs, load_seconds=ready - start)


def _read(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt file {file.name} is not UTF-8 text: {error}") from error


def _print(deltas: Iterator[Delta], texts: list[str], as_json: bool, *, streaming: bool) -> list[RequestOutput]:
    """Print in the order of the prompts: the first unfinished one streams, later ones wait for their turn."""
    waiting: dict[int, list[str]] = defaultdict(list)
    outputs: dict[int, RequestOutput] = {}
    turn = 0
    _print_header(turn, texts, as_json)
    for delta in deltas:
        waiting[delta.index].append(delta.text)
        if delta.output is not None:
            outputs[delta.index] = delta.output
        while turn < len(texts):
            if streaming:
                click.echo("".join(waiting.pop(turn, ())), nl=False)
            if turn not in outputs:
                break
            if as_json:
                click.echo(json.dumps(_as_json(texts[turn], outputs[turn]), ensure_ascii=False))
            else:
                click.echo("" if streaming else outputs[turn].text)
            turn += 1
            _print_header(turn, texts, as_json)
    return [outputs[index] for index in range(len(texts))]


def _print_header(turn: int, texts: list[str], as_json: bool) -> None:
    """The prompt, so that a continuation reads as one text on a terminal and many prompts can be told apart."""
    if as_json or turn >= len(texts):
        return
    if len(texts) > 1:
        first_line = texts[turn].partition("\n")[0]
        click.secho(f"--- {turn + 1}/{len(texts)}: {first_line[:70]}", dim=True)
    elif sys.stdout.isatty():
        click.secho(texts[turn], dim=True, nl=False)


def _as_json(prompt: str, output: RequestOutput) -> dict[str, object]:
    completion, metrics = output.outputs[0], output.metrics
    first, finish = metrics.first_token_time, metrics.finish_time
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "completion_tokens": len(completion.token_ids),
        "token_ids": completion.token_ids,
        "ttft_seconds": None if first is None else round(first - metrics.arrival_time, 6),
        "seconds": None if finish is None else round(finish - metrics.arrival_time, 6),
    }


class _Meter:
    """Watches the engine while it runs, for --stats."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._most_blocks = 0

    def watch(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        blocks, total = self._llm.engine.block_manager, self._llm.engine.runner.kv.num_blocks
        for delta in deltas:
            self._most_blocks = max(self._most_blocks, total - blocks.num_free)
            yield delta

    def print(self, outputs: list[RequestOutput], load_seconds: float) -> None:
        first_tokens = [output.metrics.first_token_time for output in outputs]
        arrivals = [output.metrics.arrival_time for output in outputs]
        ttft = [first - arrival for first, arrival in zip(first_tokens, arrivals, strict=True) if first is not None]
        ends = [output.metrics.finish_time for output in outputs if output.metrics.finish_time is not None]
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        seconds = max(ends) - min(arrivals)
        runner = self._llm.engine.runner
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
        ]
        for line in lines:
            click.echo(line, err=True)
