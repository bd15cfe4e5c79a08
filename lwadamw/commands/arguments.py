"""Kinds of arguments that several commands take."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ..lab.data import Corpus


def device(parser: argparse.ArgumentParser, name: str) -> torch.device:
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


def corpus(parser: argparse.ArgumentParser, path: Path | None, context: int) -> Corpus:
    """The text of `--data`, or Python's own sources; with at least a window for training and one for validation."""
    from ..lab import data

    try:
        return (data.standard_library() if path is None else data.from_file(path)).require(context)
    except ValueError as error:
        parser.error(f"argument --data: {error}")


def whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number, like 4")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number, like 0.01")
    return value
