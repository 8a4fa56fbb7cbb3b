"""`minivllm trace`: draw a recorded run in the terminal."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(epilog="The same file opens in https://ui.perfetto.dev, where every event can be looked at.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--rows", type=click.IntRange(min=0), default=24, show_default=True, help="Most requests to show.")
@click.option(
    "--sort",
    type=click.Choice(["arrival", "duration"]),
    default="arrival",
    show_default=True,
    help="Which requests to show first: the first to come, or the longest.",
)
@click.option("--width", type=click.IntRange(40, 1000), help="Columns to draw on.  [default: the terminal's]")
def trace(file: Path, rows: int, sort: str, width: int | None) -> None:
    """Draw FILE, which EngineConfig.trace wrote: who ran when, cache use over time, the slowest steps.

    A cell of a request's row tells what took most of its time; being preempted comes before computing, and that before
    being queued. A column of the other charts is a mean over its time.
    """
    import io
    import sys

    from rich.console import Console

    from minivllm.trace_frame import ASCII, UNICODE
    from minivllm.trace_reader import read_trace
    from minivllm.trace_view import draw

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show
    console = Console(width=width, highlight=False)
    marks = UNICODE if console.encoding.startswith("utf") else ASCII
    for picture in draw(read_trace(file), rows=rows, sort=sort, width=console.width, marks=marks):
        console.print(picture)
