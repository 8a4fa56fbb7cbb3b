"""`minivllm build`: compile the kernels now, so that the first import of `minivllm.ops` only loads them."""

from __future__ import annotations

import sys

import click


@click.command()
@click.option("--verbose", is_flag=True, help="Show the compilers' commands and output.")
@click.option("--force", is_flag=True, help="Compile again even if the cache has the library.")
def build(verbose: bool, force: bool) -> None:
    """Compile the kernels for this machine's CPU and GPUs (MINIVLLM_CUDA_ARCHS=9.0a;8.6 names other GPUs)."""
    import os

    # The import below must not build by itself, without our options; it would find the library afterwards anyway.
    os.environ["MINIVLLM_OPS"] = "reference"
    from minivllm.ops import BuildError
    from minivllm.ops._load import compile_target, default_target

    try:
        library = compile_target(default_target(), verbose=verbose, force=force)
    except BuildError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(library)
