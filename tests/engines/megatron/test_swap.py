"""`use`: one line gives Megatron an inner optimizer of lwadamw, and leaving its context gives Megatron its own back."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import pytest

from tests.sharded.processes import run

from . import shim, stand_in, training
from .training import Case

pytestmark = pytest.mark.engines


def swap_in_and_out() -> dict[str, Any]:
    """In one process: what Megatron builds before, in, and after a swap, with and without a stand-in for Transformer Engine."""
    shim.install()
    import megatron.core
    import megatron.core.optimizer as choice

    from lwadamw.engines import megatron as engine

    out: dict[str, Any] = {"version": megatron.core.__version__}
    for name, case in (("fp32", Case("fp32")), ("distributed", Case("distributed bf16"))):
        for te in (False, True):
            context = shim.transformer_engine(stand_in.FusedAdam) if te else contextlib.nullcontext()
            with training.layout(case), context:
                kinds = [type(training.build(case, layers=1).inner()[0])]
                swap = engine.use(backend="torch", norms=False)
                made = training.build(case, layers=1).inner()[0]
                kinds.append(type(made))
                swap.undo()
                swap.undo()
                kinds.append(type(training.build(case, layers=1).inner()[0]))
                with engine.use():
                    pass
                kinds.append(type(training.build(case, layers=1).inner()[0]))
            out[name, te] = [kind.__module__ for kind in kinds]
            out[name, te, "options"] = (made.options.backend, made.options.norms)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with engine.use():
            pass
        out["warnings for a tested version"] = [str(w.message) for w in caught if "lwadamw" in str(w.message)]
    megatron.core.__version__, real = "0.99.0", megatron.core.__version__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with engine.use():
            pass
        out["warnings"] = [str(w.message) for w in caught if "lwadamw" in str(w.message)]
    megatron.core.__version__ = real
    flag = choice.USING_PYTORCH_OPTIMIZER
    del choice.USING_PYTORCH_OPTIMIZER
    adam = choice.Adam
    try:
        engine.use()
    except RuntimeError as error:
        out["missing name"] = str(error)
    choice.USING_PYTORCH_OPTIMIZER = flag
    out["changed before the error"] = choice.Adam is not adam
    return out


@functools.cache
def swapped() -> dict[str, Any]:
    return run(1, swap_in_and_out, seconds=300)[0]


@pytest.mark.parametrize("te", [False, True])
@pytest.mark.parametrize("wrapper", ["fp32", "distributed"])
def test_the_inner_optimizer_is_ours_until_the_swap_is_undone(wrapper, te):
    own = "tests.engines.megatron.stand_in" if te else "torch.optim.adamw"
    found = swapped()[wrapper, te]
    assert found[0] == found[2] == found[3] == own
    assert found[1] == "lwadamw.engines.megatron.fused_adam"
    assert swapped()[wrapper, te, "options"] == ("torch", False)


def test_a_version_that_was_not_tested_gives_a_warning():
    from lwadamw.engines.megatron import TESTED

    assert swapped()["version"].partition("+")[0] in TESTED
    assert swapped()["warnings for a tested version"] == []
    (warning,) = swapped()["warnings"]
    assert "0.99.0" in warning
    assert all(version in warning for version in TESTED)


def test_a_version_without_the_names_of_the_swap_is_refused_before_anything_is_changed():
    assert "no megatron.core.optimizer.USING_PYTORCH_OPTIMIZER" in swapped()["missing name"]
    assert not swapped()["changed before the error"]
