"""Names follow the parameters when the lists of a group are edited. A parameter in a group twice is one parameter."""

import copy
import gc
import pickle
import weakref

import pytest
import torch

from lwadamw import AdamW, param_groups
from lwadamw.state.members import members_of

pytestmark = pytest.mark.matrix

NAMES = ["a", "b", "c"]


def _optimizer(backend, device, shapes=((2,), (3,), (4,)), **options):
    """Return an optimizer over one group of parameters a, b, c, ... of different shapes, with gradients."""
    named = [("abcdef"[i], torch.nn.Parameter(torch.randn(s, device=device))) for i, s in enumerate(shapes)]
    optimizer = AdamW(named, backend=backend, **options)
    for _, p in named:
        p.grad = torch.randn_like(p)
    return optimizer, dict(named)


def _new(device, *shape):
    p = torch.nn.Parameter(torch.randn(shape, device=device))
    p.grad = torch.randn_like(p)
    return p


def _load_into_itself(optimizer):
    """Load an optimizer's own checkpoint, and assert that each parameter has the state that it had."""
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for p in held:
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in before.get(p, {}).items())


EDITS = {
    "filtered": (lambda ps: [ps["c"]], ["c"]),
    "reordered": (lambda ps: [ps["c"], ps["a"], ps["b"]], ["c", "a", "b"]),
    "extended": (lambda ps: [*ps.values(), _new(ps["a"].device, 5)], ["a", "b", "c", "0.3"]),
    "joined": (lambda ps: [_new(ps["a"].device, 9)], ["0.0"]),
    "one left, one came": (lambda ps: [ps["b"], ps["c"], _new(ps["a"].device, 4)], ["b", "c", "0.2"]),
    "copies in their places": (lambda ps: [_new(p.device, *p.shape) for p in ps.values()], NAMES),
    "one copy in its place": (lambda ps: [ps["a"], _new(ps["a"].device, 3), ps["c"]], NAMES),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("door", ["step", "state_dict", "load_state_dict", "deepcopy", "pickle"])
def test_names_follow_their_parameters(edit, in_place, door, backend, device):
    change, names = EDITS[edit]
    optimizer, params = _optimizer(backend, device)
    optimizer.step()
    group = optimizer.param_groups[0]
    params_now = change(params)
    if in_place:
        group["params"][:] = params_now
    else:
        group["params"] = params_now
    if door == "state_dict":
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == names
    elif door == "load_state_dict":
        _load_into_itself(optimizer)
    elif door == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    elif door == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.norm_names() == list(optimizer.norms().names) == names
    assert optimizer.param_groups[0]["param_names"] == names
    assert type(optimizer.param_groups[0]["param_names"]) is list
    weights = [p.detach().double().norm().item() for p in optimizer.param_groups[0]["params"]]
    assert optimizer.norms().weight == pytest.approx(weights, rel=1e-5)
    _load_into_itself(optimizer)


def test_a_parameter_that_comes_back_has_its_name_again(backend, device):
    optimizer, params = _optimizer(backend, device)
    optimizer.step()
    group = optimizer.param_groups[0]
    group["params"] = [params["b"]]
    optimizer.step()
    assert optimizer.norms().names == ("b",)
    group["params"].append(params["a"])
    optimizer.step()
    assert optimizer.norms().names == ("b", "a")


def test_a_parameter_that_moves_to_another_group_takes_its_name_and_its_segments_along(backend, device):
    w, v = _new(device, 4, 3), _new(device, 2)
    groups = [{"params": [("w", w), ("v", v)], "segments": {"w": (1, 3)}}, {"params": [("u", _new(device, 3))]}]
    optimizer = AdamW(groups, backend=backend)
    optimizer.step()
    optimizer.param_groups[0]["params"] = [v]
    optimizer.param_groups[1]["params"].append(w)
    optimizer.step()
    assert [g["param_names"] for g in optimizer.param_groups] == [["v"], ["u", "w"]]
    assert {m.name: m.segments for m in members_of(optimizer.param_groups)} == {"v": (), "u": (), "w": (3, 9)}
    if backend == "triton":
        assert optimizer.norms().names == ("v", "u", "w[0]", "w[1]")


def test_a_renamed_parameter_keeps_its_segments_and_its_evidence(backend, device):
    model = torch.nn.Linear(8, 6).to(device)
    optimizer = AdamW(param_groups(model, 4, width=8, segments={"weight": 2}), backend=backend)
    evidence = optimizer.evidence["weight"]
    model(torch.ones(2, 8, device=device)).sum().backward()
    optimizer.step()
    group = next(g for g in optimizer.param_groups if g["param_names"] == ["weight"])
    group["param_names"][0] = "head.weight"
    optimizer.step()
    assert optimizer.evidence["head.weight"] is evidence
    assert "weight" not in optimizer.evidence
    assert {m.name: m.segments for m in members_of([group])} == {"head.weight": (24, 24)}
    assert any(name.startswith("head.weight") for name in optimizer.norms().names)


def test_parameters_and_names_that_change_together_are_taken_as_they_are(backend, device):
    optimizer, params = _optimizer(backend, device)
    optimizer.step()
    group = optimizer.param_groups[0]
    group["params"], group["param_names"] = [params["c"], _new(device, 6)], ["c", "new"]
    optimizer.step()
    assert optimizer.norms().names == ("c", "new")


def test_names_that_nothing_explains_are_refused_before_anything_is_written(backend, device):
    optimizer, params = _optimizer(backend, device)
    optimizer.step()
    before = {name: p.detach().clone() for name, p in params.items()}
    group = optimizer.param_groups[0]
    group["params"], group["param_names"] = [params["c"], params["a"]], ["x", "y", "z"]
    for call in (optimizer.step, optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(ValueError, match=r"group 0 has 2 parameters \(\(4,\), \(2,\)\) and 3 names .*'x' first"):
            call()
    assert all(torch.equal(p, before[name]) for name, p in params.items())
    optimizer.param_groups[0].pop("param_names")
    optimizer.step()
    assert optimizer.norms().names == ("0.0", "0.1")


def test_a_group_with_another_number_of_names_is_not_added():
    with pytest.raises(ValueError, match="group 0 has 2 parameters .* and 1 names"):
        AdamW([{"params": [torch.zeros(1), torch.zeros(2)], "param_names": ["one"]}])


def test_a_place_that_is_the_name_of_another_parameter_is_not_given_twice(backend, device):
    optimizer = AdamW([("0.1", _new(device, 3))], backend=backend)
    optimizer.param_groups[0]["params"].append(_new(device, 4))
    optimizer.step()
    assert optimizer.norms().names == ("0.1", "0.1_")


def test_a_checkpoint_with_another_number_of_names_is_refused_and_loads_by_position(backend, device):
    optimizer, _ = _optimizer(backend, device)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["a"]
    with pytest.raises(ValueError, match="group 0 of the checkpoint has 3 parameters and 1 names"):
        optimizer.load_state_dict(saved)
    for g in saved["param_groups"]:
        g.pop("param_names", None)
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == NAMES


def test_a_parameter_that_left_is_kept_alive_only_until_the_groups_change_again(backend, device):
    optimizer, params = _optimizer(backend, device)
    optimizer.step()
    optimizer.param_groups[0]["params"].pop(0)
    optimizer.state.pop(params["a"])
    optimizer.step()
    alive = weakref.ref(params.pop("a"))
    optimizer.param_groups[0]["params"].pop(0)
    optimizer.step()
    gc.collect()
    assert alive() is None


def test_state_of_a_parameter_that_left_is_not_in_the_checkpoint(backend, device):
    """torch.optim.AdamW.state_dict raises a KeyError there."""
    optimizer, params = _optimizer(backend, device)
    optimizer.step()
    optimizer.param_groups[0]["params"].pop(1)
    assert len(optimizer.state_dict()["state"]) == 2
    assert float(optimizer.state[params["b"]]["step"]) == 1


DUPLICATES = {
    "given twice": lambda o, p: None,
    "appended": lambda o, p: o.param_groups[0]["params"].append(p),
    "appended again": lambda o, p: o.param_groups[0]["params"].extend([p, p]),
}


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
@pytest.mark.parametrize("how", DUPLICATES)
@pytest.mark.parametrize("names", [True, False])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"fused": True}], ids=str)
def test_a_parameter_that_is_in_a_group_twice_takes_one_step(how, names, options, backend, device):
    p, q, alone = (_new(device, *s) for s in ((5,), (1030,), (5,)))
    with torch.no_grad():
        alone.copy_(p)
    twin = torch.nn.Parameter(q.detach().clone())
    listed = [("p", p), ("q", q)] + ([("again", p)] if how == "given twice" else [])
    optimizer = AdamW(listed if names else [t for _, t in listed], lr=0.1, backend=backend, **options)
    once = AdamW([("p", alone), ("q", twin)] if names else [alone, twin], lr=0.1, backend=backend, **options)
    DUPLICATES[how](optimizer, p)
    for _ in range(3):
        for a, b in ((p, alone), (q, twin)):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        once.step()
        assert torch.equal(p, alone)
        assert torch.equal(q, twin)
    assert float(optimizer.state[p]["step"]) == 3
    assert optimizer.norms().names == once.norms().names
    assert list(optimizer.norms().update) == list(once.norms().update)
    if options.get("max_grad_norm"):
        assert float(optimizer.grad_norm) == float(once.grad_norm)
    _load_into_itself(optimizer)
    optimizer.convert_state()


