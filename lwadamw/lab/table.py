"""Runs in a CSV file: appended whole, read back by their settings, one writer at a time."""

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
    """As it stands in the file: floats so that they read back as the same number, nothing for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else str(value)


class RunTable:
    """A CSV file of runs that are identified by some of its columns.

    A row is on disk as a whole or not at all: what a killed writer left of one is cut off when the file is next opened.
    Use as a context manager; it holds the file's lock.

    Args:
        path: of the file, created if missing.
        setting: columns that say what was run. Equal settings are the same run.
        result: columns that say what came of it.

    Raises:
        ValueError: the file has other columns, or another process is writing to it.
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
        """What identifies the run of a row."""
        return tuple(cell(row[name]) for name in self._setting)

    def append(self, rows: Iterable[Row]) -> None:
        """Write all rows of one run, or of several, in one piece and wait until they are on disk.

        Raises:
            ValueError: a run is there already.
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
                f"{self.path}: another sweep is writing to it. Wait for it, or give this one another file."
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
                "Give a new file, or the one this sweep began."
            )
        places = [self.columns.index(name) for name in self._setting]
        return {tuple(line[i] for i in places) for line in lines}
