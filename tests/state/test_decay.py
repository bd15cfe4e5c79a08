"""Every decay law is the float64 reference's on both backends, follows schedules, survives checkpoints, and rests at lr 0."""

import copy
import io
import re

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import lwadamw
from lwadamw import AdamW, effective, reference, summary
from lwadamw.state.decay import LAWS
from lwadamw.tables.launch import Launch
from tests.cases import (
    FEW_SHAPES,
    GROUP_KEYS,
    assert_matches_reference,
    clone_params,
    make_optimizer,
    make_params,
    make_reference,
    reference_step,
    set_grads,
)

PEAK = 0.05
HUBER_SHAPES = ((), (63,), (0,), (2049,))
RATES = (0.0, 0.02, PEAK, 0.04, 0.01)  # warm-up, peak and decay of a schedule
WIDTHS = {"width_lr_mult": 0.25, "width_wd_mult": 3.0, "width_eps_mult": 0.5, "eps": 0.1}
CASES = {
    "independent": {"decay": "independent", "weight_decay": 0.1},
    "independent, widths, clipped": {"decay": "independent", "weight_decay": 0.1, "max_grad_norm": 0.5, **WIDTHS},
    "corrected": {"decay": "corrected", "weight_decay": 2.0},
    "corrected, widths, amsgrad": {"decay": "corrected", "weight_decay": 2.0, "amsgrad": True, **WIDTHS},
    "huber": {"decay": "huber", "weight_decay": 2.0},
    "huber, widths, clipped": {"decay": "huber", "weight_decay": 4.0, "max_grad_norm": 0.5, **WIDTHS},
    "huber, amsgrad, maximize": {"decay": "huber", "weight_decay": 2.0, "amsgrad": True, "maximize": True},
    "huber, mostly linear": {"decay": "huber", "weight_decay": 4.0, "huber_scale": 0.2},
    "huber, all quadratic": {"decay": "huber", "weight_decay": 2.0, "huber_scale": 100.0},
}


def _reference_options(options):
    return {**options, **({"peak_lr": PEAK} if options["decay"] in ("independent", "corrected") else {})}


