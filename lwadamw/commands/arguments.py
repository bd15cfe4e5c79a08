"""Arguments that several commands have in common."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from ..width.rules import RECIPES, RULES, unknown_rule

if TYPE_CHECKING:
    import torch

    from ..lab.data import Corpus


def device(parser: argparse.ArgumentParser, name: str) -> torch.device:
    """Return the device of --device. A device that does not exist ends the program with exit code 2.

    Args:
        parser: the parser of the command.
        name: auto, cpu, cuda or cuda:N. auto is a GPU if there is one, else the CPU.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        parser.error(f"argument --device: {name!r} is no device. Give auto, cpu or cuda.")
    if device.type not in ("cpu", "cuda"):
        parser.error(f"argument --device: the laboratory runs on cpu or cuda, not on {name!r}. Give --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        parser.error(
            f"argument --device: {name!r} does not exist; this machine has {torch.cuda.device_count()} GPUs. "
            "Give --device auto."
        )
    return device


def refuse(parser: argparse.ArgumentParser, error: Exception, about: str = "") -> NoReturn:
    """End the program with exit code 2 and the message of an error.

    Args:
        parser: the parser of the command.
        error: the error. If it says that nobody reads the output any more, it is raised again: no argument is wrong then.
        about: text in front of the message, for instance "argument --out: ".
    """
    if isinstance(error, BrokenPipeError):
        raise error
    parser.error(f"{about}{error}")


def output_file(parser: argparse.ArgumentParser, argument: str, path: Path | None) -> None:
    """End the program with exit code 2, before any work is done, if no file can be written at a path.

    Args:
        parser: the parser of the command.
        argument: name of the argument.
        path: the path that was given, or None.
    """
    if path is None:
        return
    if path.is_dir():
        parser.error(f"argument {argument}: {str(path)!r} is a folder. Give the path of a file.")
    if not path.parent.is_dir():
        parser.error(
            f"argument {argument}: {str(path)!r} is in a folder that does not exist, {str(path.parent)!r}. Give the path of "
            "a file in an existing folder."
        )


def add_trackers(parser: argparse.ArgumentParser) -> None:
    """Declare the options that also write the runs for trackers."""
    option = parser.add_argument
    option("--wandb", action="store_true", help="also write the runs as W&B exports them, into <name>_wandb.csv")
    option(
        "--tensorboard",
        action="store_true",
        help="also write an event file for each run, into the folder <name>_tensorboard; needs tensorboard",
    )


def check_trackers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with exit code 2, before the first run, if a tracker's format cannot be written on this machine."""
    from ..lab import trackers

    if args.tensorboard:
        try:
            trackers.check_tensorboard()
        except ValueError as error:
            parser.error(f"argument --tensorboard: {error}")


def write_trackers(args: argparse.Namespace, runs: Path) -> None:
    """Write the runs of a file for the trackers that were asked for, next to the file.

    Args:
        args: the arguments of the command.
        runs: the CSV file of the runs.

    Raises:
        ValueError: the file is not one of a sweep's results.
        OSError: a file cannot be written.
    """
    from ..lab import trackers

    if args.wandb:
        out = runs.with_name(f"{runs.stem}_wandb.csv")
        print(f"{out}: {trackers.wandb(runs, out)} runs")
    if args.tensorboard:
        out = runs.with_name(f"{runs.stem}_tensorboard")
        print(f"{out}: {trackers.tensorboard(runs, out)} new runs")


def corpus(parser: argparse.ArgumentParser, path: Path | None, context: int) -> Corpus:
    """Return the text of --data, or Python's own sources. A text that is too short ends the program with exit code 2.

    Args:
        parser: the parser of the command.
        path: the file of --data, or None.
        context: bytes per window.
    """
    from ..lab import data

    try:
        return (data.standard_library() if path is None else data.from_file(path)).require(context)
    except ValueError as error:
        parser.error(f"argument --data: {error}")


RULE_NAMES: Final = ", ".join((*RULES, *RECIPES))  # for --help


def rule_name(text: str) -> str:
    """Return the name of a rule or recipe as it was typed. Another text is an error of the argument."""
    if text not in RULES and text not in RECIPES:
        raise argparse.ArgumentTypeError(unknown_rule(text))
    return text


def whole(text: str) -> int:
    """Convert the text of an argument to a positive whole number."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number, like 4")
    return int(text)


def positive(text: str) -> float:
    """Convert the text of an argument to a positive finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, like 0.01")
    return value
