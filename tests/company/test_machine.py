"""A random company: whatever others do between steps, weights and moments stay within float64 bounds, and no canary is touched.

`COMPANY_EXAMPLES=5000 pytest -m slow tests/company/test_machine.py` runs more and longer examples. One example takes about a
second on the interpreter, and a tenth of that with the torch backend.
"""

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.company.machine import Company


def _run(backend, examples, steps, thorough=False):
    machine = type(f"Company_{backend}", (Company,), {"backend": backend, "thorough": thorough})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
        ),
    )


@pytest.mark.parametrize("examples", [60, pytest.param(240, marks=pytest.mark.matrix)])
def test_company_of_others_leaves_weights_within_float64_bounds(backend, examples):
    _run(backend, examples=examples, steps=6 if backend == "triton" else 10)


@pytest.mark.slow
def test_company_of_others_leaves_weights_within_float64_bounds_in_many_examples(backend):
    """5000 examples take about an hour on the interpreter."""
    _run(backend, examples=int(os.environ.get("COMPANY_EXAMPLES", "1000")), steps=20, thorough=True)
