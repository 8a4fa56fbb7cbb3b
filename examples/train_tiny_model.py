"""Train the bundled tiny model from scratch: one command from books to a complete model folder.

The schedule follows progress, the larger of steps done and time spent, so that a run given `--minutes` always ends
with its learning rate at zero. Every batch is drawn from the seed and the step alone; a resumed run draws the same.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tiny_card import write_card
from tiny_data import (
    NUM_RANKS,
    SPECIAL_TOKENS,
    Book,
    PackJob,
    encode_documents,
    load_books,
    load_ranks,
    make_encoding,
    pack_in_parallel,
    save_ranks,
    story_passages,
    train_ranks,
)
from tiny_export import judge, next_token_loss, round_to_bfloat16, write_folder
from tiny_net import Muon, NetConfig, TinyQwen3
from tiny_tasks import train_dialogue

NOT_RECIPE = {"corpus", "out", "work", "resume", "workers", "log_every", "save_minutes", "tasks_per_kind", "device"}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the corpus."""

    seed: int
    steps: int
    minutes: float
    batch: int
    length: int
    lr: float
    adam_lr: float
    weight_decay: float
    dropout: float
    warmup: float
    decay: float
    prose_share: float
    story_share: float
    final_story_share: float
    task_weight: float
    dialogue_windows: int
    talk_share: float
    talk_story_share: float


@dataclass(frozen=True)
class Data:
    """What training draws from; `prose` holds the stories first, then the novels."""

    ranks: dict[bytes, int]
    prose: Tensor
    num_story_tokens: int
    story_starts: Tensor
    windows: Tensor
    mask: Tensor
    held_out: dict[str, list[str]]
    facts: dict[str, Any]


def prepare(corpus: Path, work: Path, settings: Settings, workers: int, device: torch.device) -> Data:
    """Clean the books, learn the tokenizer, encode the prose and make the dialogues."""
    started = time.perf_counter()
    books = load_books(corpus)
    documents = {story: [d for b in books if b.is_story == story for d in b.documents] for story in (True, False)}
    ranks = _ranks(work / "tokenizer.tiktoken", documents, settings.seed)
    encoding = make_encoding(ranks)
    stories, starts = encode_documents(encoding, documents[True])
    novels, _ = encode_documents(encoding, documents[False])
    openings, _ = story_passages([d for b in books if "fairytale" in b.name for d in b.documents])
    _, passages = story_passages(documents[True] + documents[False])
    job = PackJob(
        str(settings.seed), settings.dialogue_windows, settings.length + 1, settings.talk_share, settings.talk_story_share, ranks,
        openings, passages,
    )  # fmt: skip
    windows, mask = pack_in_parallel(job, workers)
    click.echo(
        f"data: {len(stories):,} story tokens, {len(novels):,} novel tokens, {windows.size:,} dialogue tokens "
        f"({mask.mean():.0%} answers), {len(passages):,} passages, {time.perf_counter() - started:.0f} s"
    )
    return Data(
        ranks,
        torch.from_numpy(np.concatenate([stories, novels]).astype(np.int16)).to(device),
        len(stories),
        torch.from_numpy(starts),
        torch.from_numpy(windows.astype(np.int16)).to(device),
        torch.from_numpy(mask).to(device),
        _held_out(books),
        _corpus_facts(books, documents),
    )


def _ranks(path: Path, documents: dict[bool, list[str]], seed: int) -> dict[bytes, int]:
    if path.exists():
        return load_ranks(path)
    rng = random.Random(seed)
    dialogues = (m["content"] for _ in range(20000) for m in train_dialogue(rng))
    ranks, _ = train_ranks([*documents[True] * 2, *documents[False], *dialogues])
    save_ranks(ranks, path)
    return ranks


