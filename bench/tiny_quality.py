"""How good the bundled tiny model is, measured through minivllm itself: `python bench/tiny_quality.py`.

Greedy answers to held-out chat tasks are compared exactly; held-out text is scored by teacher-forced logits in windows
that each begin without context, so the figures are those of the model card up to the precision of the kernels.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from minivllm import LLM, SamplingParams

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_tasks import KINDS, held_out_dialogues

DOCUMENT_MARK = "<|endoftext|>"
HELD_OUT_TEXT = Path(__file__).resolve().parent / "data" / "heldout.txt"


def task_accuracy(llm: LLM, per_kind: int, seed: int) -> dict[str, float]:
    """Share of held-out tasks of each kind whose greedy answer is exactly right."""
    dialogues = [(kind, d) for kind in KINDS for d in held_out_dialogues(kind, per_kind, seed)]
    params = SamplingParams(temperature=0.0, max_tokens=64)
    outputs = llm.chat([dialogue[:-1] for _, dialogue in dialogues], params, progress=False)
    right = dict.fromkeys(KINDS, 0)
    for (kind, dialogue), output in zip(dialogues, outputs, strict=True):
        right[kind] += output.outputs[0].text.strip() == dialogue[-1]["content"]
    return {kind: count / per_kind for kind, count in right.items()}


def document_ids(llm: LLM, text: str) -> list[int]:
    """One stream of the documents of `text`, each opened by the model's end-of-text token where it has one."""
    mark = llm.tokenizer.encode(DOCUMENT_MARK, allow_special=True)
    opening = mark if len(mark) == 1 else []
    documents = (document.strip("\n") for document in text.split(DOCUMENT_MARK))
    return [token for document in documents if document for token in (*opening, *llm.tokenizer.encode(document))]


def score_text(llm: LLM, text: str, window: int) -> dict[str, float]:
    """Perplexity per token and bits per byte of `text`; each token is predicted from its window's earlier tokens."""
    ids = document_ids(llm, text)
    nats = 0.0
    for start in range(0, len(ids) - 1, window):
        inputs, targets = ids[start : start + window], torch.tensor(ids[start + 1 : start + window + 1])
        logits = llm.engine.runner.prompt_logits(inputs)[: len(targets)].float().cpu()
        nats += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
    size = len(text.replace(DOCUMENT_MARK, "").encode())
    return {
        "perplexity": math.exp(nats / (len(ids) - 1)),
        "bits_per_byte": nats / math.log(2) / size,
        "tokens": len(ids),
    }


def show(console: Console, results: dict[str, Any]) -> None:
    """Print two tables: exact match by kind, and the scores of each text."""
    tasks = Table("kind", "exact match", title=f"held-out tasks, {results['tasks_per_kind']} a kind")
    for kind, share in results["accuracy"].items():
        tasks.add_row(kind, f"{share:.1%}")
    tasks.add_section()
    tasks.add_row("overall", f"{results['overall']:.2%}", style="bold")
    console.print(tasks)
    texts = Table("text", "perplexity", "bits per byte", "tokens", title="held-out text")
    for name, scores in results["text"].items():
        texts.add_row(name, f"{scores['perplexity']:.2f}", f"{scores['bits_per_byte']:.4f}", f"{scores['tokens']:,}")
    console.print(texts)
    console.print(f"{results['seconds']:.1f} s on {results['device']} in {results['dtype']}")


@click.command(context_settings={"show_default": True})
@click.option("--model", default=None, help="Model folder or hub id; the bundled tiny model if absent.")
@click.option("--tasks-per-kind", default=100, type=click.IntRange(1), help="Held-out tasks of each kind.")
@click.option(
    "--text", "texts", multiple=True, default=[str(HELD_OUT_TEXT)], type=click.Path(exists=True, path_type=Path),
    help=f"UTF-8 text to score, documents separated by {DOCUMENT_MARK}; may be given several times.",
)  # fmt: skip
@click.option("--window", default=1024, type=click.IntRange(2), help="Tokens of a window; at most max_model_len.")
@click.option("--seed", default=0, help="Seed of the tasks.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the results here, too.")
@click.option("--device", default="auto")
@click.option("--dtype", default="auto")
def main(
    model: str | None, tasks_per_kind: int, texts: tuple[Path, ...], window: int, seed: int, json_path: Path | None,
    device: str, dtype: str,
) -> None:  # fmt: skip
    """Measure a model on held-out tasks and held-out text."""
    started = time.perf_counter()
    with LLM(model, device=device, dtype=dtype) as llm:
        accuracy = task_accuracy(llm, tasks_per_kind, seed)
        used_device, used_dtype = llm.engine.runner.device, llm.engine.runner.dtype
        scores = {path.stem: score_text(llm, path.read_text("utf-8"), window) for path in texts}
    results = {
        "model": model or "bundled",
        "device": str(used_device),
        "dtype": str(used_dtype).removeprefix("torch."),
        "seed": seed,
        "tasks_per_kind": tasks_per_kind,
        "accuracy": accuracy,
        "overall": sum(accuracy.values()) / len(accuracy),
        "text": scores,
        "seconds": time.perf_counter() - started,
    }
    show(Console(), results)
    if json_path is not None:
        json_path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
