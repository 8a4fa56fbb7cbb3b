"""Makes tables of what `pytest bench/ops --benchmark-only -k cuda --benchmark-json=OPS.json` measured on a GPU.

    python bench/kernel_table.py OPS.json ... [--json TABLE.json] [--readme README.md]

Every kernel at every shape: its time, its rate and the share of what the GPU can do, each peer in the same run, the
ratio to the best of them, and the goal. --readme puts one line an op between the two marks in that file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

OURS = "minivllm"
MARKS = ("<!-- kernel speeds: bench/kernel_table.py -->", "<!-- end of kernel speeds -->")

# op, beginning of the shape -> "number unit", a time at most or a rate at least (bfloat16 on an H200).
GOALS = {
    ("rms_norm", "rows 64, hidden 1024"): "1.5 us",
    ("rms_norm", "rows 64, hidden 4096"): "1.5 us",
    ("rms_norm", "rows 16384, hidden 1024"): "3600 GB/s",
    ("rms_norm", "rows 8192, hidden 4096"): "4000 GB/s",
    ("fused_add_rms_norm", "rows 64, hidden 1024"): "1.6 us",
    ("fused_add_rms_norm", "rows 64, hidden 4096"): "1.6 us",
    ("fused_add_rms_norm", "rows 16384, hidden 1024"): "4000 GB/s",
    ("fused_add_rms_norm", "rows 8192, hidden 4096"): "4150 GB/s",
    ("silu_and_mul", "rows 64, width 3072"): "1.3 us",
    ("silu_and_mul", "rows 64, width 12288"): "3.5 us",
    ("silu_and_mul", "rows 16384"): "4150 GB/s",
    ("silu_and_mul", "rows 8192"): "4150 GB/s",
    **{(op, f"rows {rows},"): "3900 GB/s" for op in ("apply_rope", "qk_norm_rope_store") for rows in (16384, 8192)},
    **{(op, "rows 64,"): "1.8 us" for op in ("apply_rope", "qk_norm_rope_store")},
    **{
        ("flash_attention", f"batch {16384 // tokens}, tokens {tokens},"): f"{goal} TFLOP/s"
        for tokens, goal in ((512, 250), (1024, 300), (2048, 330), (4096, 350), (8192, 365), (16384, 370))
    },
    ("paged_attention", "rows 1, context 1024,"): "7 us",
    ("paged_attention", "rows 1, context 8192,"): "13 us",
    ("paged_attention", "rows 1, context 65536,"): "68 us",
    ("paged_attention", "rows 16, context 1024,"): "20 us",
    ("paged_attention", "rows 16, context 8192,"): "4200 GB/s",
    ("paged_attention", "rows 64, context 1024,"): "66 us",
    ("paged_attention", "rows 64, context 8192,"): "4450 GB/s",
    ("paged_attention", "rows 256, context 1024,"): "4300 GB/s",
    ("paged_attention", "rows 256, context 4096,"): "4500 GB/s",
    **{
        ("sample", f"rows {rows}, vocab 151936, filter {name}"): f"{us} us"
        for name, goals in {
            "top_k_50_top_p_0.9": (25, 60, 150),
            "temperature": (10, 20, 50),
            "greedy": (10, 20, 50),
        }.items()
        for rows, us in zip((1, 64, 256), goals, strict=True)
    },
}


@dataclass
class Row:
    """One op at one shape and dtype."""

    op: str
    dtype: str
    shape: str
    us: float | None  # ours; None where only peers ran
    rate: float  # in `unit`; 0 where nothing is counted
    unit: str
    percent_of_limit: float
    limit: str
    peers: dict[str, float]  # way -> us
    goal: str = ""
    met: bool | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer; another way of ours is none."""
        times = [us for way, us in self.peers.items() if not way.startswith(OURS)]
        return min(times) / self.us if times and self.us else None


def goal_of(op: str, shape: str) -> str:
    return next((goal for (name, start), goal in GOALS.items() if name == op and shape.startswith(start)), "")


def is_met(row: Row) -> bool | None:
    """Whether the goal is reached; None without a goal or a time."""
    if not row.goal or row.us is None:
        return None
    number, unit = row.goal.split()
    return row.us <= float(number) if unit == "us" else row.rate >= float(number)


def rows_of(benchmarks: list[dict[str, Any]]) -> list[Row]:
    rows: dict[tuple[str, str, str], Row] = {}
    for notes in (benchmark["extra_info"] for benchmark in benchmarks):
        if notes.get("device") != "cuda":
            continue
        key = notes["op"], notes["dtype"], notes["shape"]
        row = rows.setdefault(key, Row(*key, None, 0, "", 0, "", {}, goal_of(notes["op"], notes["shape"])))
        if notes["way"] != OURS:
            row.peers[notes["way"]] = notes["us"]
            continue
        row.us, row.percent_of_limit = notes["us"], notes.get("% of limit", 0)
        row.limit = notes.get("limit", "")
        if "GFLOP/s" in notes:
            row.rate, row.unit = notes["GFLOP/s"] / 1000, "TFLOP/s"
        elif "GB/s" in notes:
            row.rate, row.unit = notes["GB/s"], "GB/s"
    for row in rows.values():
        row.met = is_met(row)
    return list(rows.values())