def _held_out(books: list[Book]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {"unseen fairy tales": [], "ends of simple prose": [], "ends of novels": []}
    for book in books:
        name = (
            "unseen fairy tales"
            if not book.documents
            else "ends of simple prose"
            if book.is_story
            else "ends of novels"
        )
        groups[name] += book.held_out.split("<|endoftext|>")
    return {name: texts for name, texts in groups.items() if any(texts)}


def _corpus_facts(books: list[Book], documents: dict[bool, list[str]]) -> dict[str, Any]:
    return {
        "books": sum("fairytale" not in book.name for book in books),
        "story_bytes": sum(len(d.encode()) for d in documents[True]) / 1e6,
        "novel_bytes": sum(len(d.encode()) for d in documents[False]) / 1e6,
    }


class Sampler:
    """Draws the batch of a step from the seed and the step number alone."""

    def __init__(self, data: Data, settings: Settings) -> None:
        self.data, self.settings = data, settings
        self.prose_rows = round(settings.batch * settings.prose_share)

    def draw(self, step: int, progress: float) -> tuple[Tensor, Tensor]:
        """Ids [batch, length + 1] and loss weights [batch, length] whose sums are 1 for prose, task_weight for tasks."""
        s, data = self.settings, self.data
        random = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
        story_share = s.final_story_share if progress > 1 - s.decay else s.story_share
        starts = self._prose_starts(random, story_share)[:, None] + torch.arange(s.length + 1)
        rows = torch.randint(len(data.windows), (s.batch - self.prose_rows,), generator=random)
        device = data.prose.device
        prose = data.prose[starts.to(device, non_blocking=True)]
        rows = rows.to(device, non_blocking=True)
        weights = torch.full((s.batch, s.length), 1 / (self.prose_rows * s.length), device=device)
        answers = data.mask[rows][:, 1:].float()
        weights[self.prose_rows :] = answers * (s.task_weight / answers.sum().clamp(min=1))
        return torch.cat((prose, data.windows[rows])).long(), weights

    def _prose_starts(self, random: torch.Generator, story_share: float) -> Tensor:
        """Random offsets; one story window in sixteen begins where a story does, with or without <|endoftext|>."""
        data, count, span = self.data, self.prose_rows, self.settings.length + 1
        u = torch.rand(count, 3, generator=random, dtype=torch.float64)
        story = (u[:, 1] * max(1, data.num_story_tokens - span)).long()
        begin = data.story_starts[(u[:, 1] * len(data.story_starts)).long()] + (u[:, 2] * 32).long() % 2
        story = torch.where(u[:, 2] < 1 / 16, begin.clamp(max=len(data.prose) - span), story)
        novels = len(data.prose) - data.num_story_tokens
        novel = data.num_story_tokens + (u[:, 1] * max(1, novels - span)).long()
        return torch.where(u[:, 0] < story_share, story, novel)


class Trainer:
    """The model, its optimizers and the clock; saves and restores all of it."""

    def __init__(self, config: NetConfig, settings: Settings, data: Data, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.device = settings, device
        self.model = TinyQwen3(config, settings.dropout).to(device)
        matrices = [p for n, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in n]
        norms = [p for p in self.model.parameters() if p.dim() == 1]
        embedding = self.model.model.embed_tokens.weight
        groups = [{"params": [embedding]}, {"params": norms, "weight_decay": 0.0}]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, settings.lr, settings.weight_decay),
            torch.optim.AdamW(
                groups, settings.adam_lr, (0.9, 0.95), weight_decay=settings.weight_decay, fused=device.type == "cuda"
            ),
        ]
        self.sampler = Sampler(data, settings)
        self.step, self.elapsed = 0, 0.0
        self.last_losses = (0.0, 0.0)

    def progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        return max(self.step / self.settings.steps, self.elapsed / (60 * self.settings.minutes))

    def rate(self) -> float:
        """Factor on the learning rates: warm-up, constant, linear decay to zero."""
        progress, s = self.progress(), self.settings
        return max(0.0, min(1.0, progress / s.warmup + 1e-3, (1 - progress) / s.decay))

    def losses(self, forward: nn.Module) -> tuple[Tensor, Tensor]:
        """Forward and backward of one batch; returns the detached mean losses of prose and dialogues."""
        ids, weights = self.sampler.draw(self.step, self.progress())
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            nats = forward(ids[:, :-1], ids[:, 1:]) * weights
        nats.sum().backward()
        rows = self.sampler.prose_rows
        return nats[:rows].sum().detach(), nats[rows:].sum().detach() / self.settings.task_weight

    def update(self) -> None:
        """Clip the gradients and take one optimizer step at the scheduled rate."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        for optimizer, peak in zip(self.optimizers, (self.settings.lr, self.settings.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.rate()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def save(self, path: Path) -> None:
        """Write weights, optimizers, position and random state; the old file stays until the new one is whole."""
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "settings": vars(self.settings),
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote; the settings may differ only in how long to run."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        free = {"steps", "minutes"}
        changed = {k for k, v in state["settings"].items() if k not in free and v != getattr(self.settings, k)}
        if changed:
            raise click.ClickException(f"{path} was made with other values of {sorted(changed)}; repeat them to resume")
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])


@contextmanager
def reporter() -> Iterator[Any]:
    """A function (share done, line): a live progress bar on a terminal, plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield lambda share, line: click.echo(f"{share:4.0%} {line}")
        return
    columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=1.0)
        yield lambda share, line: bar.update(task, completed=share, description=line)


