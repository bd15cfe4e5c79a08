"""Promise 2: checkpoints load both ways between torch and lwadamw; names are matched or refused, never mixed up."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

from lwadamw import AdamW, param_groups
from tests.cases import clone_params, make_params, set_grads

SHAPES = [(30,), (5, 7), (1030,), ()]


def _run(optimizer, params, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        optimizer.step()


def _through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


MAKERS = {
    "torch_loop": lambda ps: torch.optim.AdamW(ps, lr=3e-3, weight_decay=0.1, foreach=False),
    "torch_fused": lambda ps: torch.optim.AdamW(ps, lr=3e-3, weight_decay=0.1, fused=True),
    "ours_torch": lambda ps: AdamW(ps, lr=3e-3, weight_decay=0.1, backend="torch"),
    "ours_triton": lambda ps: AdamW(ps, lr=3e-3, weight_decay=0.1, backend="triton"),
}


@pytest.mark.parametrize("saved_by", MAKERS)
@pytest.mark.parametrize("loaded_by", MAKERS)
def test_a_run_continues_from_any_optimizers_checkpoint(saved_by, loaded_by, device):
    params = make_params(SHAPES, device)
    straight, broken = clone_params(params), clone_params(params)
    _run(MAKERS["torch_loop"](straight), straight, 6, seed=1)

    first = MAKERS[saved_by](broken)
    generator_seed = 1
    whole = torch.Generator().manual_seed(generator_seed)
    grads = [[torch.randn(p.shape, generator=whole).to(device) for p in params] for _ in range(6)]
    for step in range(3):
        for p, grad in zip(broken, grads[step], strict=True):
            p.grad = grad
        first.step()
    second = MAKERS[loaded_by](broken)
    second.load_state_dict(_through_a_file(first.state_dict()))
    for step in range(3, 6):
        for p, grad in zip(broken, grads[step], strict=True):
            p.grad = grad
        second.step()
    for p, q in zip(broken, straight, strict=True):
        torch.testing.assert_close(p, q, rtol=1.3e-6, atol=1e-5)
        assert float(second.state[p]["step"]) == 6


def test_resume_is_bit_identical(backend, device):
    params = make_params(SHAPES, device)
    straight, broken = clone_params(params), clone_params(params)
    options = {"lr": 1e-2, "amsgrad": True, "max_grad_norm": 1.0, "backend": backend}
    one = AdamW(straight, **options)
    two = AdamW(broken, **options)
    for step in range(4):
        set_grads(straight, broken)
        one.step()
        if step == 2:
            saved = _through_a_file(two.state_dict())
            two = AdamW(broken, **options)
            two.load_state_dict(state_dict=saved)
        two.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, broken, strict=True))


def test_state_names_and_shapes_are_torchs(backend, device):
    params = make_params(SHAPES, device)
    ours, theirs = AdamW(params, amsgrad=True, backend=backend), torch.optim.AdamW(clone_params(params), amsgrad=True)
    for optimizer in (ours, theirs):
        set_grads(optimizer.param_groups[0]["params"])
        optimizer.step()
    mine, torchs = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == torchs["param_groups"]
    for i, state in torchs["state"].items():
        assert mine["state"][i].keys() == state.keys()
        for key, value in state.items():
            assert mine["state"][i][key].shape == value.shape, key
            assert mine["state"][i][key].dtype == value.dtype, key


def _named(names, shapes=None, **options):
    shapes = shapes or [(4,)] * len(names)
    return AdamW([(n, torch.nn.Parameter(torch.zeros(s))) for n, s in zip(names, shapes, strict=True)], **options)


def _marked(optimizer):
    """Give every moment the character code of its parameter's name as its value."""
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            p.grad = torch.full_like(p, float(ord(name)))
    optimizer.step()
    return optimizer


