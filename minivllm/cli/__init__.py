"""The command line: one click command a file, imported when it is asked for, so that `--help` is quick.

Errors that a user can cause are one line on stderr and exit code 2, never a traceback.
"""

from __future__ import annotations

import importlib
import sys

import click

from minivllm.errors import MiniVLLMError

# name -> (file in this package, what the command does); the command in the file has the same name.
COMMANDS = {
    "generate": "continue prompts, or answer them with --chat, and stream the text",
    "trace": "draw a recorded run: who ran when, the cache over time, the slowest steps",
    "build": "compile the kernels now instead of at the first use",
    "info": "what runs here: versions, devices, and which kernels serve them",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"minivllm.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="minivllm")
def cli() -> None:
    """minivllm: an LLM inference engine small enough to read in an afternoon.

    Try: python -m minivllm generate "Once upon a time"
    """


def main() -> None:
    """Run the command line and exit."""
    try:
        cli(prog_name="minivllm")
    except MiniVLLMError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
