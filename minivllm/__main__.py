"""`python -m minivllm`."""

from __future__ import annotations

from minivllm.cli import main

main()
