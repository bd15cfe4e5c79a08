"""Text to train on: the sources of Python's standard library, which every machine has, or a file of the user."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

# These folders do not hold text that a programmer wrote for the library: other packages, fixtures, character tables.
SKIPPED: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings"})
MAX_BYTES: Final = 8_000_000
# One file in 16 is kept for validation. Of a single file, the last 16th is.
VALIDATION_SHARE: Final = 16


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on, and bytes that training never sees.

    Args:
        train: uint8[n] on the CPU.
        validation: uint8[n] on the CPU.
        source: where the bytes come from, in words for the user.
    """

    train: Tensor
    validation: Tensor
    source: str

    def require(self, context: int) -> Corpus:
        """Return this corpus if both parts are long enough.

        Args:
            context: bytes that the model sees at once. A window has context + 1 bytes.

        Raises:
            ValueError: a part is shorter than one window.
        """
        for part, data in (("training", self.train), ("validation", self.validation)):
            if len(data) <= context:
                raise ValueError(
                    f"{self.source}: {len(data)} bytes for {part} do not hold one window of {context} + 1. "
                    f"Give a file of at least {VALIDATION_SHARE * (context + 1)} bytes, or a shorter context."
                )
        return self


def standard_library() -> Corpus:
    """Return the sources of the running Python's standard library, in the order of their paths.

    The bytes are the same on every machine with the same Python version, unless a distributor changed the library.

    Raises:
        ValueError: this Python comes without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files, size = [], 0
    for path in _sources(root):
        if size >= MAX_BYTES:
            break
        files.append((root / path).read_bytes()[: MAX_BYTES - size])
        size += len(files[-1])
    if len(files) < VALIDATION_SHARE:
        raise ValueError(
            f"Python's standard library has only {len(files)} source files here. Give a text with --data FILE."
        )
    version = sysconfig.get_python_version()
    return Corpus(*split_files(files), source=f"Python {version} standard library")


def _sources(root: Path) -> list[Path]:
    """List the Python files under a folder, relative to it and sorted. Folders in SKIPPED are never entered."""
    found: list[Path] = []
    for folder, inside, names in os.walk(root):
        inside[:] = [name for name in inside if name not in SKIPPED]
        found += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
    return sorted(found)


def split_files(files: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Split files into bytes for training and bytes for validation.

    Args:
        files: contents of the files. Every 16th file is for validation.

    Returns:
        Training and validation bytes, uint8[n] each.
    """
    last = VALIDATION_SHARE - 1
    train = [data for i, data in enumerate(files) if i % VALIDATION_SHARE != last]
    return _tensor(b"".join(train)), _tensor(b"".join(files[last::VALIDATION_SHARE]))


def from_file(path: str | Path) -> Corpus:
    """Return the bytes of any file. The last 16th is for validation.

    Args:
        path: path of the file.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        data = _tensor(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}. Give the path of a text file.") from error
    cut = len(data) - len(data) // VALIDATION_SHARE
    return Corpus(data[:cut], data[cut:], source=Path(path).name)


def batches(data: Tensor, batch: int, context: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of windows at random positions, without end.

    Args:
        data: uint8[n], longer than `context`.
        batch: windows in a batch.
        context: bytes that the model sees at once.
        seed: of the positions. The same seed gives the same windows at every width of the model.

    Yields:
        int64[batch, context + 1] on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - context, (batch,), generator=generator)
        yield _gather(data, starts, context)


def windows(data: Tensor, count: int, context: int) -> Tensor:
    """Return evenly spaced windows that do not overlap.

    Args:
        data: uint8[n], longer than `context`.
        count: the largest number of windows. There are fewer if the data are too short.
        context: bytes that the model sees at once.

    Returns:
        int64[count, context + 1] on the CPU.
    """
    count = min(count, len(data) // (context + 1))
    starts = torch.linspace(0, len(data) - context - 1, count, dtype=torch.float64).long()
    return _gather(data, starts, context)


def unigram_entropy(data: Tensor) -> float:
    """Return the loss of a model that knows only how often each byte occurs, in nats per byte.

    Args:
        data: uint8[n].
    """
    share = torch.bincount(data, minlength=256).double() / len(data)
    return float(-(share * share.clamp(min=1e-300).log()).sum())


def _gather(data: Tensor, starts: Tensor, context: int) -> Tensor:
    return data[starts[:, None] + torch.arange(context + 1)].long()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
