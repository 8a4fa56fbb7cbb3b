"""Train the bundled tiny model from scratch: one command from books to a complete model folder.

The schedule follows progress, the larger of steps done and time spent, so that a run given `--minutes` always ends
with its learning rate at zero. Every batch is drawn from the seed and the step alone; a resumed run draws the same.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor, nn

# The tasks are shared with the evaluation in bench/.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from tiny_model.batches import Data, Sampler, Settings, prepare
from tiny_model.card import write_card
from tiny_model.data import encode_documents, make_encoding
from tiny_model.export import judge, next_token_loss, round_to_bfloat16, write_folder
from tiny_model.net import Muon, NetConfig, TinyQwen3

RECORD = "training.json"
NOT_RECIPE = {
    "corpus",
    "out",
    "work",
    "resume",
    "init",
    "workers",
    "log_every",
    "save_minutes",
    "tasks_per_kind",
    "device",
}


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


def finish(
    trainer: Trainer, config: NetConfig, data: Data, out: Path, per_kind: int, earlier: list[dict[str, Any]]
) -> None:
    """Round, judge and write the model folder; `earlier` holds the facts of the runs that this one went on from."""
    settings, model = trainer.settings, trainer.model
    round_to_bfloat16(model)
    results = {"per_kind": per_kind} | judge(model, make_encoding(data.ranks), data.held_out, per_kind, settings.length)
    tokens = trainer.step * settings.batch * settings.length
    run = {
        "command": recipe(click.get_current_context()),
        "tokens": tokens,
        "rate": tokens / trainer.elapsed,
        "minutes": trainer.elapsed / 60,
        "gpu": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "a CPU",
        "torch": torch.__version__,
        "prose_loss": trainer.last_losses[0],
        "task_loss": trainer.last_losses[1],
    }
    shown = ("seed", "batch", "length", "prose_share", "lr", "weight_decay", "dropout", "decay")
    stages = [*earlier, run | {"steps": trainer.step} | {name: getattr(settings, name) for name in shown}]
    record = {"corpus": data.facts, "stages": stages, "results": results}
    write_folder(out, model, config, data.ranks, write_card(config, record))
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    click.echo(json.dumps(record, indent=1))


def recipe(context: click.Context) -> str:
    """The command that repeats a run: options given by the caller, without paths and machine-bound ones."""
    given = [
        f"{option.opts[0]} {context.params[option.name]}"
        for option in context.command.params
        if context.get_parameter_source(option.name) == ParameterSource.COMMANDLINE and option.name not in NOT_RECIPE
    ]
    if context.params["init"]:
        given.insert(0, "--init EARLIER")
    return " ".join(["python examples/train_tiny_model.py --corpus corpus.tar.xz --out minivllm/assets/tiny", *given])


@click.command(context_settings={"show_default": True})
@click.option(
    "--corpus", type=click.Path(exists=True, path_type=Path), required=True, help="Folder or tar of .txt books."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model folder to write.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("tiny_work"), help="Checkpoint and tokenizer.")
@click.option("--resume/--no-resume", default=False, help="Continue from the checkpoint in --work, if there is one.")
@click.option("--init", type=click.Path(exists=True, path_type=Path), help="Model folder made here to go on from.")
@click.option("--seed", default=1)
@click.option("--steps", default=4700, help="Length of the schedule in steps.")
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
@click.option("--dialogue-windows", default=40000, help="Windows of dialogues to make.")
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
    corpus: Path, out: Path, work: Path, resume: bool, init: Path | None, layers: int, hidden: int,
    intermediate: int, workers: int, log_every: int, save_minutes: float, tasks_per_kind: int, device: str,
    **options: Any,
) -> None:  # fmt: skip
    """Train the tiny model and write its folder."""
    settings = Settings(**options)
    config = NetConfig(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=intermediate)
    work.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")
    if init:
        shutil.copy(init / "tokenizer.tiktoken", work)
    data = prepare(corpus, work, settings, workers, torch.device(device))
    trainer = Trainer(config, settings, data, torch.device(device))
    earlier: list[dict[str, Any]] = []
    if init:
        trainer.model.load_state_dict(load_file(init / "model.safetensors"))
        earlier = json.loads((init / RECORD).read_text("utf-8"))["stages"]
    checkpoint = work / "checkpoint.pt"
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
    train(trainer, data, checkpoint, log_every, save_minutes)
    finish(trainer, config, data, out, tasks_per_kind, earlier)


if __name__ == "__main__":
    main()
