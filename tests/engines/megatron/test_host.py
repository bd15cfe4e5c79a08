"""Under Megatron's scheduler, only values of groups change: after the third step no plan is built again."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.sharded.processes import run

from . import training
from .training import Case

pytestmark = pytest.mark.engines

CASES = (Case("fp32"), Case("bf16"), Case("distributed fp32"), Case("distributed bf16"), Case("aware remainder"))


def count(cases: tuple[Case, ...]) -> dict[tuple[Case, str], list[int]]:
    """How many times the parameters were sorted into plans and backends, after each of six steps."""
    from lwadamw.step.engine import Engine

    sort, out = Engine._sort, {}
    counted = [0]

    def sorting(self: Any, *args: Any, **kwargs: Any) -> None:
        counted[0] += 1
        sort(self, *args, **kwargs)

    Engine._sort = sorting
    for case in cases:
        for backend in ("torch", "triton"):
            with training.layout(case), training.optimizer_of("ours", case, backend=backend):
                made = training.build(case, layers=1)
                counted[0] = 0
                out[case, backend] = []
                for index in range(6):
                    training.step(made, index)
                    out[case, backend].append(counted[0])
    return out


@functools.cache
def counts() -> dict[tuple[Case, str], list[int]]:
    return run(1, count, CASES, seconds=300)[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_plan_is_built_after_the_third_step(case, backend):
    found = counts()[case, backend]
    assert found[0] >= 1
    assert found[2:] == [found[2]] * 4
