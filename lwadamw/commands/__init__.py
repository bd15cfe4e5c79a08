"""The command line, `python -m lwadamw <command>`. Each command is a module of this package.

Each of these modules has a function `add(commands)`. It declares the arguments of the command, and the function that runs
the command.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Final

# Names of the modules, in the order of --help.
COMMANDS: Final = ("demo", "rule", "table", "compare", "transfer", "sweep", "synthetic", "figures", "storage")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name. By default those of this process.

    Returns:
        The exit code of the command, or 130 after Ctrl-C.

    Raises:
        SystemExit: with code 2, for bad arguments; with code 0, after --help.
    """
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