def test_torch_warns_of_a_duplicate(backend):
    p = torch.nn.Parameter(torch.zeros(1))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        AdamW([p, p], backend=backend)


@pytest.mark.parametrize("named", [True, False])
def test_a_parameter_in_two_groups_is_refused_before_anything_is_written(named, backend, device):
    p, q = _new(device, 3), _new(device, 4)
    groups = [[("p", p)], [("q", q)]] if named else [[p], [q]]
    optimizer = AdamW([{"params": g} for g in groups], backend=backend)
    optimizer.step()
    before = [t.detach().clone() for t in (p, q)]
    optimizer.param_groups[1]["params"].append(p)
    name = "p" if named else "1.1"
    with pytest.raises(RuntimeError, match=rf"'{name}' \(3,\) is in group 0 and in group 1") as error:
        optimizer.step()
    assert all(torch.equal(t, b) for t, b in zip((p, q), before, strict=True))
    remedy = str(error.value).rpartition(": ")[2]
    exec(remedy, {"optimizer": optimizer})
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 2
    assert optimizer.norms().names == (("p", "q") if named else ("0.0", "1.0"))


def test_parameters_of_lazy_modules_have_names_before_they_have_shapes(backend, device):
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyLinear(2)).to(device)
    optimizer = AdamW(model.named_parameters(), backend=backend)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 5, device=device)).square().sum().backward()
        optimizer.step()
    assert optimizer.norms().names == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert all(optimizer.state[p]["exp_avg"].shape == p.shape for p in model.parameters())
