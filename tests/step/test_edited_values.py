"""Values that somebody edits in place inside a group are followed in the next step, or refused by name."""

import numpy as np
import pytest
import torch

from lwadamw import AdamW
from lwadamw.state.members import members_of
from tests.cases import FEW_SHAPES, assert_equal, clone_params, make_params, set_grads

pytestmark = pytest.mark.matrix


def _fill(value, number):
    value.fill_(number)


def _new_memory(value, number):
    value.data = torch.tensor(number, dtype=value.dtype)


# The value that a group has first, how it is edited, and the same options after the edit.
EDITS = {
    "betas in a list": ("betas", lambda: [0.9, 0.99], lambda v: v.__setitem__(0, 0.5), (0.5, 0.99)),
    "betas as tensors in a list": (
        "betas",
        lambda: [torch.tensor(0.9), torch.tensor(0.99)],
        lambda v: v.__setitem__(1, torch.tensor(0.5)),
        (0.9, 0.5),
    ),
    "betas as tensors in a tuple": (
        "betas",
        lambda: (torch.tensor(0.9), torch.tensor(0.99)),
        lambda v: _fill(v[1], 0.5),
        (0.9, 0.5),
    ),
    "float32 lr": ("lr", lambda: torch.tensor(0.1), lambda v: _fill(v, 0.01), 0.01),
    "float64 lr": ("lr", lambda: torch.tensor(0.1).double(), lambda v: _fill(v, 0.01), 0.01),
    "bfloat16 lr": ("lr", lambda: torch.tensor(0.125).bfloat16(), lambda v: _fill(v, 0.25), 0.25),
    "lr of one element": ("lr", lambda: torch.tensor([0.1]), lambda v: _fill(v, 0.01), 0.01),
    "lr with new memory": ("lr", lambda: torch.tensor(0.1), lambda v: _new_memory(v, 0.01), 0.01),
    "weight_decay as a tensor": ("weight_decay", lambda: torch.tensor(0.1), lambda v: _fill(v, 2.0), 2.0),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_that_is_edited_in_place_counts_in_the_next_step(edit, groups, dtype, backend, device):
    """The twin has plain numbers, and the edited number is assigned."""
    key, make, change, after = EDITS[edit]
    ours = [torch.nn.Parameter(p.detach().to(dtype)) for p in make_params(FEW_SHAPES, device)]
    theirs = clone_params(ours)
    value = make()
    plain = [float(v) for v in value] if key == "betas" else float(value)
    a, b = (
        AdamW([{"params": params[i::groups]} for i in range(groups)], lr=0.05, backend=backend)
        for params in (ours, theirs)
    )
    for group in a.param_groups:
        group[key] = value
    for group in b.param_groups:
        group[key] = plain
    for step in range(4):
        if step == 2:
            change(value)
            for group in b.param_groups:
                group[key] = after
        set_grads(ours, theirs)
        before = [p.detach().clone() for p in ours]
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, **({} if dtype == torch.bfloat16 else {"rtol": 1.3e-6, "atol": 1e-5}))
        moved = [(p.detach().double() - old.double()).norm().item() for p, old in zip(ours, before, strict=True)]
        by_name = dict(zip(a.norms().names, a.norms().update, strict=True))
        places = [f"{i % groups}.{i // groups}" for i in range(len(ours))]
        assert [by_name[place] for place in places] == pytest.approx(moved, rel=1e-2)


@pytest.mark.parametrize("in_place", [True, False])
def test_segments_that_are_edited_in_place_count_in_the_next_step(in_place, backend, device):
    p = torch.nn.Parameter(torch.randn(6, 4, device=device))
    optimizer = AdamW([{"params": [("w", p)], "segments": {"w": [2, 4]}}], backend=backend)
    set_grads([p])
    optimizer.step()
    rows = optimizer.param_groups[0]["segments"]
    if in_place:
        rows["w"][:] = [1, 5]
    else:
        rows["w"] = (1, 5)
    set_grads([p])
    optimizer.step()
    held = optimizer._engine._torch_members if backend == "torch" else optimizer._engine._triton.members
    assert [m.segments for m in held] == [m.segments for m in members_of(optimizer.param_groups)] == [(4, 20)]
    if backend == "triton":
        assert optimizer.norms().weight[0] == pytest.approx(p.detach()[:1].double().norm().item(), rel=1e-5)


def test_a_renamed_parameter_has_its_new_name_in_the_next_step(backend, device):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW([(f"w{i}", p) for i, p in enumerate(params)], backend=backend)
    for names in (["w0", "w1", "w2", "w3"], ["w0", "v", "w2", "w3"], ["w0", "v", "w2", "u"]):
        optimizer.param_groups[0]["param_names"][:] = names
        set_grads(params)
        optimizer.step()
        assert list(optimizer.norms().names) == names


@pytest.mark.parametrize("where", ["construction", "step"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("lr", np.array(0.1), r"lr=array\(0.1\) is a ndarray. Give a float, or a torch.Tensor of one element"),
        ("lr", np.array([0.1]), "lr=.* is a ndarray"),
        ("weight_decay", np.array(0.1), "weight_decay=.* is a ndarray"),
        ("betas", [np.array(0.9), np.array(0.99)], r"betas\[0\]=.* is a ndarray"),
        ("betas", (0.9, 0.99, 0.999), "betas=.* are not two numbers"),
        ("lr", torch.zeros(2), "lr=.* is a Tensor. Give a float, or a torch.Tensor of one element"),
        ("width_warmup", torch.tensor(0.5), "width_warmup=.* is a Tensor. Give a float, and assign a new one"),
        ("huber_scale", np.array(0.5), "huber_scale=.* is a ndarray. Give a float, and assign a new one"),
    ],
)
def test_a_value_whose_changes_the_step_cannot_see_is_refused(where, key, value, message, backend, device):
    params = make_params(FEW_SHAPES, device)
    if where == "construction":
        with pytest.raises(TypeError, match=f"group 0: {message}"):
            AdamW([{"params": params, key: value}], backend=backend)
        return
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0][key] = value
    with pytest.raises(TypeError, match=f"group 0: {message}"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_numbers_of_numpy_are_numbers(backend, device):
    ours, theirs = (lambda ps: (ps, clone_params(ps)))(make_params(FEW_SHAPES, device))
    a = AdamW(ours, lr=np.float64(0.1), weight_decay=np.float32(0.5), backend=backend)
    b = AdamW(theirs, lr=0.1, weight_decay=0.5, backend=backend)
    for _ in range(2):
        set_grads(ours, theirs)
        a.step()
        b.step()
        assert_equal(ours, theirs)
