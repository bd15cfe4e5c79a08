"""The command line, `python -m lwadamw <command>`: one module of this package for each command.

Each module has `add(commands)`, which declares the arguments of its command and the function that runs it.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Final

# Modules of lwadamw.commands, in the order of --help.
COMMANDS: Final = ("demo", "rule", "table", "compare", "transfer", "sweep", "synthetic", "figures", "storage")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 130 after Ctrl-C. argparse exits with 2 on bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m lwadamw", description="AdamW for width scaling.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f".{name}", __package__).add(commands)
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