def _marks(optimizer):
    """Read the character codes back from the moments, by name."""
    return {
        name: round(float(optimizer.state[p]["exp_avg"].flatten()[0]) * 10)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


def test_another_order_is_matched_by_name():
    saved = _marked(_named("abc")).state_dict()
    optimizer = _named("cab")
    optimizer.load_state_dict(saved)
    assert _marks(optimizer) == {"a": ord("a"), "b": ord("b"), "c": ord("c")}
    assert optimizer.param_groups[0]["param_names"] == ["c", "a", "b"]


def test_another_grouping_is_matched_by_name():
    saved = _marked(_named("abcd")).state_dict()
    params = {n: torch.nn.Parameter(torch.zeros(4)) for n in "abcd"}
    optimizer = AdamW([{"params": [(n, params[n]) for n in part]} for part in ("db", "ca")], lr=5.0)
    optimizer.load_state_dict(saved)
    assert _marks(optimizer) == {n: ord(n) for n in "abcd"}
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 1e-3]


def _paste(error, state_dict):
    """Run the last line of an error message."""
    exec(str(error.value).splitlines()[-1].strip(), {"state_dict": state_dict})


def test_groups_that_disagree_are_refused_with_a_way_out():
    parts = [{"params": [(n, torch.nn.Parameter(torch.zeros(4)))], "lr": lr} for n, lr in (("a", 1.0), ("b", 2.0))]
    saved = _marked(AdamW(parts)).state_dict()
    target = _named("ab")
    with pytest.raises(ValueError, match="joins 'a' and 'b'.*different 'lr'") as error:
        target.load_state_dict(saved)
    _paste(error, saved)
    target.load_state_dict(saved)
    assert target.param_groups[0]["lr"] == 1.0
    assert _marks(target) == {"a": ord("a"), "b": ord("b")}


@pytest.mark.parametrize("names", ["ab", "abd", "abcd"])
def test_other_names_are_refused_and_nothing_is_loaded(names):
    saved = _marked(_named("abc")).state_dict()
    optimizer = _marked(_named(names))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="parameter names do not match"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert _marks(optimizer) == {n: ord(n) for n in names}


def test_the_closest_name_is_suggested():
    one = AdamW([("layer.weight", torch.nn.Parameter(torch.zeros(2)))])
    two = AdamW([("layers.weight", torch.nn.Parameter(torch.zeros(2)))])
    saved = one.state_dict()
    with pytest.raises(ValueError, match=r"closest to 'layers.weight' is 'layer.weight'") as error:
        two.load_state_dict(saved)
    exec(str(error.value).splitlines()[1].strip(), {"state_dict": saved})
    two.load_state_dict(saved)
    assert saved["param_groups"][0]["param_names"] == ["layers.weight"]


def test_names_that_do_not_match_can_be_dropped():
    saved = _marked(_named("ab")).state_dict()
    target = _named("xy")
    with pytest.raises(ValueError, match="To match by position") as error:
        target.load_state_dict(saved)
    _paste(error, saved)
    target.load_state_dict(saved)
    assert _marks(target) == {"x": ord("a"), "y": ord("b")}


def test_without_names_shapes_are_checked():
    params = make_params([(3,), (4,)])
    optimizer = AdamW(params)
    set_grads(params)
    optimizer.step()
    swapped = AdamW(params[::-1])
    with pytest.raises(ValueError, match=r"exp_avg of '0.0' has shape \(3,\) in the checkpoint, the parameter \(4,\)"):
        swapped.load_state_dict(optimizer.state_dict())
    assert not swapped.state


def test_a_checkpoint_without_names_loads_by_position():
    params = make_params([(3,), (4,)])
    plain = torch.optim.AdamW(params)
    set_grads(params)
    plain.step()
    named = AdamW([("a", params[0]), ("b", params[1])])
    named.load_state_dict(plain.state_dict())
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    assert torch.equal(named.state[params[1]]["exp_avg"], plain.state[params[1]]["exp_avg"])


