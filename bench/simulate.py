"""Serve a trace or synthetic load in virtual time: the real scheduler, block pool and radix tree, with a fake runner.

    python bench/simulate.py --requests 10000 --rate 20 --shared-prefix 512 --groups 10
    python bench/simulate.py --trace AzureLLMInferenceTrace_conv.csv --speed-up 4 --cost qwen3-8b-h200
    python bench/simulate.py --trace mooncake.jsonl --variant plain: --variant small:num_blocks=4000 --plot out.png
    python bench/simulate.py --requests 2000 --priorities 3 --compare fcfs,priority
    python bench/simulate.py --fit run.json --requests 500

A step takes what a cost model says: --cost names a preset (Qwen3 on one H200, from its bandwidth and arithmetic) or
gives seconds for the terms, such as "fixed=1e-3,row=2e-6,token=4e-6,kv=3e-8,pair=4e-10"; --fit finds them in a run that
an engine recorded (`EngineConfig.trace`). What Python costs counts in virtual time only as --scheduler-us.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from simulation import report
from simulation.cost import PRESETS, CostModel, parse_cost
from simulation.fit import fit_file
from simulation.loop import Simulation
from simulation.result import Result
from simulation.settings import FIELDS, Settings, parse_variant
from simulation.traces import read_trace
from simulation.workload import Synthetic, Workload, parse_lengths

from minivllm.errors import ConfigError, MiniVLLMError

console = Console()
_INPUT = click.Path(path_type=Path, dir_okay=False, exists=True)
_OUTPUT = click.Path(path_type=Path, dir_okay=False, writable=True)
_DEFAULT = Settings()
_REQUESTS = 1000  # where neither a trace nor a number is given
_PLAIN = ("rate", "shared_prefix", "groups", "turns", "think", "priorities", "seed")  # fields of Synthetic
_SYNTHETIC_ONLY = {"requests", "prompt_tokens", "answer_tokens", *_PLAIN}
_TRACE_ONLY = {"limit", "hash_block_tokens"}

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


def together(*options: Decorator) -> Decorator:
    """Several click options as one decorator, shown in this order."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


workload_options = together(
    click.option("--trace", type=_INPUT, help="Azure .csv, or Mooncake .jsonl."),
    click.option("--limit", type=int, help="Take only the first requests of the trace."),
    click.option("--hash-block-tokens", default=512, show_default=True, help="Tokens that a hash_id stands for."),
    click.option("--requests", type=click.IntRange(min=1),
                 help=f"Synthetic load of so many.  [default: {_REQUESTS}, without a trace]"),
    click.option("--rate", type=float, help="Chats a second, as a Poisson process.  [default: all at once]"),
    click.option("--prompt-tokens", default="uniform:100:1024", show_default=True,
                 help="N, uniform:LOW:HIGH, exponential:MEAN or lognormal:MEDIAN:SIGMA."),
    click.option("--answer-tokens", default="uniform:100:1024", show_default=True, help="The same."),
    click.option("--shared-prefix", default=0, show_default=True, help="Tokens that open every chat ..."),
    click.option("--groups", default=1, show_default=True, help="... one of so many openings, in turn."),
    click.option("--turns", default=1, show_default=True, help="Requests a chat; each holds all that was said before."),
    click.option("--think", default=5.0, show_default=True, help="Mean seconds from an answer to the next turn."),
    click.option("--priorities", default=1, show_default=True, help="Synthetic chats get one of so many at random."),
    click.option("--seed", default=0, show_default=True),
)  # fmt: skip
settings_options = together(
    click.option("--policy", default=_DEFAULT.policy, show_default=True, help="fcfs or priority (lower first)."),
    click.option("--prefix-aware/--no-prefix-aware", default=True, show_default=True),
    click.option("--prefix-caching/--no-prefix-caching", default=True, show_default=True),
    click.option("--num-blocks", default=_DEFAULT.num_blocks, show_default=True),
    click.option("--block-size", default=_DEFAULT.block_size, show_default=True),
    click.option("--max-num-seqs", default=_DEFAULT.max_num_seqs, show_default=True),
    click.option("--max-num-batched-tokens", default=_DEFAULT.max_num_batched_tokens, show_default=True),
    click.option("--max-model-len", default=_DEFAULT.max_model_len, show_default=True),
    click.option("--max-num-waiting", type=int, help="Bound of the queue; what comes beyond is refused."),
    click.option("--max-tokens", type=int, help="All ask for it and end earlier, unforeseen.  [default: the answer's]"),
    click.option("--depth", default=_DEFAULT.depth, show_default=True, help="Steps out at once; 2 overlap."),
    click.option("--scheduler-us", default=_DEFAULT.scheduler_us, show_default=True, help="Host time charged a step."),
    click.option("--speed-up", default=_DEFAULT.speed_up, show_default=True, help="Arrival times are divided by it."),
    click.option("--concurrency", type=int, help="Most requests in the system; later ones come when one ends."),
    click.option("--timeout-s", type=float, help="Each request's deadline."),
    click.option("--cost", help=f"{' or '.join(PRESETS)} (of which the first is the default), or coefficients."),
)  # fmt: skip
run_options = together(
    click.option("--fit", type=_INPUT, help="Take the cost from this recorded run; alone, only print it."),
    click.option("--compare", help="Run each of these policies: fcfs,priority"),
    click.option("--variant", "variants", multiple=True, help="NAME:FIELD=VALUE,... Fields are the options above."),
    click.option("--check-every", type=click.IntRange(min=0), default=1000, show_default=True,
                 help="Steps between audits; 0: only at the end."),
    click.option("--record", type=_OUTPUT, help="Also write the run as a Chrome trace (`python -m minivllm trace`)."),
    click.option("--json", "json_file", type=_OUTPUT, help="Also write all figures here."),
    click.option("--plot", "plot_file", type=_OUTPUT, help="Draw the runs; needs matplotlib."),
)  # fmt: skip


