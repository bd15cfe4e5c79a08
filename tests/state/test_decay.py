"""Every decay law is the float64 reference's on both backends, follows schedules, and moves nothing at lr 0."""

import copy

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
    assert_matches_reference,
    make_optimizer,
    make_params,
    make_reference,
    reference_step,
    set_grads,
)
from tests.state.decays import PEAK, WIDTHS, make

HUBER_SHAPES = ((), (63,), (0,), (2049,))  # the last shape has two chunks, so that its mean adds up two sums


RATES = (0.0, 0.02, PEAK, 0.01)  # warm-up, peak and decay of a schedule


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
    """The options with the peak_lr that an optimizer built with lr=PEAK takes for itself."""
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
def test_a_skipped_step_leaves_weights_and_thresholds(law, fused, backend, device):
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


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", ["fp32", "fp32, 8 bits", "bf16, remainder", "bf16, stochastic"])
def test_a_learning_rate_of_0_moves_no_weight(name, law, backend, device):
    params, optimizer = make(name, law, backend, device, [(32, 128)] if "8 bits" in name else [(40,)])
    for lr in (PEAK, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        set_grads(params)
        before = [(p.detach().clone(), optimizer.master_weight(p)) for p in params]
        optimizer.step()
        same = [torch.equal(p, w) and torch.equal(optimizer.master_weight(p), m) for p, (w, m) in zip(params, before)]  # noqa: B905
        assert all(same) == (lr == 0) == any(same)


def test_a_law_that_is_set_between_two_steps_holds_from_the_next_step(backend, device):
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
def test_a_learning_rate_in_a_tensor_is_followed(law, backend, device):
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
def test_decay_follows_a_scheduler_from_0_to_its_peak(name, law):
    """Without gradients each step multiplies by 1 - wd (lr/peak), or by 1 - wd lr (lr/peak)."""
    p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    # OneCycleLR has its own peak, and ignores the optimizer's lr.
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


def test_peak_lr_is_the_learning_rate_that_a_group_was_added_with():
    a, b, c, d = (torch.nn.Parameter(torch.zeros(1)) for _ in range(4))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5}, {"params": [c], "lr": 0.1, "initial_lr": 0.7}]
    optimizer = AdamW([*groups, {"params": [d], "decay": "coupled"}], lr=torch.tensor(0.25), decay="independent")
    assert [g.get("peak_lr") for g in optimizer.param_groups] == [0.25, 0.5, 0.7, None]
    assert ["decay" in g for g in optimizer.param_groups] == [True, True, True, False]
    for group in optimizer.param_groups:  # a training loop that assigns lr
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


def test_reference_laws_at_hand_values():
    def after(**options):
        p = reference.Parameter(np.array([1.0, -10.0]), reference.Group(lr=0.5, weight_decay=0.2, **options))
        reference.step([p], [np.zeros(2)])
        return p.value.tolist()

    assert after() == [0.9, -9.0]
    assert after(decay="independent", peak_lr=2.0) == pytest.approx([0.95, -9.5])
    assert after(decay="corrected", peak_lr=2.0) == pytest.approx([0.975, -9.75])
    assert after(decay="huber") == pytest.approx([1 / 1.1, -10 + 0.1 * 5.5])
