"""Runs of a sweep in the formats of trackers: the table that W&B exports, and event files of TensorBoard."""

from __future__ import annotations

import csv
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .study import RESULT
from .sweep import PLACE
from .transfer_columns import Table

TENSORBOARD_HINT: Final = "pip install tensorboard"
# Columns that trackers know under another name.
METRICS: Final[Mapping[str, str]] = {"loss": "val/loss", "train_loss": "train/loss"}
_NAMED: Final = ("arm", "width", "depth", "batch", "steps", "lr", "weight_decay", "seed")
_HPARAMS: Final = "_hparams_/session_start_info"


def wandb(runs: Path, out: Path) -> int:
    """Write the runs as the CSV file that W&B exports: a line per run with name, state, config and summary.

    Args:
        runs: the CSV file of a sweep.
        out: path of the file.

    Returns:
        Number of runs.

    Raises:
        ValueError: the file is not one of a sweep's results.
        OSError: a file cannot be read or written.
    """
    rows = _rows(runs)
    lines = [{"Name": _name(row), "State": "finished", **_config(row), **_summary(row)} for row in rows]
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else ["Name", "State"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return len(lines)


def tensorboard(runs: Path, out: Path) -> int:
    """Write an event file for each run, with its setting as hyperparameters and its result as scalars.

    Args:
        runs: the CSV file of a sweep.
        out: folder. Each run has a folder inside. A run whose folder is there already is left out.

    Returns:
        Number of runs that were written.

    Raises:
        ValueError: the file is not one of a sweep's results, or tensorboard is not installed.
        OSError: a file cannot be read or written.
    """
    writer = _writer()
    rows = [row for row in _rows(runs) if not (out / _name(row)).exists()]
    for row in rows:
        config = {name: _value(text) for name, text in _config(row).items()}
        metrics = {name: _number(text) for name, text in _summary(row).items()}
        with writer(str(out / _name(row))) as file:
            file.add_hparams(config, metrics, run_name=".", global_step=int(row["steps_done"]))
    return len(rows)


def check_tensorboard() -> None:
    """Raise a ValueError if event files cannot be written on this machine."""
    _writer()


def table(folder: Path) -> Table:
    """Read the event files of TensorBoard in a folder as a table with one run per line: hyperparameters and last scalars.

    Args:
        folder: the folder. Every folder inside it that has event files is a run.

    Raises:
        ValueError: no run is there, or tensorboard is not installed.
    """
    places = sorted({path.parent for path in folder.rglob("*tfevents*")})
    if not places:
        raise ValueError(
            f"cannot read {str(folder)!r}: the folder has no event files of TensorBoard. Give a CSV file with a header."
        )
    rows = [row for row in map(_events, places) if row]
    if not rows:
        raise ValueError(
            f"{folder}: its event files have no hyperparameters. Write them with SummaryWriter.add_hparams, or give a CSV file."
        )
    header = tuple(dict.fromkeys(name for row in rows for name in row))
    lines = tuple((i, tuple(row.get(name, "") for name in header)) for i, row in enumerate(rows, 1))
    return Table(folder, header, lines, False)


def _events(place: Path) -> dict[str, str]:
    """Return hyperparameters and last scalars of a run. Empty if it has no hyperparameters."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    except ImportError as error:
        raise ValueError(
            f"cannot read the event files in {str(place)!r}: {error}. Install it: {TENSORBOARD_HINT}."
        ) from None
    found = EventAccumulator(str(place))
    found.Reload()
    if _HPARAMS not in found.summary_metadata:
        return {}
    content = HParamsPluginData.FromString(found.summary_metadata[_HPARAMS].plugin_data.content)
    row = {name: _text(value) for name, value in content.session_start_info.hparams.items()}
    return row | {name: repr(found.Scalars(name)[-1].value) for name in found.Tags()["scalars"]}


def _text(value: Any) -> str:
    kind = value.WhichOneof("kind")
    plain = getattr(value, kind)
    return str(int(plain)) if kind == "number_value" and float(plain).is_integer() else str(plain)


def _writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"event files of TensorBoard need its package: {error}. Install it: {TENSORBOARD_HINT}."
        ) from None
    return SummaryWriter


def _rows(runs: Path) -> Sequence[Mapping[str, str]]:
    with runs.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and not {"loss", "status"} <= rows[0].keys():
        raise ValueError(
            f"{runs}: it has no columns 'loss' and 'status'. Give a file that the command sweep or scaling wrote."
        )
    return rows


def _name(row: Mapping[str, str]) -> str:
    told = "-".join(f"{name}_{row[name]}" if name != "arm" else row[name] for name in _NAMED if row.get(name))
    setting = ",".join(text for name, text in row.items() if name not in (*RESULT, *PLACE))
    return f"{re.sub(r'[^A-Za-z0-9._=+-]', '_', told)}-{zlib.crc32(setting.encode()):08x}"


def _config(row: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in row.items() if name not in RESULT and name != "seconds"}


def _summary(row: Mapping[str, str]) -> dict[str, str]:
    """Return the result. A loss of NaN says that the run diverged, as it does in a tracker."""
    names = [name for name in (*RESULT, "seconds") if name in row and name != "status"]
    return {METRICS.get(name, name): row[name] or "NaN" for name in names}


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _value(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
