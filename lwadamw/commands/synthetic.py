"""`python -m lwadamw synthetic`: two layers whose gradients are noise, over arms, widths and seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..width.rules import RULES
from .arguments import RULE_NAMES, device, output_file, positive, refuse, whole


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "synthetic",
        help="what each rule holds constant where gradients are noise",
        description="Take a two-layer network whose gradients are noise to its steady state, for every combination of arm, "
        "activation, width and seed. Every run is appended to a CSV file with gain, singular values and weight RMS. The "
        "command may be killed at any moment; the same command then does the runs that are missing. At the end it prints how "
        "each of these quantities grows with the width under each arm: the fitted exponent, with a 95 % interval over seeds.",
    )
    option = parser.add_argument
    option("--out", type=Path, default=Path("synthetic.csv"), metavar="CSV", help="file of runs (default: %(default)s)")
    option(
        "--arms",
        nargs="+",
        default=list(RULES),
        metavar="A",
        help=f"rules ({RULE_NAMES}) or exponents like lr=-0.5,wd=0.25 (default: {', '.join(RULES)})",
    )
    option("--variants", nargs="+", default=["relu", "swiglu"], choices=["relu", "swiglu"], help="activations")
    option(
        "--widths", nargs="+", type=whole, default=[64, 128, 256, 512], metavar="N", help="widths, the proxy's first"
    )
    option("--seeds", type=whole, default=4, metavar="N", help="use the seeds 0 to N-1 (default: %(default)s)")
    option("--lr", type=positive, default=4e-3, metavar="X", help="base learning rate (default: %(default)s)")
    option("--weight-decay", type=positive, default=1.0, metavar="X", help="base weight decay (default: %(default)s)")
    option("--batch", type=whole, default=16, metavar="N", help="rows per step (default: %(default)s)")
    option("--taus", type=positive, default=6.0, metavar="X", help="length of every run in tau (default: %(default)s)")
    option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)")
    option("--jobs", type=whole, metavar="N", help="runs at once (default: one per core; on a GPU as many as fit)")
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    from ..lab import findings
    from ..lab.sweep import output, sweep
    from ..lab.synthetic import RESULT, Noise
    from ..lab.synthetic import run as work

    setting = {
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "base_width": args.widths[0],
        "batch": args.batch,
        "run_taus": args.taus,
    }
    try:
        tasks = [
            Noise.of(arm, variant, width, seed, **setting)
            for seed in range(args.seeds)
            for variant in args.variants
            for width in args.widths
            for arm in args.arms
        ]
    except ValueError as error:
        parser.error(f"argument --arms: {error}")
    output_file(parser, "--out", args.out)
    try:
        failures = sweep(tasks, work, RESULT, args.out, device(parser, args.device), jobs=args.jobs, **output())
    except (ValueError, OSError) as error:
        refuse(parser, error, "argument --out: ")
    try:
        print(findings.noise_report(args.out))
    except ValueError as error:
        refuse(parser, error)
    return 1 if failures else 0