def number(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def markdown(rows: list[Row]) -> str:
    lines = []
    for op in dict.fromkeys(row.op for row in rows):
        lines += [f"\n**{op}**\n", "| shape | us | rate | of limit | peers, us | x best | goal | |", "|---" * 8 + "|"]
        for row in (row for row in rows if row.op == op):
            peers = " · ".join(f"{way} {number(us)}" for way, us in sorted(row.peers.items(), key=lambda pair: pair[1]))
            name = row.shape if row.dtype == "bfloat16" else f"{row.shape}, {row.dtype}"
            verdict = {True: "met", False: "**missed**", None: ""}[row.met]
            if row.us is None:
                cells = [name, "-", "-", "-", peers, "-", row.goal, ""]
            else:
                rate = f"{number(row.rate)} {row.unit}" if row.unit else "-"
                share = f"{row.percent_of_limit:.0f} % {row.limit}" if row.limit else "-"
                cells = [
                    name,
                    number(row.us),
                    rate,
                    share,
                    peers,
                    f"{row.ratio:.2f}" if row.ratio else "-",
                    row.goal,
                    verdict,
                ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    low, high = min(ratios), max(ratios)
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} - {high:.1f}"


def summary(rows: list[Row], limits: dict[str, float]) -> str:
    """One line an op: the call that did the most, and the ratios to PyTorch and FlashInfer over all shapes."""
    lines = ["| op | largest call measured | us | rate | of limit | x PyTorch | x FlashInfer |", "|---" * 7 + "|"]
    timed = [row for row in rows if row.us is not None]
    for op in sorted({row.op for row in timed}):
        mine = [row for row in timed if row.op == op]
        largest = max(mine, key=lambda row: (row.us * row.rate, row.us))
        ratios = {
            peer: [
                min(times) / row.us
                for row in mine
                if (times := [us for way, us in row.peers.items() if way.startswith(peer)])
            ]
            for peer in ("torch", "flashinfer")
        }
        rate = f"{number(largest.rate)} {largest.unit}" if largest.unit else "-"
        share = f"{largest.percent_of_limit:.0f} %" if largest.limit else "-"
        name = largest.shape if largest.dtype == "bfloat16" else f"{largest.shape}, {largest.dtype}"
        cells = [
            f"`{op}`",
            name,
            number(largest.us),
            rate,
            share,
            spread(ratios["torch"]),
            spread(ratios["flashinfer"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if limits:
        read, copied, flops, bus = (limits[name] for name in ("read", "copy", "matmul", "bus"))
        lines.append(
            f"\nLimits of that GPU in the same run: {read / 1000:.2f} TB/s read, {copied / 1000:.2f} TB/s copied, "
            f"{flops / 1000:.0f} TFLOP/s in bfloat16, {bus:.0f} GB/s over the bus."
        )
    return "\n".join(lines)


def put_between_marks(file: Path, text: str) -> None:
    """Replaces what lies between the two marks of the file.

    Raises:
        click.ClickException: the file lacks them.
    """
    whole = file.read_text(encoding="utf-8")
    begin, end = (whole.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        raise click.ClickException(f"{file} lacks the marks {MARKS[0]} and {MARKS[1]}")
    file.write_text(f"{whole[: begin + len(MARKS[0])]}\n{text}\n{whole[end:]}", encoding="utf-8")


@click.command()
@click.argument("ops_json", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--json", "table_json", type=click.Path(path_type=Path), help="Also write the rows here.")
@click.option("--readme", type=click.Path(exists=True, path_type=Path), help="Put the summary between its marks.")
def main(ops_json: tuple[Path, ...], table_json: Path | None, readme: Path | None) -> None:
    """Print the table in Markdown; several files of one session of a machine make one table."""
    benchmarks = [one for file in ops_json for one in json.loads(file.read_text(encoding="utf-8"))["benchmarks"]]
    rows = rows_of(benchmarks)
    limits = next((b["extra_info"]["limits"] for b in benchmarks if "limits" in b["extra_info"]), {})
    click.echo(markdown(rows))
    click.echo("\n" + summary(rows, limits))
    judged = [row for row in rows if row.met is not None]
    click.echo(f"\n{sum(bool(row.met) for row in judged)} of {len(judged)} goals met")
    if table_json:
        text = json.dumps({"limits": limits, "rows": [asdict(row) for row in rows]}, indent=1)
        table_json.write_text(text, encoding="utf-8")
    if readme:
        put_between_marks(readme, summary(rows, limits))


if __name__ == "__main__":
    main()
