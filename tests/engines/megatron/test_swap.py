"""`use`: one line gives Megatron an inner optimizer of lwadamw, and leaving its context gives Megatron its own back."""

from __future__ import annotations

import ast
import contextlib
import functools
import warnings
from pathlib import Path
from typing import Any

import pytest

from tests.sharded.processes import run

from . import shim, stand_in, training
from .training import Case

pytestmark = pytest.mark.engines

# Names that are bound beside the choice and decide nothing about it. The flag of emerging-optimizers says whether its package
# is there.
IGNORED = {"SGD", "USING_APEX_OPTIMIZER", "HAVE_EMERGING_OPTIMIZERS"}


def swap_in_and_out() -> dict[str, Any]:
    """In one process: what Megatron builds before, in, and after a swap, with and without a stand-in for Transformer Engine."""
    shim.install()
    import megatron.core
    import megatron.core.optimizer as choice

    from lwadamw.engines import megatron as engine

    out: dict[str, Any] = {"version": megatron.core.__version__, **names_of_the_choice()}
    with engine.use() as swap:
        out["set"] = {}
        for module, name, _ in swap._before:
            out["set"].setdefault(module.__name__.removeprefix("megatron.core."), set()).add(name)
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


def names_of_the_choice() -> dict[str, Any]:
    """Which files of megatron-core import an Adam, and which of the names that they bind with it their functions read."""
    import megatron.core

    root = Path(megatron.core.__file__).parent
    files, read = [], {}
    for path in sorted((root / "optimizer").rglob("*.py")):
        tree = ast.parse(path.read_text())
        if not any(isinstance(node, ast.alias) and node.name == "FusedAdam" for node in ast.walk(tree)):
            continue
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        files.append(module)
        # A module's own flags may be set before the `try` that imports an Adam.
        choice = [node for node in tree.body if isinstance(node, (ast.Try, ast.Assign))]
        choice = [node for node in choice if isinstance(node, ast.Assign) or "FusedAdam" in ast.unparse(node)]
        nodes = [node for part in choice for node in ast.walk(part)]
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        loaded = {node.id for f in functions for node in ast.walk(f) if isinstance(node, ast.Name)}
        read[module] = bound & loaded
    return {"files": files, "read": read}


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


def test_the_swap_sets_every_name_by_which_this_version_chooses_its_adam():
    # The configuration only asks for the arguments of Transformer Engine's class.
    others = {"optimizer.optimizer_config"}
    found = swapped()
    assert set(found["files"]) == {*found["set"], *others}
    for module, names in found["set"].items():
        # Megatron reads the flag of apex only where that of Transformer Engine is off.
        assert {name for name in found["read"][module] if name == "Adam" or name.isupper()} - IGNORED == names


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