def train(trainer: Trainer, data: Data, checkpoint: Path, log_every: int, save_minutes: float) -> None:
    """Run to the end of the schedule, reporting and saving on the way."""
    settings = trainer.settings
    forward = torch.compile(trainer.model, dynamic=False) if trainer.device.type == "cuda" else trainer.model
    encoding = make_encoding(data.ranks)
    probes = {name: encode_documents(encoding, texts)[0] for name, texts in data.held_out.items()}
    saved = logged = time.perf_counter()
    started = saved - trainer.elapsed
    logged_step = trainer.step
    with reporter() as report:
        while trainer.progress() < 1:
            prose, task = trainer.losses(forward)
            trainer.update()
            trainer.elapsed = time.perf_counter() - started
            if trainer.step % log_every and trainer.progress() < 1:
                continue
            trainer.last_losses = (prose.item(), task.item())
            now = time.perf_counter()
            rate = (trainer.step - logged_step) * settings.batch * settings.length / (now - logged)
            trainer.elapsed, logged, logged_step = now - started, now, trainer.step
            left = trainer.elapsed * (1 / max(trainer.progress(), 1e-6) - 1)
            line = (
                f"step {trainer.step} prose {prose:.3f} dialogues {task:.4f} {rate / 1e6:.2f} Mtok/s ETA {left:.0f} s"
            )
            if trainer.step % (10 * log_every) == 0:
                trainer.model.eval()
                losses = {n: next_token_loss(trainer.model, p, settings.length, 48) for n, p in probes.items()}
                line += " held-out " + " ".join(f"{n}: {loss:.3f}" for n, loss in losses.items())
                trainer.model.train()
                logged = time.perf_counter()
            report(trainer.progress(), line)
            if now - saved > 60 * save_minutes:
                trainer.save(checkpoint)
                saved = now
    trainer.save(checkpoint)


