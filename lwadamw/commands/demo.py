"""`python -m lwadamw demo`: train one small language model at two widths with the same base values."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .arguments import RULE_NAMES, corpus, device, output_file, positive, rule_name, whole


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="train one small language model at two widths with the same base values",
        description="Train a LLaMA-style model over bytes at a proxy width and at a larger width, with the same base learning "
        "rate and base weight decay under a width rule. Then compare the weights with their steady state.",
    )
    option = parser.add_argument
    option("--rule", type=rule_name, metavar="RULE", help=f"{RULE_NAMES} (default: fan2025)")
    option("--base-width", type=whole, metavar="N", help="width of the proxy (default: 64; on a GPU 128)")
    option("--ratio", type=whole, default=4, metavar="M", help="width ratio of the target (default: 4)")
    option("--steps", type=whole, metavar="N", help="steps at each width (default: 300; on a GPU 1500)")
    option("--lr", type=positive, metavar="X", help="base learning rate (default: 0.01)")
    option("--weight-decay", type=positive, metavar="X", help="base weight decay (default: 2.5)")
    option("--batch", type=whole, metavar="N", help="windows per step (default: 8; on a GPU 32)")
    option(
        "--data", type=Path, metavar="FILE", help="text to train on (default: the Python standard library's sources)"
    )
    option("--seed", type=int, help="seed of the initial weights and of the batches (default: 0)")
    option(
        "--out", type=Path, default=Path("lwadamw_demo.png"), metavar="PNG", help="the figure (default: %(default)s)"
    )
    option("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)")
    option("--quick", action="store_true", help="a few steps of a tiny model, to see that everything works")
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    from ..lab import demo, model

    place = device(parser, args.device)
    preset = demo.PRESETS["quick" if args.quick else place.type]
    names = ("rule", "base_width", "steps", "lr", "weight_decay", "batch", "seed")
    settings = replace(preset, **{name: value for name in names if (value := getattr(args, name)) is not None})
    if args.ratio < 2:
        parser.error(f"argument --ratio: {args.ratio} gives one width only. Give 2 or more, 4 for instance.")
    try:
        model.ModelConfig(width=settings.base_width)
    except ValueError as error:
        parser.error(f"argument --base-width: {error}")
    text = corpus(parser, args.data, settings.context)
    output_file(parser, "--out", args.out)
    widths = (settings.base_width, settings.base_width * args.ratio)
    return demo.run(settings, widths, text, place, args.out)
