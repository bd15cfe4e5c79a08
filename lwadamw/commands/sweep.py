"""`python -m lwadamw sweep`: train the laboratory's model over arms, widths, learning rates, weight decays and seeds."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any, Final

from ..width.rules import RULES
from . import transfer
from .arguments import (
    RULE_NAMES,
    add_trackers,
    check_trackers,
    corpus,
    device,
    output_file,
    positive,
    refuse,
    whole,
    write_trackers,
)

# One arm at three widths takes minutes on two cores.
MINI: Final[dict[str, Any]] = {
    "arms": ["fan2025"],
    "widths": [32, 64, 128],
    "lr": [0.005, 0.01, 0.02, 0.04, 0.08],
    "weight_decay": [2.5],
    "seeds": 2,
    "steps": 250,
}
FULL: Final[dict[str, Any]] = {
    "arms": list(RULES),
    "widths": [64, 128, 256],
    "lr": [0.0025, 0.005, 0.01, 0.02, 0.04, 0.08],
    "weight_decay": [2.5],
    "seeds": 2,
    "steps": 600,
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sweep",
        help="train the laboratory's model over arms, widths, learning rates, weight decays and seeds",
        description="Train a small LLaMA for every combination of arm, width, learning rate, weight decay and seed. Several "
        "runs go on at once, and every run is appended to a CSV file. The command may be killed at any moment; the same "
        "command then does the runs that are missing. At the end it prints the analysis of `python -m lwadamw transfer`.",
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path("sweep.csv"), metavar="CSV", help="file of the runs (default: %(default)s)")
    option("--mini", action="store_true", help="one arm at three small widths: minutes on two cores")
    option(
        "--arms",
        nargs="+",
        metavar="A",
        help=f"rules ({RULE_NAMES}) or exponents like lr=-0.5,wd=0.25 (default: {', '.join(RULES)})",
    )
    option("--widths", nargs="+", type=whole, metavar="N", help="widths; the first is the proxy's without --base-width")
    option("--base-width", type=whole, metavar="N", help="width of the proxy, at which all arms are the same")
    option("--lr", nargs="+", type=positive, metavar="X", help="base learning rates")
    option("--weight-decay", nargs="+", type=positive, metavar="X", help="base weight decays")
    option("--seeds", type=whole, metavar="N", help="use the seeds 0 to N-1 for weights and batches (default: 2)")
    option("--steps", type=whole, metavar="N", help="steps of every run (default: 600)")
    option(
        "--cooldown",
        type=float,
        default=0.2,
        metavar="X",
        help="share of the steps in which the lr falls to 0 (default: 0.2)",
    )
    option("--depth", type=whole, default=2, metavar="N", help="layers (default: %(default)s)")
    option("--context", type=whole, default=64, metavar="N", help="bytes per window (default: %(default)s)")
    option("--batch", type=whole, default=8, metavar="N", help="windows per step (default: %(default)s)")
    option(
        "--data", type=Path, metavar="FILE", help="text to train on (default: the Python standard library's sources)"
    )
    option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)")
    option("--jobs", type=whole, metavar="N", help="runs at once (default: one per core; on a GPU as many as fit)")
    option(
        "--series", action="store_true", help="write gain, alignment and norms against the step, instead of the results"
    )
    option("--plot", type=Path, metavar="PNG", help="figure of loss against learning rate (default: next to --out)")
    add_trackers(parser)
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2, before the first run."""
    from ..lab.study import RESULT, SERIES, train, watch
    from ..lab.sweep import output, sweep

    transfer.check_plot(parser, args.plot)
    if args.series and (args.wandb or args.tensorboard):
        parser.error(
            "argument --series: it writes no results, which --wandb and --tensorboard need. Leave one of them out."
        )
    check_trackers(parser, args)
    tasks = _tasks(parser, args)
    output_file(parser, "--out", args.out)
    place = device(parser, args.device)
    try:
        work, columns = (watch, SERIES) if args.series else (train, RESULT)
        failures = sweep(tasks, work, columns, args.out, place, jobs=args.jobs, **output())
    except (ValueError, OSError) as error:
        refuse(parser, error, "argument --out: ")
    if failures:
        print(
            f"{len(failures)} runs failed and are not in {args.out}. The same command tries them again.",
            file=sys.stderr,
        )
    if args.series:
        return 1 if failures else 0
    try:
        write_trackers(args, args.out)
        transfer.report(args.out, args.plot or args.out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        refuse(parser, error)
    return 1 if failures else 0


def _tasks(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Any]:
    from ..lab.arms import arm_rule
    from ..lab.model import ModelConfig
    from ..lab.study import STANDARD_LIBRARY, Training
    from ..lab.training import Settings

    preset = MINI if args.mini else FULL
    given = {name: getattr(args, name) if getattr(args, name) is not None else preset[name] for name in preset}
    base_width = args.base_width or given["widths"][0]
    if not 0 <= args.cooldown < 1:
        parser.error(
            f"argument --cooldown: {args.cooldown} is not a share of the steps. Give a number from 0 to below 1."
        )
    for arm in given["arms"]:
        try:
            arm_rule(arm)
        except ValueError as error:
            parser.error(f"argument --arms: {error}")
    for width in (base_width, *given["widths"]):
        try:
            ModelConfig(width=width)
        except ValueError as error:
            parser.error(f"argument --widths: {error}")
    corpus(parser, args.data, args.context)
    grid = itertools.product(range(given["seeds"]), given["widths"], given["weight_decay"], given["lr"], given["arms"])
    return [
        Training.of(
            arm,
            width,
            Settings(
                base_width=base_width, depth=args.depth, context=args.context, batch=args.batch, steps=given["steps"],
                cooldown=args.cooldown, lr=lr, weight_decay=wd, seed=seed,
            ),
            STANDARD_LIBRARY if args.data is None else str(args.data),
        )
        for seed, width, wd, lr, arm in grid
    ]  # fmt: skip
