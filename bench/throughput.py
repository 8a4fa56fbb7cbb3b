"""Tokens per second of minivllm and of `transformers` generate on the same prompts, in the same run.

    python bench/throughput.py                      # the bundled model on this machine's default device
    python bench/throughput.py --requests 1         # one request at a time
    python bench/throughput.py --model FOLDER --device cuda --dtype bfloat16 --peer none

Both generate greedily, exactly --tokens tokens a prompt (end tokens ignored); `transformers` runs one static batch.
Each is measured --repeats times after a warm-up, alternating, and the medians are compared.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

from minivllm import LLM, SamplingParams
from minivllm.hub import model_folder

console = Console()


def ours(llm: LLM, prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    def run() -> None:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, progress=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)

    return run


def theirs(folder: Path, llm: LLM, prompts: list[list[int]], tokens: int) -> Callable[[], None]:
    """`transformers` with the same weights, dtype, device and threads, one static batch padded on the left."""
    from transformers import AutoModelForCausalLM

    runner = llm.engine.runner
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=runner.dtype).to(runner.device).eval()
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=runner.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=runner.device)

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        assert out.shape[1] == width + tokens

    return run


def seconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@click.command()
@click.option("--model", help="Model folder.  [default: the bundled model]")
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--requests", default=64, show_default=True, help="Prompts that run at once.")
@click.option("--prompt-tokens", default=32, show_default=True, help="Longest prompt; lengths vary from half of it.")
@click.option("--tokens", default=64, show_default=True, help="Tokens to generate for each prompt.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--peer", type=click.Choice(["transformers", "none"]), default="transformers", show_default=True)
@click.option("--load-format", default="auto", show_default=True, help="dummy: random weights, without a peer.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    model: str | None, device: str, dtype: str, requests: int, prompt_tokens: int, tokens: int, repeats: int, peer: str,
    load_format: str, json_file: Path | None,
) -> None:  # fmt: skip
    """Compare tokens per second with `transformers` on the same work."""
    rng = random.Random(0)
    options = {"device": device, "dtype": dtype, "load_format": load_format, "max_num_seqs": max(requests, 1)}
    with LLM(model, enable_prefix_caching=False, **options) as llm:  # the repeats must compute their prompts again
        vocab = llm.engine.model_config.vocab_size
        lengths = [rng.randint(max(1, prompt_tokens // 2), prompt_tokens) for _ in range(requests)]
        prompts = [rng.choices(range(vocab), k=length) for length in lengths]
        runs = {"minivllm": ours(llm, prompts, tokens)}
        if peer == "transformers":
            runs["transformers"] = theirs(model_folder(model), llm, prompts, tokens)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                took = seconds(run, llm.engine.runner.device)
                if repeat:  # the first round warms up
                    times[name].append(took)
        runner = llm.engine.runner
        title = (
            f"{requests} requests x {tokens} tokens, {runner.device}, {runner.dtype}, {torch.get_num_threads()} threads"
        )
    rates = {name: requests * tokens / statistics.median(took) for name, took in times.items()}
    table = Table("engine", "tokens/s", "ms a step", "minivllm is", title=title)
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{1e3 * requests / rate:.2f}", f"{rates['minivllm'] / rate:.2f} x")
    console.print(table)
    if json_file:
        json_file.write_text(json.dumps({"title": title, "tokens_per_second": rates, "seconds": times}, indent=1))


if __name__ == "__main__":
    main()