def test_other_groups_without_names_are_refused_with_a_remedy_that_loads_them():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    old = torch.optim.AdamW(model.parameters())
    set_grads(list(model.parameters()))
    old.step()
    state_dict = old.state_dict()
    new = AdamW([{"params": [pair]} for pair in model.named_parameters()])
    with pytest.raises(
        ValueError, match=r"groups of \[4\] parameters, and this optimizer has groups of \[1, 1, 1, 1\]"
    ) as error:
        new.load_state_dict(state_dict)
    exec(str(error.value).splitlines()[-1].strip(), {"state_dict": state_dict, "model": model})
    new.load_state_dict(state_dict)
    for p in model.parameters():
        assert torch.equal(new.state[p]["exp_avg"], old.state[p]["exp_avg"])


def test_other_groups_are_refused_by_an_optimizer_without_names():
    params = make_params([(3,), (4,)])
    with pytest.raises(ValueError, match="Build this optimizer with names"):
        AdamW([{"params": [p]} for p in params]).load_state_dict(AdamW(params).state_dict())


def test_base_values_of_a_checkpoint_without_a_rule_are_told():
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64, bias=False))
    plain = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    ruled = AdamW(param_groups(model, 16), lr=2e-3)
    with pytest.warns(UserWarning, match=r"group 1 now takes steps with lr=0.00025 instead of 0.001"):
        ruled.load_state_dict(plain.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ruled.load_state_dict(ruled.state_dict())
        AdamW(param_groups(model, 64)).load_state_dict(plain.state_dict())


def test_moments_keep_their_dtype(device):
    params = [torch.nn.Parameter(torch.zeros(8, device=device, dtype=torch.bfloat16))]
    saved = torch.optim.AdamW(params).state_dict()
    moment = torch.randn(8, device=device)
    saved["state"] = {0: {"step": torch.tensor(3.0), "exp_avg": moment, "exp_avg_sq": moment**2}}
    seen = []
    optimizer = AdamW(params)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["exp_avg"].dtype))
    optimizer.load_state_dict(saved)
    assert seen == [torch.float32]
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], moment)
    assert torch.equal(optimizer.state[params[0]]["exp_avg_sq"], moment**2)