def finish(trainer: Trainer, config: NetConfig, data: Data, out: Path, per_kind: int) -> None:
    """Round, judge and write the model folder."""
    settings, model = trainer.settings, trainer.model
    round_to_bfloat16(model)
    results = judge(model, make_encoding(data.ranks), data.held_out, per_kind, settings.length)
    tokens = trainer.step * settings.batch * settings.length
    run = {
        "params": sum(p.numel() for p in model.parameters()),
        "ranks": NUM_RANKS,
        "specials": len(SPECIAL_TOKENS),
        "command": recipe(click.get_current_context()),
        "tokens": tokens,
        "rate": tokens / trainer.elapsed,
        "minutes": trainer.elapsed / 60,
        "gpu": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "a CPU",
        "torch": torch.__version__,
        "prose_loss": trainer.last_losses[0],
        "task_loss": trainer.last_losses[1],
        "per_kind": per_kind,
    }
    shown = ("seed", "batch", "length", "prose_share", "lr", "weight_decay", "dropout", "decay")
    facts = run | data.facts | {"steps": trainer.step} | {name: getattr(settings, name) for name in shown}
    write_folder(out, model, config, data.ranks, write_card(config, facts, results))
    click.echo(json.dumps({**facts, **results}, indent=1))


def recipe(context: click.Context) -> str:
    """The command that repeats a run: options given by the caller, without paths and machine-bound ones."""
    given = [
        f"{option.opts[0]} {context.params[option.name]}"
        for option in context.command.params
        if context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE and option.name not in NOT_RECIPE
    ]
    return " ".join(["python examples/train_tiny_model.py --corpus corpus.tar.xz --out minivllm/assets/tiny", *given])


@click.command(context_settings={"show_default": True})
@click.option(
    "--corpus", type=click.Path(exists=True, path_type=Path), required=True, help="Folder or tar of .txt books."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model folder to write.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("tiny_work"), help="Checkpoint and tokenizer.")
@click.option("--resume/--no-resume", default=False, help="Continue from the checkpoint in --work, if there is one.")
@click.option("--seed", default=1)
@click.option("--steps", default=5000, help="Length of the schedule in steps.")
@click.option("--minutes", default=600.0, help="Length of the schedule in minutes, if reached before --steps.")
@click.option("--batch", default=128, help="Windows a step.")
@click.option("--length", default=1024, help="Tokens a window.")
@click.option("--lr", default=4e-3, help="Peak rate of Muon.")
@click.option("--adam-lr", default=4e-3, help="Peak rate of AdamW (embedding and norms).")
@click.option("--weight-decay", default=0.5)
@click.option("--dropout", default=0.2)
@click.option("--warmup", default=0.02, help="Share of the schedule.")
@click.option("--decay", default=0.5, help="Share of the schedule.")
@click.option("--prose-share", default=0.6, help="Share of the windows that are prose.")
@click.option("--story-share", default=0.18, help="Share of stories in the prose.")
@click.option("--final-story-share", default=0.25, help="The same while the rate decays.")
@click.option("--task-weight", default=0.5, help="Weight of the dialogues' loss against the prose's.")
@click.option("--dialogue-windows", default=65536, help="Windows of dialogues to make.")
@click.option("--talk-share", default=0.12, help="Share of dialogues without a checkable answer.")
@click.option("--talk-story-share", default=0.06, help="Share of stories in these.")
@click.option("--layers", default=NetConfig.num_hidden_layers)
@click.option("--hidden", default=NetConfig.hidden_size)
@click.option("--intermediate", default=NetConfig.intermediate_size)
@click.option("--workers", default=os.cpu_count() or 1)
@click.option("--log-every", default=50)
@click.option("--save-minutes", default=2.0)
@click.option("--tasks-per-kind", default=100)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
def main(
    corpus: Path, out: Path, work: Path, resume: bool, layers: int, hidden: int, intermediate: int, workers: int,
    log_every: int, save_minutes: float, tasks_per_kind: int, device: str, **options: Any,
) -> None:  # fmt: skip
    """Train the tiny model and write its folder."""
    settings = Settings(**options)
    config = NetConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    data = prepare(corpus, work, settings, workers, torch.device(device))
    trainer = Trainer(config, settings, data, torch.device(device))
    checkpoint = work / "checkpoint.pt"
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
    train(trainer, data, checkpoint, log_every, save_minutes)
    finish(trainer, config, data, out, tasks_per_kind)


if __name__ == "__main__":
    main()
