"""`python -m lwadamw transfer`: how well learning rates transferred over width, from a CSV file of runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .arguments import output_file, positive, refuse, whole

NOISE = 0.01  # The default of --noise.


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "transfer",
        help="how well learning rates transferred over width, from a CSV file of runs",
        description="Print for every arm: the best learning rate at each width, how it drifts with width, and how much loss "
        "the proxy's best learning rate costs at the other widths. With --next, also print which learning rate to run next.",
        epilog="The file may come from any program or tracker: a header and one run per line, with commas, semicolons or tabs "
        "between the cells. It needs the columns width (or d_model, n_embd, hidden_size), lr (or learning_rate) and loss (or "
        "val_loss, val/loss, eval/loss). The columns arm (or rule), weight_decay (or wd), seed and status (or state) are "
        "optional. Names with a path in front, like config.optimizer.lr, are found too; --column names others. lr and weight "
        "decay are base values. A run has diverged if its loss is empty, nan or inf, or if its status is diverged. A run that "
        "crashed or still runs is left out.",
    )
    option = parser.add_argument
    option("runs", type=Path, metavar="runs.csv", help="a file with a header and one run per line")
    option("--proxy", type=whole, metavar="W", help="width at which the lr is tuned (default: the smallest width)")
    option("--lr", type=positive, metavar="X", help="lr whose regret is printed (default: the proxy's best lr)")
    option(
        "--noise",
        type=positive,
        default=NOISE,
        metavar="X",
        help="standard deviation of the loss of one run, for arms without two seeds (default: %(default)s)",
    )
    option("--loss", metavar="COLUMN", help="name of the column with the losses")
    option(
        "--column",
        action="append",
        default=[],
        metavar="KIND=NAME",
        help="name of the column for arm, width, lr, weight_decay, seed, loss or status; an arm may be several columns, like "
        "arm=tokens,batch; width=256 is the width of all runs. May be given several times",
    )
    option(
        "--over",
        metavar="COLUMN",
        help="of the runs that differ in this column alone, use the one with the lowest loss",
    )
    option(
        "--effective-decay",
        action="store_true",
        help="weight decays are effective values (scaled by the width, or products lr·wd): turn them into base values",
    )
    option(
        "--effective-lr",
        action="store_true",
        help="learning rates are effective values, scaled by the width: turn them into base values",
    )
    option(
        "--against",
        choices=("lr", "relative-update"),
        default="lr",
        help="read the runs against the lr, or against the relative update |dW|/|W| that lr, weight decay and the rule that an "
        "arm is named after give a matrix in the steady state (default: %(default)s)",
    )
    option(
        "--beta1", type=float, default=0.9, metavar="X", help="beta1 of the runs, for --against (default: %(default)s)"
    )
    option("--next", action="store_true", help="say which learning rate to run next at every width, and along a ridge")
    option("--plot", type=Path, metavar="OUT", help="draw loss against learning rate into a .svg, .png or .pdf file")
    option("--json", type=Path, metavar="OUT", help="write the numbers into a file")
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    if args.next and args.against != "lr":
        parser.error("argument --next: it says learning rates, and --against relative-update has none. Leave one out.")
    check_plot(parser, args.plot)
    output_file(parser, "--json", args.json)
    try:
        report(
            args.runs,
            args.plot,
            args.json,
            loss=args.loss,
            proxy=args.proxy,
            lr=args.lr,
            noise=args.noise,
            columns=_columns(parser, args.column),
            over=args.over,
            effective_decay=args.effective_decay,
            effective_lr=args.effective_lr,
            plan=args.next,
            beta1=args.beta1 if args.against == "relative-update" else None,
        )
    except (ValueError, OSError) as error:
        refuse(parser, error)
    return 0


def _columns(parser: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, str]:
    """Return the columns of --column by kind."""
    from ..lab.transfer_columns import ALIASES

    found = {}
    for text in given:
        kind, equals, name = text.partition("=")
        if kind not in ALIASES or not (equals and name.strip()):
            parser.error(
                f"argument --column: {text!r} is not KIND=NAME with a kind among {', '.join(ALIASES)}. Write, for instance, "
                "--column width=n_embd."
            )
        found[kind] = name
    return found


def check_plot(parser: argparse.ArgumentParser, path: Path | None) -> None:
    """End the program with exit code 2 if no figure can be written into the file of --plot."""
    from ..lab.plots import KINDS

    output_file(parser, "--plot", path)
    if path is not None and path.suffix.lower() not in KINDS:
        parser.error(
            f"argument --plot: {str(path)!r} ends in none of {', '.join(KINDS)}. Give a path that ends in one of them."
        )


def report(
    runs: Path,
    plot: Path | None = None,
    numbers: Path | None = None,
    *,
    loss: str | None = None,
    proxy: int | None = None,
    lr: float | None = None,
    noise: float = NOISE,
    columns: Mapping[str, str] | None = None,
    over: str | None = None,
    effective_decay: bool = False,
    effective_lr: bool = False,
    plan: bool = False,
    beta1: float | None = None,
) -> None:
    """Analyse a file of runs, print the tables, and write the figure and the numbers.

    Without matplotlib there is no figure, and a line says how to install it.

    Args:
        runs: path of the CSV file.
        plot: path of the figure, if there is to be one.
        numbers: path of the JSON file, if there is to be one.
        loss: name of the column with the losses; see `outcomes.read`.
        proxy: width of the proxy; see `transfer.analyse`.
        lr: learning rate of the regrets; see `transfer.analyse`.
        noise: standard deviation of the loss of one run; see `transfer.analyse`.
        columns: names of columns by kind; see `outcomes.read`.
        over: name of a column over which the lowest loss counts; see `outcomes.read`.
        effective_decay: whether the weight decays are effective values; see `transfer_decay.to_base`.
        effective_lr: whether the learning rates are effective values; see `transfer_lr.to_base`.
        plan: whether to say what to run next.
        beta1: read the runs against the relative update, with this beta1; see `transfer_relative`. None: against the lr.

    Raises:
        ValueError: the file or an argument is not as it has to be.
        OSError: a file cannot be written.
    """
    from ..lab import (
        outcomes,
        plots,
        plots_runs,
        transfer,
        transfer_decay,
        transfer_lr,
        transfer_relative,
        transfer_table,
    )

    found = outcomes.read(runs, loss, columns, over)
    base = proxy or min(row.width for row in found.rows)
    # Products are those of the learning rates that the table has, so the decays come first.
    if effective_decay:
        found = replace(found, rows=tuple(transfer_decay.to_base(found.rows, base)))
    else:
        found = replace(found, notes=(*found.notes, *transfer_decay.notes(found.rows)))
    if effective_lr:
        found = replace(found, rows=tuple(transfer_lr.to_base(found.rows, base)))
    else:
        scaled = transfer_lr.exponents(found.rows, found.lr)
        found = replace(found, notes=(*found.notes, *transfer_lr.notes(scaled)))
    swept = {}
    if beta1 is not None:
        found = transfer_relative.against_relative_update(found, base, beta1)
        swept = {"swept": found.swept, "title": f"Loss against {found.swept}"}
    result = transfer.analyse(found.rows, proxy=proxy, lr=lr, noise=noise)
    print(transfer_table.table(result, found, plan))
    if numbers is not None:
        numbers.write_text(json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n")
    if plot is not None:
        try:
            plots.save(plots_runs.transfer(found, proxy=proxy, lr=lr, **swept), plot)
        except RuntimeError as error:  # matplotlib is not installed
            print(error)
        else:
            print(f"figure: {plot}")
