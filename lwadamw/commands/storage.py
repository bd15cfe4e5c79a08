"""`python -m lwadamw storage`: the ways to store weights and moments, and the cost of each."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "storage",
        help="the storage combinations and the cost of each",
        description="Print the table of storage combinations: arguments of AdamW, bytes of state and bytes moved per "
        "parameter, and when to use each.",
    )
    parser.set_defaults(command=run)


def run(_: argparse.Namespace) -> int:
    """Run the command."""
    from ..state.combinations import table

    print(table())
    return 0