def _set_lr(optimizer, expected, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    for r in expected:
        r.group.lr = lr


def _assert_thresholds(optimizer, params, expected):
    for p, r in zip(params, expected, strict=True):
        held = optimizer.state.get(p, {}).get("huber_threshold")
        assert (held is None) == (r.huber_threshold is None)
        if held is not None:
            assert (held.shape, held.dtype) == ((), torch.float32)
            assert float(held) == pytest.approx(r.huber_threshold, rel=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_law_matches_the_reference_over_a_schedule(name, backend, device):
    options = CASES[name]
    params = make_params(HUBER_SHAPES if options["decay"] == "huber" else FEW_SHAPES, device)
    expected = make_reference(params, _reference_options(options))
    optimizer = make_optimizer(params, options, lr=PEAK, backend=backend)
    for step, lr in enumerate(RATES):
        _set_lr(optimizer, expected, lr)
        set_grads(params, scale=10.0 ** (step % 3 - 1))
        if step in (1, 2):
            params[1].grad = None
        norms = reference_step(expected, params, options)
        optimizer.step()
        assert_matches_reference(optimizer, params, expected)
        _assert_thresholds(optimizer, params, expected)
    measured = optimizer.norms()
    for i, n in enumerate(norms):
        assert measured.weight[i] == pytest.approx(n.weight, rel=1e-5)
        assert measured.update[i] == pytest.approx(n.update, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_groups_of_every_law_share_a_step(clip, backend, device, monkeypatch):
    launched = []
    original = Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self: (launched.append(self.kernel_name), original(self))[1])
    options = [{"decay": law, "weight_decay": 2.0, "lr": 0.02 * (i + 1)} for i, law in enumerate(LAWS)]
    params = make_params([(40,), (3, 5), (7,), (600,)], device)
    peaked = [{**o, "peak_lr": o["lr"]} for o in options]
    expected = [make_reference([p], o)[0] for p, o in zip(params, peaked, strict=True)]
    optimizer = AdamW(
        [{"params": [p], **o} for p, o in zip(params, options, strict=True)], backend=backend, max_grad_norm=clip
    )
    for factor in (1.0, 0.5, 0.25):
        for group, o, r in zip(optimizer.param_groups, options, expected, strict=True):
            group["lr"] = r.group.lr = o["lr"] * factor
        set_grads(params)
        launched.clear()
        reference_step(expected, params, {"max_grad_norm": clip})
        optimizer.step()
        assert_matches_reference(optimizer, params, expected)
    sums = ["grad_norm_kernel", "total_kernel"] * 2 if clip else []
    steps = ["coefficients_kernel", "adamw_kernel"] * 2 + ["threshold_kernel"]
    assert launched == ([] if backend == "torch" else [*sums, *steps])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_that_does_not_happen_leaves_weights_and_thresholds(law, fused, backend, device):
    params = make_params([(40,), (2049,)], device)
    optimizer = AdamW(params, lr=PEAK, weight_decay=2.0, decay=law, backend=backend, fused=fused)
    set_grads(params)
    optimizer.step()
    before = copy.deepcopy([(p.detach(), optimizer.state[p]) for p in params])
    optimizer.found_inf = torch.ones((), device=device)
    set_grads(params)
    optimizer.step()
    for p, (weight, state) in zip(params, before, strict=True):
        assert torch.equal(p, weight)
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in state.items())
    assert (optimizer.norms().update == 0).all()


STORAGES = {
    "fp32": (torch.float32, {}),
    "fp32, 8 bits": (torch.float32, {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}),
    "bf16": (torch.bfloat16, {}),
    "bf16, remainder": (torch.bfloat16, {"master_weights": "remainder"}),
    "bf16, master": (torch.bfloat16, {"master_weights": torch.float32}),
    "bf16, kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "bf16, stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "fp16, master": (torch.float16, {"master_weights": torch.float32}),
}


def _stored(name, law, backend, device, shapes=((4, 70), (33,))):
    dtype, options = STORAGES[name]
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    return params, AdamW(named, lr=PEAK, weight_decay=2.0, decay=law, backend=backend, **options)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["fp32", "fp32, 8 bits", "bf16, remainder", "bf16, stochastic"])
def test_a_learning_rate_of_0_moves_no_weight(name, law, backend, device):
    params, optimizer = _stored(name, law, backend, device, [(64, 64)] if "8 bits" in name else [(40,)])
    for lr in (PEAK, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        set_grads(params)
        before = [(p.detach().clone(), optimizer.master_weight(p)) for p in params]
        optimizer.step()
        same = [torch.equal(p, w) and torch.equal(optimizer.master_weight(p), m) for p, (w, m) in zip(params, before)]  # noqa: B905
        assert all(same) == (lr == 0) == any(same)


# On the interpreter the others take their turn with the slow tests.
QUICK = ("fp32, 8 bits", "bf16", "bf16, stochastic")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in STORAGES])
def test_huber_kernels_and_torch_store_alike(name, device):
    """Weights, thresholds and norms, whatever the weight is kept in."""
    runs = [_stored(name, "huber", backend, device, [(64, 70), (33,)]) for backend in ("torch", "triton")]
    for _ in range(3):
        set_grads(*(params for params, _ in runs))
        for _, optimizer in runs:
            optimizer.step()
    (ours, one), (theirs, two) = runs
    for p, q in zip(ours, theirs, strict=True):
        differ = one.master_weight(p) - two.master_weight(q)
        # A draw may fall either way where the last digits differ.
        assert (differ.abs() > 1e-5 * (1 + q.detach().abs())).float().mean() < 2e-3
        assert float(one.state[p]["huber_threshold"]) == pytest.approx(float(two.state[q]["huber_threshold"]), rel=1e-4)
    np.testing.assert_allclose(one.norms().update, two.norms().update, rtol=2e-3)


