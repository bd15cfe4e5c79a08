"""`python -m lwadamw storage`: what each way to store weights and moments costs."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "storage",
        help="the storage combinations and what each costs",
        description="Print the table of storage combinations: arguments of AdamW, bytes of state and bytes moved per "
        "parameter, and when to use which.",
    )
    parser.set_defaults(command=run)


def run(_: argparse.Namespace) -> int:
    from ..state.combinations import table

    print(table())
    return 0
