"""`python -m lwadamw transfer`: how well learning rates transferred over width, from a CSV of runs."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .arguments import positive, whole


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "transfer",
        help="how well learning rates transferred over width, from a CSV of runs",
        description="Of every arm: the best learning rate at each width, how it drifts with width, and what the proxy's "
        "best learning rate costs at the others.",
        epilog="The CSV may be anybody's: columns arm (or rule), width, lr, loss (or val_loss, validation_loss), and "
        "where there are any weight_decay (or wd), seed and status; lr and weight decay as base values. A run whose "
        "loss is empty, nan or inf, or whose status is diverged, has diverged.",
    )
    option = parser.add_argument
    option("runs", type=Path, metavar="runs.csv", help="one run per line, with a header")
    option("--proxy", type=whole, metavar="W", help="width the learning rate is tuned at (default: the smallest)")
    option("--lr", type=positive, metavar="X", help="what to give the regret of (default: the proxy's best)")
    option(
        "--noise",
        type=positive,
        default=0.01,
        metavar="X",
        help="standard deviation of a run's loss, for arms without two seeds (default: %(default)s)",
    )
    option("--loss", metavar="COLUMN", help="column of the losses")
    option("--plot", type=Path, metavar="OUT", help="draw loss against learning rate, to a .png or .svg")
    option("--json", type=Path, metavar="OUT", help="write the numbers")
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from ..lab import outcomes, plots, plots_runs, transfer, transfer_table

    if args.plot is not None and args.plot.suffix.lower() not in plots.KINDS:
        parser.error(f"argument --plot: {str(args.plot)!r} ends in none of {', '.join(plots.KINDS)}.")
    try:
        found = outcomes.read(args.runs, args.loss)
        result = transfer.analyse(found.rows, proxy=args.proxy, lr=args.lr, noise=args.noise)
        print(transfer_table.table(result, found))
        if args.json is not None:
            args.json.write_text(json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n")
        if args.plot is not None:
            plots.save(plots_runs.transfer(found), args.plot)
            print(f"figure: {args.plot}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RuntimeError as error:  # no matplotlib: the table is there all the same
        print(error)
    return 0
