"""`python -m lwadamw scaling`: the laboratory's runs of width with depth, and of batch size with horizon."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from .arguments import add_trackers, check_trackers, device, output_file, refuse, whole, write_trackers

DEPTH: Final = "depth.csv"
HORIZON: Final = "horizon.csv"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "scaling",
        help="make the laboratory's runs of width with depth, and of batch size with horizon",
        description="Train the laboratory's model at several depths, with and without depth exponents, and at several "
        f"batch sizes and lengths of the run under several weight decays. The runs are appended to {DEPTH} and {HORIZON} in a "
        "folder. The command may be killed at any moment; the same command then does the runs that are missing.",
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path(), metavar="FOLDER", help="folder of the files (default: this one)")
    option("--only", choices=("depth", "horizon"), help="make the runs of one file only")
    option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)")
    option("--jobs", type=whole, metavar="N", help="runs at once (default: one per core; on a GPU as many as fit)")
    add_trackers(parser)
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2, before the first run."""
    from ..lab.scaling import deep_runs, horizon_runs
    from ..lab.study import RESULT, train
    from ..lab.sweep import output, sweep

    failed = 0
    studies: dict[str, tuple[str, Callable[[], Sequence[Any]]]] = {
        "horizon": (HORIZON, horizon_runs),
        "depth": (DEPTH, deep_runs),
    }
    chosen = [studies[args.only]] if args.only else list(studies.values())
    for name, _ in chosen:
        output_file(parser, "--out", args.out / name)
    check_trackers(parser, args)
    place = device(parser, args.device)
    for name, runs in chosen:
        try:
            failures = sweep(runs(), train, RESULT, args.out / name, place, jobs=args.jobs, **output())
            write_trackers(args, args.out / name)
        except (ValueError, OSError) as error:
            refuse(parser, error, "argument --out: ")
        if failures:
            print(f"{len(failures)} runs failed and are not in {args.out / name}.", file=sys.stderr)
        failed += len(failures)
    return 1 if failed else 0
