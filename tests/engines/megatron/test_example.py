"""examples/megatron_gpt.py trains, at two parallel sizes alike, and docs/megatron.md quotes it."""

from __future__ import annotations

import functools
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.sharded.processes import run

from . import shim

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "megatron_gpt.py"
STEPS = 30


class Kept:
    """A writer that keeps what it gets."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[int, float]]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.values.setdefault(name, []).append((step, value))


def work() -> dict[int, tuple[list[float], dict[str, Any]]]:
    """In each of two processes: losses and written values, by the tensor-parallel size."""
    shim.install()
    from examples import megatron_gpt

    out = {}
    for size in (1, 2):
        writer = Kept()
        losses = megatron_gpt.main(
            f"--hidden 32 --base-width 16 --layers 1 --batch {4 * size} --steps {STEPS} --tensor-parallel {size}".split(),
            writer,
        )
        out[size] = losses, writer.values
    return out


@functools.cache
def trained() -> list[dict[int, tuple[list[float], dict[str, Any]]]]:
    return run(2, work, seconds=200)


@pytest.mark.engines
@pytest.mark.parametrize("size", [1, 2])
def test_the_example_trains_and_writes_the_norms_of_whole_parameters(size):
    for result in trained():
        losses, written = result[size]
        assert losses == trained()[0][size][0]
        assert losses[-1] < losses[0] - 1.0
        for kind in ("weight", "update", "grad", "angle"):
            values = written[f"norm/{kind}/output_layer.weight"]
            assert [step for step, _ in values] == list(range(0, STEPS, 10))
            assert all(value > 0 for _, value in values[1:])
        # Both sizes begin with the same weights.
        first = [found[1]["norm/weight/output_layer.weight"][0][1] for found in result.values()]
        assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_the_page_quotes_the_example():
    source = EXAMPLE.read_text()
    page = (ROOT / "docs" / "megatron.md").read_text()
    quoted = re.findall(r"# docs:[^\n]* begin\n(.*?)\n *# docs:[^\n]* end", source, re.DOTALL)
    assert len(quoted) == 2
    for part in quoted:
        assert textwrap.dedent(part) in page