@pytest.mark.parametrize("name", ["bf16, remainder", "bf16, master"])
def test_huber_on_master_weights_takes_the_steps_of_fp32(name, backend, device):
    params, optimizer = _stored(name, "huber", backend, device)
    whole = [torch.nn.Parameter(p.detach().float()) for p in params]
    plain = AdamW(whole, lr=PEAK, weight_decay=2.0, decay="huber", backend=backend)
    for _ in range(4):
        for p, q in zip(params, whole, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.float()
        optimizer.step()
        plain.step()
    for p, q in zip(params, whole, strict=True):
        assert torch.equal(optimizer.master_weight(p), q)
        assert torch.equal(optimizer.state[p]["huber_threshold"], plain.state[q]["huber_threshold"])


def test_huber_decay_takes_no_more_than_its_threshold_from_a_weight(backend, device):
    """Without gradients: w/(1 + tau) below (1 + tau) delta, tau delta less above it."""
    p = torch.nn.Parameter(torch.tensor([0.1, -0.1, 1.0, -8.0, 50.0], device=device))
    optimizer = AdamW([p], lr=0.5, weight_decay=0.2, decay="huber", backend=backend)
    before, delta, tau = p.detach().clone(), 59.2 / 5, 0.1
    p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = torch.cat([before[:4] / 1.1, before[4:] - tau * delta])
    torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
    assert float(optimizer.state[p]["huber_threshold"]) == pytest.approx(
        0.99 * delta + 0.01 * float(expected.abs().mean()), rel=1e-6
    )


def test_released_gradients_move_thresholds_alike(backend, device):
    ours = make_params([(40,), (9, 9)], device)
    theirs = clone_params(ours)
    one, two = (AdamW(params, lr=PEAK, weight_decay=2.0, decay="huber", backend=backend) for params in (ours, theirs))
    weights = [torch.randn_like(p) for p in ours]
    with one.release_gradients():
        for _ in range(3):
            sum((p * w).sum() for p, w in zip(ours, weights, strict=True)).backward()
    for _ in range(3):
        two.zero_grad()
        sum((p * w).sum() for p, w in zip(theirs, weights, strict=True)).backward()
        two.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(one.state[p]["huber_threshold"], two.state[q]["huber_threshold"])


def test_a_law_set_between_steps_holds_from_the_next(backend, device):
    params = make_params([(40,), (9, 9)], device)
    expected = make_reference(params, {"weight_decay": 2.0})
    optimizer = AdamW(params, weight_decay=2.0, lr=PEAK, backend=backend)
    for law in ("coupled", "independent", "huber", "corrected", "coupled"):
        optimizer.param_groups[0].update(decay=law, peak_lr=2 * PEAK)
        for r in expected:
            r.group.decay, r.group.peak_lr, r.group.lr = law, 2 * PEAK, PEAK
        set_grads(params)
        reference_step(expected, params, {})
        optimizer.step()
        assert_matches_reference(optimizer, params, expected)
    optimizer.param_groups[0]["decay"] = "decoupled"
    for _ in range(2):
        with pytest.raises(ValueError, match="decay='decoupled' is not one of 'coupled', 'independent'"):
            optimizer.step()
    optimizer.param_groups[0].update(decay="independent", peak_lr=None)
    for _ in range(2):
        with pytest.raises(ValueError, match="peak_lr=None is not a positive number"):
            optimizer.step()


@pytest.mark.parametrize("law", ["independent", "corrected", "huber"])
def test_a_learning_rate_that_lives_in_a_tensor_is_followed(law, backend, device):
    lr = torch.tensor(PEAK, dtype=torch.float64, device=device)
    params = make_params([(40,), (9, 9)], device)
    expected = make_reference(params, _reference_options({"decay": law, "weight_decay": 2.0}))
    optimizer = AdamW(params, lr=lr, weight_decay=2.0, decay=law, backend=backend)
    for value in RATES:
        lr.fill_(value)
        expected[0].group.lr = value
        set_grads(params)
        reference_step(expected, params, {})
        optimizer.step()
        assert_matches_reference(optimizer, params, expected)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: min(t / 4, 1.0)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=PEAK, total_steps=12, pct_start=0.25),
}


@pytest.mark.parametrize("law", ["independent", "corrected"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_decay_follows_a_scheduler_from_nothing_to_its_peak(name, law):
    """Without gradients each step multiplies by 1 - wd (lr/peak), or by 1 - wd lr (lr/peak)."""
    p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    # OneCycleLR has a peak of its own, whatever the optimizer's lr.
    own = {"lr": 1e-3, "peak_lr": PEAK} if name == "OneCycleLR" else {"lr": PEAK}
    optimizer = AdamW([p], weight_decay=0.1, decay=law, **own)
    scheduler = SCHEDULERS[name](optimizer)
    fractions = []
    for _ in range(10):
        lr = optimizer.param_groups[0]["lr"]
        fractions.append(lr / PEAK)
        before, p.grad = p.item(), torch.zeros_like(p)
        optimizer.step()
        scheduler.step()
        assert 1 - p.item() / before == pytest.approx(
            0.1 * fractions[-1] * (1 if law == "independent" else lr), abs=1e-15
        )
    assert max(fractions) == pytest.approx(1)
    assert min(fractions) < 0.05


def test_the_peak_is_the_learning_rate_a_group_came_with():
    a, b, c, d = (torch.nn.Parameter(torch.zeros(1)) for _ in range(4))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5}, {"params": [c], "lr": 0.1, "initial_lr": 0.7}]
    optimizer = AdamW([*groups, {"params": [d], "decay": "coupled"}], lr=torch.tensor(0.25), decay="independent")
    assert [g.get("peak_lr") for g in optimizer.param_groups] == [0.25, 0.5, 0.7, None]
    assert ["decay" in g for g in optimizer.param_groups] == [True, True, True, False]
    for group in optimizer.param_groups:  # a loop that sets what it likes
        group["lr"] = 0.05
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 2.0})
    assert [g.get("peak_lr") for g in optimizer.param_groups] == [0.25, 0.5, 0.7, None, 2.0]
    assert AdamW([a], decay="corrected", peak_lr=3.0).param_groups[0]["peak_lr"] == 3.0


