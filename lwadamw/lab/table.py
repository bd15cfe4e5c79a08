"""Runs in a CSV file. A run is appended as a whole, it is found again by its setting, and only one process writes."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Row = Mapping[str, Any]


def cell(value: Any) -> str:
    """Return the text of a cell.

    Args:
        value: a float is written so that it reads back as the same number. None and NaN give an empty cell.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else str(value)


class RunTable:
    """A CSV file of runs. Some of its columns identify a run.

    If a writer was killed in the middle of a row, the next process that opens the file cuts the incomplete row off. The
    table is a context manager, and it holds the lock of the file.

    Args:
        path: path of the file. The file is created if it is missing.
        setting: names of the columns that identify a run. Two rows with equal settings are the same run.
        result: names of the columns that hold the result of a run.

    Attributes:
        columns: names of all columns, in order.
        done: keys of the runs in the file; see `key`.

    Raises:
        ValueError: the file has other columns, or another process writes to it.
    """

    def __init__(self, path: Path, setting: Sequence[str], result: Sequence[str]) -> None:
        self.path = path
        self.columns = (*setting, *result)
        self._setting = tuple(setting)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self.done = self._read()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> RunTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def key(self, row: Row) -> tuple[str, ...]:
        """Return the cells that identify a run.

        Args:
            row: values by column; the columns of the setting must be there.
        """
        return tuple(cell(row[name]) for name in self._setting)

    def append(self, rows: Iterable[Row]) -> None:
        """Write all rows of one run, or of several, and wait until they are on disk.

        Args:
            rows: values by column. A column that a row lacks gets an empty cell.

        Raises:
            ValueError: a run is in the file already.
        """
        rows = list(rows)
        keys = [self.key(row) for row in rows]
        if there := self.done.intersection(keys):
            raise ValueError(
                f"{self.path}: a run is there already, {dict(zip(self._setting, there.pop(), strict=True))}."
            )
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([[cell(row.get(c)) for c in self.columns] for row in rows])
        self._write(text.getvalue())
        self.done |= {*keys}

    def _write(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self._fd, data) :]
        os.fsync(self._fd)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(
                f"{self.path}: another sweep is writing to it. Wait until that sweep ends, or give another file."
            ) from error

    def _read(self) -> set[tuple[str, ...]]:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(self._fd, len(whole))
        if not whole:
            self._write(",".join(self.columns) + "\n")
            return set()
        header, *lines = csv.reader(io.StringIO(whole.decode()))
        if tuple(header) != self.columns:
            unlike = sorted({*header} ^ {*self.columns}) or ["the order of columns"]
            raise ValueError(
                f"{self.path}: its columns are not those of this sweep (different: {', '.join(unlike)}). "
                "Give a new file, or the file that this sweep began."
            )
        places = [self.columns.index(name) for name in self._setting]
        return {tuple(line[i] for i in places) for line in lines}