def test_user_hooks_see_and_change_what_is_loaded():
    optimizer = _marked(_named("ab"))
    saved = optimizer.state_dict()
    seen = []

    def rename(_, state_dict):
        seen.append(state_dict["param_groups"][0]["param_names"])
        groups = [{**g, "param_names": ["b", "a"]} for g in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.load_state_dict(saved)
    optimizer._optimizer_load_state_dict_pre_hooks.clear()
    assert not optimizer._optimizer_load_state_dict_post_hooks, "ours are gone"
    assert seen == [["a", "b"]]
    assert _marks(optimizer) == {"a": ord("b"), "b": ord("a")}


def _linear(base_width, rule="fan2025"):
    model = torch.nn.Linear(32, 32)
    return AdamW(param_groups(model, base_width, rule, width=32), lr=1e-2, weight_decay=0.1)


def _step(optimizer):
    for group in optimizer.param_groups:
        set_grads(group["params"])
    optimizer.step()


def test_width_keys_a_checkpoint_lacks_stay_the_constructors():
    optimizer = _linear(8)
    _step(optimizer)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        for key in ("width_lr_mult", "width_wd_mult", "width_eps_mult", "role", "rule"):
            del group[key]
    saved["param_groups"][0]["lr"] = 7e-3
    target = _linear(8)
    with pytest.warns(UserWarning, match="without a width rule"):
        target.load_state_dict(saved)
    assert [g["width_lr_mult"] for g in target.param_groups] == [0.25, 1.0]
    assert [g["role"] for g in target.param_groups] == ["matrix", "vector"]
    assert target.param_groups[0]["lr"] == 7e-3


@pytest.mark.parametrize(("base_width", "rule"), [(16, "fan2025"), (8, "kosson2025")])
def test_other_width_multipliers_are_refused_with_a_way_out(base_width, rule):
    source, target = _linear(8), _linear(base_width, rule)
    _step(source)
    saved = source.state_dict()
    with pytest.raises(ValueError, match=r"group 0 has width_\w+_mult=.* in the checkpoint and .* here") as error:
        target.load_state_dict(saved)
    assert not target.state
    _paste(error, saved)
    target.load_state_dict(saved)
    assert target.param_groups[0]["width_lr_mult"] == base_width / 32


def test_checkpoint_of_a_plain_optimizer_loads_into_width_groups_and_back():
    model = torch.nn.Linear(32, 32)
    plain = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    _step(plain)
    widths = AdamW(param_groups(model, 8, width=32), lr=1e-2)
    with pytest.warns(UserWarning, match="without a width rule"):
        widths.load_state_dict(plain.state_dict())
    assert torch.equal(widths.state[model.weight]["exp_avg"], plain.state[model.weight]["exp_avg"])
    same_groups = torch.optim.AdamW([{"params": [("weight", model.weight)]}, {"params": [("bias", model.bias)]}])
    same_groups.load_state_dict(widths.state_dict())
    assert torch.equal(same_groups.state[model.bias]["exp_avg_sq"], plain.state[model.bias]["exp_avg_sq"])


def test_distributed_checkpoint_reads_without_moving_weights(backend, device):
    """torch's DCP creates state with a step of zero gradients at lr 0. The weights must not change by a bit."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def build():
        model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.LayerNorm(16)).to(device)
        groups = param_groups(model, 4, width=16)
        return model, AdamW(groups, lr=1e-2, weight_decay=0.5, backend=backend)

    model, optimizer = build()
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    _step(optimizer)
    saved = get_optimizer_state_dict(model, optimizer)
    other_model, other = build()
    other_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other_model, other, saved)
    for (name, p), q in zip(model.named_parameters(), other_model.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(other.state[q][key].cpu(), value.cpu()), (name, key)
    assert [g["width_lr_mult"] for g in other.param_groups] == [0.25, 1.0]
    assert [g["lr"] for g in other.param_groups] == [1e-2, 1e-2]


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_the_lines_that_name_two_groups_of_an_old_checkpoint_work_when_pasted(order):
    def of(wide):
        return [p for p in model.parameters() if (p.ndim >= 2) == wide]

    def load():
        with pytest.warns(UserWarning, match="written without a width rule"):
            ruled.load_state_dict(state_dict)

    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    old = torch.optim.AdamW([{"params": of(wide), "weight_decay": 0.1} for wide in order], lr=0.01)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    old.step()
    state_dict = copy.deepcopy(old.state_dict())
    ruled = AdamW(param_groups(model, 4, width=8, roles={"3.weight": "output"}))
    with pytest.raises(ValueError, match="has no names. .* split by the number of dimensions") as error:
        ruled.load_state_dict(state_dict)
    lines = [line.strip() for line in str(error.value).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    exec(lines[0], {"state_dict": state_dict, "model": model})
    wrong = copy.deepcopy(state_dict)
    wrong["param_groups"][0]["param_names"].append("0.weight")
    count = len(wrong["param_groups"][0]["params"])
    with pytest.raises(ValueError, match=f"Group 0 of the checkpoint has {count} parameters and {count + 1} names"):
        ruled.load_state_dict(wrong)
    exec(lines[1], {"state_dict": state_dict, "model": model})
    load()
    for p in model.parameters():
        assert ruled.state[p]["exp_avg"].equal(old.state[p]["exp_avg"])


def test_names_that_shapes_do_not_tell_are_left_to_the_user():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    old = torch.optim.AdamW([{"params": layer.parameters()} for layer in model])
    ruled = AdamW(param_groups(model, 4, width=4, roles={"1.weight": "output"}))
    with pytest.raises(
        ValueError, match=r"fill in the names:\n    .*\[0\]\['param_names'\] = \[...\]  # 2 names\n    .*\[1\]"
    ):
        ruled.load_state_dict(old.state_dict())