def test_effective_weight_decay_is_the_coupled_equivalent():
    group = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-8, "width_lr_mult": 0.25, "width_wd_mult": 2.0, "peak_lr": 0.04}
    found = {law: effective({**group, "decay": law}).weight_decay for law in LAWS}
    assert found == pytest.approx({"coupled": 0.2, "independent": 5.0, "corrected": 0.05, "huber": 0.2})
    model = torch.nn.Linear(4, 4, bias=False)
    groups = lwadamw.param_groups(model, 4, width=4)
    text = summary(AdamW(groups, lr=0.01, weight_decay=0.1, decay="independent")).splitlines()
    assert "decay independent" in text[0]
    assert text[2].split()[-4:-1] == ["0.01", "10", "10"]
    assert "decay" not in summary(AdamW(model.parameters())).splitlines()[0].replace("weight_decay", "")


def test_a_plain_adamw_has_no_new_keys():
    params = make_params([(3,)])
    ours, theirs = AdamW(params), torch.optim.AdamW(params)
    explicit = AdamW(params, decay="coupled", huber_scale=1.0, peak_lr=None)
    assert ours.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    assert explicit.state_dict() == ours.state_dict()


@pytest.mark.parametrize("law", LAWS)
def test_a_checkpoint_goes_on_bit_for_bit(law, backend, device):
    params = make_params([(40,), (9, 9)], device)
    optimizer = AdamW(params, lr=PEAK, weight_decay=2.0, decay=law, backend=backend, huber_scale=0.5)
    for lr in (0.01, 0.02):
        optimizer.param_groups[0]["lr"] = lr
        set_grads(params)
        optimizer.step()
    copies = clone_params(params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    # Its own lr is another: as in torch, all numbers are the checkpoint's.
    resumed = AdamW(copies, lr=7.0, weight_decay=2.0, decay=law, backend=backend)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0].get("peak_lr") == (PEAK if law in ("independent", "corrected") else None)
    for _ in range(2):
        set_grads(params, copies)
        optimizer.step()
        resumed.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(v, resumed.state[q][key]) for key, v in optimizer.state[p].items())


def test_a_checkpoint_of_torch_keeps_the_law(backend, device):
    params = make_params([(40,)], device)
    theirs = torch.optim.AdamW(params, lr=0.01)
    set_grads(params)
    theirs.step()
    for law in LAWS[1:]:
        optimizer = AdamW(params, lr=PEAK, decay=law, backend=backend)
        optimizer.load_state_dict(theirs.state_dict())
        group = optimizer.param_groups[0]
        assert (group["decay"], group["lr"]) == (law, 0.01)
        assert group.get("peak_lr") == (None if law == "huber" else PEAK)
        set_grads(params)
        optimizer.step()
        assert ("huber_threshold" in optimizer.state[params[0]]) == (law == "huber")


@pytest.mark.parametrize(
    ("saved", "here"), [("independent", "coupled"), ("huber", "corrected"), ("corrected", "huber")]
)
def test_a_checkpoint_of_another_law_is_refused(saved, here):
    params = make_params([(40,)])
    state_dict = AdamW(params, decay=saved).state_dict()
    optimizer = AdamW(params, decay=here)
    with pytest.raises(ValueError, match=re.escape(f"group 0 has decay={saved!r} in the checkpoint and {here!r} here")):
        optimizer.load_state_dict(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("decay")
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0].get("decay", "coupled") == here