def make_workload(options: dict[str, Any], given: set[str]) -> Workload:
    """The trace, or synthetic load; raises ConfigError, also for options `given` for the other of the two."""
    if options["trace"] is not None:
        refuse(given & _SYNTHETIC_ONLY, "is for synthetic load; a trace says what comes when")
        return read_trace(options["trace"], limit=options["limit"], hash_block_tokens=options["hash_block_tokens"])
    refuse(given & _TRACE_ONLY, "is for a trace")
    return Synthetic(
        total=options["requests"] or _REQUESTS,
        prompt=parse_lengths("prompt_tokens", options["prompt_tokens"]),
        answer=parse_lengths("answer_tokens", options["answer_tokens"]),
        **{name: options[name] for name in _PLAIN},
    )


def refuse(names: set[str], why: str) -> None:
    """Raise ConfigError for the first of these options, if there is one."""
    for name in sorted(names):
        raise ConfigError(f"--{name.replace('_', '-')} {why}")


def make_variants(options: dict[str, Any], base: Settings) -> list[tuple[str, Settings]]:
    """(name, settings) of each run."""
    variants = [parse_variant(text, base) for text in options["variants"]]
    policies = options["compare"].split(",") if options["compare"] else []
    variants += [(policy, dataclasses.replace(base, policy=policy)) for policy in policies]
    if options["record"] and len(variants) > 1:
        raise ConfigError("--record writes one run; give no --compare and at most one --variant")
    return variants or [(base.policy, base)]


def simulate(
    variants: list[tuple[str, Settings]], workload: Workload, check_every: int, record: Path | None
) -> list[Result]:
    """Run all variants, one after the other, under a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name, settings in variants:
            task = progress.add_task(name, total=workload.total)

            def on_end(ended: int, task: Any = task) -> None:
                progress.update(task, completed=ended)

            run = Simulation(name, settings, workload, check_every=check_every, on_end=on_end, record=record)
            results.append(run.run())
    return results


def check_outputs(*files: Path | None) -> None:
    """Raise ConfigError now for a file that could not be written after the run."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}")


@click.command()
@workload_options
@settings_options
@run_options
@click.pass_context
def main(context: click.Context, /, **options: Any) -> None:
    """Simulate the scheduler and its cache on a workload, and report latencies, throughput and cache use."""
    given = {name for name in options if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    try:
        check_outputs(options["json_file"], options["plot_file"], options["record"])
        save = _plotter() if options["plot_file"] else None
        cost = choose_cost(options)
        if options["fit"] and not given & {"trace", "requests"}:
            return
        base = Settings(**{name: options[name] for name in FIELDS if name != "cost"}, cost=cost)
        variants = make_variants(options, base)
        workload = make_workload(options, given)
        results = simulate(variants, workload, options["check_every"], options["record"])
    except MiniVLLMError as error:
        raise click.ClickException(str(error)) from None
    console.print(report.table(results))
    if options["json_file"]:
        options["json_file"].write_text(json.dumps(report.as_json(results), indent=1) + "\n", encoding="utf-8")
    if save:
        save(results, options["plot_file"])


def choose_cost(options: dict[str, Any]) -> CostModel:
    """The cost that was named, or that of a recorded run, which is printed."""
    if not options["fit"]:
        return _DEFAULT.cost if options["cost"] is None else parse_cost(options["cost"])
    if options["cost"] is not None:
        raise ConfigError("--fit finds the cost; leave --cost out")
    fitted = fit_file(options["fit"])
    console.print(fitted.table())
    console.print(fitted.options, soft_wrap=True)
    return fitted.cost


def _plotter() -> Callable[[list[Result], Path], None]:
    try:
        from simulation.plot import save  # matplotlib is an optional extra
    except ModuleNotFoundError as error:
        raise ConfigError(f"--plot needs {error.name}; pip install '.[bench]'") from None
    return save


if __name__ == "__main__":
    main()
