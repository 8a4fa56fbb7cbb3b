"""`minivllm info`: versions, devices, what was compiled, and which kernel serves each op on each device."""

from __future__ import annotations

import click


@click.command()
def info() -> None:
    """Show what runs here: versions, devices, compiled kernels, and what serves each op."""
    import platform

    import torch
    from rich.console import Console
    from rich.table import Table

    import minivllm
    from minivllm import ops

    build = ops.build_info()
    facts = Table(show_header=False, box=None)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("minivllm", minivllm.__version__)
    facts.add_row("python, torch", f"{platform.python_version()}, {torch.__version__} (CUDA {torch.version.cuda})")
    facts.add_row("CPU threads", str(torch.get_num_threads()))
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        facts.add_row(f"GPU {index}", f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB")
    facts.add_row("kernels", build.kind + (f": {build.reason}" if build.reason else ""))
    if build.library is not None:
        facts.add_row("library", str(build.library))
        for name in ("cxx", "nvcc", "archs", "seconds"):
            facts.add_row(f"built: {name}", str(build.facts[name]))
    serves = Table(title="what serves each op")
    for column in ("op", "CPU", "CUDA"):
        serves.add_column(column)
    for name, devices in ops.served_by().items():
        serves.add_row(name, devices["CPU"], devices["CUDA"])
    console = Console()
    console.print(facts)
    console.print(serves)
