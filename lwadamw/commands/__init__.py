"""The command line, `python -m lwadamw <command>`. Each command is a module of this package.

Each of these modules has a function `add(commands)`. It declares the arguments of the command, and the function that runs
the command. Nothing that takes long to import is imported before a command runs, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final

# Names of the modules, in the order of --help.
COMMANDS: Final = (
    "demo",
    "rule",
    "scaling",
    "table",
    "compare",
    "check",
    "transfer",
    "sweep",
    "synthetic",
    "figures",
    "storage",
)
INTERRUPTED: Final = 130  # what a shell reports of a program that Ctrl-C ended
UNREAD: Final = 141  # what a shell reports of a program that wrote into a pipe that nobody reads any more


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments after the program's name. By default those of this process.

    Returns:
        The exit code of the command; 130 after Ctrl-C; 141 if whoever read the output has gone, as `head` does.

    Raises:
        SystemExit: with code 2, for bad arguments; with code 0, after --help.
    """
    try:
        try:
            return _run(argv)
        finally:
            # Otherwise Python flushes after the last except clause, and complains about a closed pipe.
            sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lwadamw", description="AdamW for width scaling.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name in COMMANDS:
        importlib.import_module(f".{name}", __package__).add(commands)
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    return command(args)