def test_torch_gets_independent_decay_exactly_and_no_other(device):
    params = make_params([(40,)], device)
    copies = clone_params(params)
    optimizer = AdamW([{"params": params, **{k: WIDTHS[k] for k in GROUP_KEYS}}], lr=PEAK, decay="independent")
    set_grads(params, copies)
    optimizer.step()
    theirs = torch.optim.AdamW(copies)
    theirs.load_state_dict(copy.deepcopy(optimizer.to_torch_state_dict()))
    assert theirs.param_groups[0].keys() == torch.optim.AdamW(copies).param_groups[0].keys()
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p)
    for factor in (1.0, 0.3):
        for o in (optimizer, theirs):
            o.param_groups[0]["lr"] *= factor
        set_grads(params, copies)
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(params[0], copies[0], rtol=1.3e-6, atol=1e-6)
    for law in ("corrected", "huber"):
        with pytest.raises(ValueError, match=f"group 0 has decay='{law}'"):
            AdamW(params, decay=law).to_torch_state_dict()


def test_a_huber_checkpoint_for_torch_has_no_threshold(device):
    params = make_params([(40,)], device)
    optimizer = AdamW(params, decay="huber")
    set_grads(params)
    optimizer.step()
    optimizer.param_groups[0]["decay"] = "coupled"
    assert optimizer.to_torch_state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


ERRORS = {
    "unknown": (
        {"decay": "decoupled"},
        r"decay='decoupled' is not one of 'coupled', 'independent', 'corrected', 'huber'",
    ),
    "no peak": ({"decay": "independent", "lr": 0.0}, r"group 0: peak_lr=0\.0 is not a positive number.*Give peak_lr="),
    "bad peak": ({"decay": "corrected", "peak_lr": float("nan")}, r"group 0: peak_lr=nan is not a positive number"),
    "bad scale": ({"decay": "huber", "huber_scale": -1.0}, r"group 0: huber_scale=-1\.0 is not a positive number"),
    "differentiable": ({"decay": "huber", "differentiable": True}, "group 0: differentiable=True asks for torch's"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_is_wrong(name):
    options, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        AdamW(make_params([(3,)]), **options)
    optimizer = AdamW(make_params([(3,)]))
    with pytest.raises(ValueError, match=message.replace("group 0", "group 1")):
        optimizer.add_param_group({"params": make_params([(3,)]), **options})
    assert len(optimizer.param_groups) == 1


def test_huber_refuses_what_has_no_mean_of_its_own(backend, device):
    with pytest.raises(ValueError, match="decay='huber' compares weights"):
        AdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))], decay="huber")
    (p,) = make_params([(4, 2)], device)
    optimizer = AdamW([("w", p)], decay="huber", backend=backend)
    set_grads([p])
    before = p.detach().clone()
    p._local_tensor = p.detach()[:2]  # as a DTensor has it
    with pytest.raises(
        RuntimeError, match=re.escape("decay='huber' of 'w' (4, 2), of which this process holds (2, 2)")
    ):
        optimizer.step()
    del p._local_tensor
    assert torch.equal(p, before)
    optimizer.state[p]["huber_threshold"] = torch.zeros(2)
    with pytest.raises(RuntimeError, match=re.escape("huber_threshold of 'w' (4, 2) is torch.float32[2]")):
        optimizer.step()
    assert torch.equal(p, before)


def test_laws_survive_a_copy():
    params = make_params([(3,)])
    optimizer = copy.deepcopy(AdamW(params, lr=PEAK, decay="independent"))
    optimizer.add_param_group({"params": make_params([(2,)]), "lr": 0.5})
    assert [(g["decay"], g["peak_lr"]) for g in optimizer.param_groups] == [("independent", PEAK), ("independent", 0.5)]


def test_reference_laws_at_hand_values():
    def after(**options):
        p = reference.Parameter(np.array([1.0, -10.0]), reference.Group(lr=0.5, weight_decay=0.2, **options))
        reference.step([p], [np.zeros(2)])
        return p.value.tolist()

    assert after() == [0.9, -9.0]
    assert after(decay="independent", peak_lr=2.0) == pytest.approx([0.95, -9.5])
    assert after(decay="corrected", peak_lr=2.0) == pytest.approx([0.975, -9.75])
    assert after(decay="huber") == pytest.approx([1 / 1.1, -10 + 0.1 * 5.5])
