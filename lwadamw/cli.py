"""The command line: `python -m lwadamw <command>`, one function per command."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .rules import RULES


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 130 after Ctrl-C, and argparse exits with 2 on bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m lwadamw", description="AdamW for width scaling.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for add in (_add_demo, _add_storage):
        add(commands)
    args = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="train one small language model at two widths with the same base values",
        description="Train a LLaMA-style byte-level model at a proxy width and at a wider one, with the very same base "
        "learning rate and weight decay under a width rule, and compare what the weights settled to.",
    )
    add = parser.add_argument
    add("--rule", choices=tuple(RULES), help="width rule (default: fan2025)")
    add("--base-width", type=_whole, metavar="N", help="width of the proxy (default: 64; on a GPU 128)")
    add("--ratio", type=_whole, default=4, metavar="M", help="width ratio of the target (default: 4)")
    add("--steps", type=_whole, metavar="N", help="steps at each width (default: 300; on a GPU 1500)")
    add("--lr", type=_positive, metavar="X", help="base learning rate (default: 0.01)")
    add("--weight-decay", type=_positive, metavar="X", help="base weight decay (default: 2.5)")
    add("--batch", type=_whole, metavar="N", help="windows per step (default: 8; on a GPU 32)")
    add("--data", type=Path, metavar="FILE", help="text to train on (default: the Python standard library's sources)")
    add("--seed", type=int, help="of initial weights and batches (default: 0)")
    add("--out", type=Path, default=Path("lwadamw_demo.png"), metavar="PNG", help="the figure (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)")
    add("--quick", action="store_true", help="a few steps of a tiny model, to see that everything works")
    parser.set_defaults(command=lambda args: _demo(parser, args))


def _add_storage(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "storage",
        help="the storage combinations and what each costs",
        description="Print the table of storage combinations: arguments of AdamW, bytes of state and bytes moved per "
        "parameter, and when to use which.",
    )
    parser.set_defaults(command=_storage)


def _storage(_: argparse.Namespace) -> int:
    from .combinations import table

    print(table())
    return 0


def _demo(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    from .lab import data, demo, model

    device = _device(parser, args.device)
    preset = demo.PRESETS["quick" if args.quick else device.type]
    names = ("rule", "base_width", "steps", "lr", "weight_decay", "batch", "seed")
    settings = replace(preset, **{name: value for name in names if (value := getattr(args, name)) is not None})
    if args.ratio < 2:
        parser.error(f"argument --ratio: {args.ratio} gives one width only. Give 2 or more, 4 for instance.")
    try:
        model.ModelConfig(width=settings.base_width)
    except ValueError as error:
        parser.error(f"argument --base-width: {error}")
    try:
        corpus = data.standard_library() if args.data is None else data.from_file(args.data)
        corpus.require(settings.context)
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    if args.out.is_dir() or not args.out.parent.is_dir():
        problem = (
            "is a folder" if args.out.is_dir() else f"is in a folder that does not exist, {str(args.out.parent)!r}"
        )
        parser.error(f"argument --out: {str(args.out)!r} {problem}. Give the path of a file in an existing folder.")
    widths = (settings.base_width, settings.base_width * args.ratio)
    return demo.run(settings, widths, corpus, device, args.out)


def _device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"argument --device: {name!r} is no device. Give auto, cpu or cuda.")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: the demo runs on cpu or cuda, not on {name!r}. Give --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(
            f"argument --device: {name!r} is not there; {torch.cuda.device_count()} GPUs are. Give --device auto."
        )
    return device


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number, like 4")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, like 0.01")
    return value
