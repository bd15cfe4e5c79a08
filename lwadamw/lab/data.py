"""Text that every machine has: the sources of Python's standard library, as bytes; or a file of one's own."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

# Not prose a programmer wrote: other packages, tests full of fixtures, generated character tables.
SKIPPED: Final = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "encodings"})
MAX_BYTES: Final = 8_000_000
# One file in so many is kept for validation; of a single file, its last part of that size.
VALIDATION_SHARE: Final = 16


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on, and bytes that training never sees: uint8[n] each, on the CPU."""

    train: Tensor
    validation: Tensor
    source: str  # where they come from, for people

    def require(self, context: int) -> Corpus:
        """Itself, if both parts hold at least one window of context + 1 bytes.

        Raises:
            ValueError: a part is shorter.
        """
        for part, data in (("training", self.train), ("validation", self.validation)):
            if len(data) <= context:
                raise ValueError(
                    f"{self.source}: {len(data)} bytes for {part} do not hold one window of {context} + 1. "
                    f"Give a file of at least {VALIDATION_SHARE * (context + 1)} bytes, or a shorter context."
                )
        return self


def standard_library() -> Corpus:
    """The running Python's own sources, in the order of their paths, one file in 16 for validation.

    The same on every machine with the same Python version, up to what its distributor changed.

    Raises:
        ValueError: this Python comes without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(p.relative_to(root) for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
    files, size = [], 0
    for path in paths:
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


def split_files(files: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """(training, validation) bytes, uint8[n] each: every 16th file is for validation."""
    last = VALIDATION_SHARE - 1
    train = [data for i, data in enumerate(files) if i % VALIDATION_SHARE != last]
    return _tensor(b"".join(train)), _tensor(b"".join(files[last::VALIDATION_SHARE]))


def from_file(path: str | Path) -> Corpus:
    """Any file's bytes; the last 16th is for validation.

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
    """Windows at random places of the data without end: int64[batch, context + 1] on the CPU.

    The same seed gives the same windows, whatever model they are for.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - context, (batch,), generator=generator)
        yield _gather(data, starts, context)


def windows(data: Tensor, count: int, context: int) -> Tensor:
    """At most `count` windows that are evenly spaced and do not overlap: int64[count, context + 1] on the CPU."""
    count = min(count, len(data) // (context + 1))
    starts = torch.linspace(0, len(data) - context - 1, count, dtype=torch.float64).long()
    return _gather(data, starts, context)


def unigram_entropy(data: Tensor) -> float:
    """Nats per byte that knowing only how often each byte occurs leaves: what a model has to beat."""
    share = torch.bincount(data, minlength=256).double() / len(data)
    return float(-(share * share.clamp(min=1e-300).log()).sum())


def _gather(data: Tensor, starts: Tensor, context: int) -> Tensor:
    return data[starts[:, None] + torch.arange(context + 1)].long()


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
