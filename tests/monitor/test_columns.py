"""The columns of a reading: they hold what float64 finds from the weights, for every segment and every kind of step."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import lwadamw
from lwadamw import AdamW, Monitor, param_groups
from tests.cases import make_params, set_grads, train_on_noise

SHAPES = [(30, 20), (12,), (5, 40)]


def _rms(p):
    """Return the RMS of a tensor in float64."""
    return p.detach().double().square().mean().sqrt().item()


def test_columns_equal_what_float64_computes_from_the_weights(backend, device):
    params = make_params(SHAPES, device)
    settings = [
        {"params": [("a", params[0]), ("b", params[1])], "lr": 3e-2, "weight_decay": 0.5, "betas": (0.8, 0.9)},
        {"params": [("c", params[2])], "lr": 1e-2, "weight_decay": 2.0, "width_lr_mult": 0.5, "width_wd_mult": 0.25},
    ]
    optimizer = AdamW(settings, backend=backend)
    monitor = Monitor(optimizer, every=3)
    squares, taus = [], np.zeros(3)
    for step in range(1, 7):
        before = [p.detach().double().clone() for p in params]
        set_grads(params)
        optimizer.step()
        squares = squares or [_rms(p) ** 2 for p in params]
        if step not in (1, 3, 6):
            continue
        reading = monitor.latest
        assert (reading.step, reading.names) == (step, ("a", "b", "c"))
        np.testing.assert_array_equal(reading.lr, [3e-2, 3e-2, 5e-3])
        np.testing.assert_array_equal(reading.weight_decay, [0.5, 0.5, 0.5])
        lr, wd, beta1 = reading.lr, reading.weight_decay, np.array([0.8, 0.8, 0.9])
        after = [p.detach().double() for p in params]
        rms = np.array([_rms(p) for p in params])
        update = np.array([((p - b).norm() / p.norm()).item() for p, b in zip(after, before, strict=True)])
        angle = np.array(
            [
                math.acos(torch.cosine_similarity(p.flatten(), b.flatten(), dim=0))
                for p, b in zip(after, before, strict=True)
            ]
        )
        steady_update = np.sqrt(2 * lr * wd * (1 - beta1) / (1 + beta1))
        taus = (step - 1) * lr * wd
        expected = {
            "weight_rms": rms,
            "steady_rms": np.sqrt(lr / (2 * wd)),
            "rms_ratio": rms / np.sqrt(lr / (2 * wd)),
            "relative_update": update,
            "steady_update": steady_update,
            "update_ratio": update / steady_update,
            "rotation": angle,
            "rotation_ratio": angle / steady_update,
            "taus": taus,
        }
        for name, values in expected.items():
            np.testing.assert_allclose(reading.columns[name], values, rtol=1e-3, err_msg=name)
    assert len(monitor.readings) == 3


def test_carried_singular_values_are_exact_if_only_the_norm_changes(backend, device):
    (p,) = make_params([(30, 20)], device)
    optimizer = AdamW([("p", p)], lr=0.0, weight_decay=0.1, backend=backend)
    monitor = Monitor(optimizer, every=1, spectrum_every=100)
    train_on_noise(optimizer, 4)
    exact = torch.linalg.svdvals(p.detach().double())[:2].cpu().numpy()
    with torch.no_grad():
        p.mul_(3)
    train_on_noise(optimizer, 1)
    columns = monitor.latest.columns
    assert columns["calibrated_at"] == [4]
    # The error of the power iteration itself is below a thousandth here.
    assert [columns["top"][0], columns["second"][0]] == pytest.approx(3 * exact, rel=1e-3)
    assert columns["top"] == pytest.approx(3 * monitor.readings[-2].columns["top"], rel=1e-6)
    assert columns["bulk"] == pytest.approx(3 * monitor.readings[-2].columns["bulk"], rel=1e-6)


def test_a_forgotten_spectrum_is_measured_at_the_next_reading():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    monitor = Monitor(optimizer, every=1, spectrum_every=100)
    train_on_noise(optimizer, 5)
    assert monitor.latest.columns["calibrated_at"] == [4]
    monitor.forget_spectrum()
    train_on_noise(optimizer, 1)
    assert monitor.latest.columns["calibrated_at"] == [6]


def test_spectra_are_measured_often_at_the_start():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    monitor = Monitor(optimizer, every=5, spectrum_every=40)
    train_on_noise(optimizer, 95)
    measured = dict.fromkeys(int(r.columns["calibrated_at"][0]) for r in monitor.readings)
    assert list(measured) == [1, 5, 10, 20, 40, 80]
    assert [r.step for r in monitor.readings] == [1, *range(5, 96, 5)]


def test_every_segment_has_its_own_values(backend, device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)
            self.experts = nn.Parameter(torch.randn(3, 10, 8))

    model = Model().to(device)
    groups = param_groups(
        model, 4, width=8, roles={"experts": lwadamw.Matrix()}, segments={"qkv.weight": 3, "experts": 3}
    )
    optimizer = AdamW(groups, lr=1e-3, weight_decay=0.1, backend=backend)
    monitor = Monitor(optimizer, every=2)
    train_on_noise(optimizer, 2)
    reading = monitor.latest
    parts = {f"experts[{i}]": model.experts[i] for i in range(3)}
    parts |= {f"qkv.weight[{i}]": part for i, part in enumerate(model.qkv.weight.split(8))}
    assert set(reading.names) == set(parts)
    for i, name in enumerate(reading.names):
        part = parts[name].detach()
        assert reading.columns["weight_rms"][i] == pytest.approx(_rms(part), rel=1e-5)
        assert reading.columns["top"][i] == pytest.approx(torch.linalg.matrix_norm(part, ord=2).item(), rel=0.01)
    assert reading.roles == ("matrix",) * 6
    assert reading.m.tolist() == [2.0] * 6


def test_a_learning_rate_in_a_tensor_is_followed(backend, device):
    lr = torch.tensor(0.02, device=device)
    (p,) = make_params([(6, 5)], device)
    optimizer = AdamW([p], lr=lr, weight_decay=1.0, backend=backend)
    monitor = Monitor(optimizer, every=5, spectrum_every=0)
    train_on_noise(optimizer, 5)
    lr.fill_(0.01)
    train_on_noise(optimizer, 5)
    assert monitor.latest.lr == pytest.approx([0.01])
    # The tensor is read at steps 1, 5 and 10. A new value counts from the next reading on.
    assert monitor.latest.columns["taus"] == pytest.approx([4 * 0.02 + 4 * 0.02 + 0.01])


def test_skipped_steps_do_not_count_as_tau(backend, device):
    (p,) = make_params([(6, 5)], device)
    optimizer = AdamW([p], lr=0.02, weight_decay=1.0, max_grad_norm=1.0, backend=backend)
    monitor = Monitor(optimizer, every=5, spectrum_every=0)
    train_on_noise(optimizer, 1)
    for step in range(2, 11):
        set_grads([p])
        if step in (3, 7, 8, 10):
            p.grad[0, 0] = math.nan
        optimizer.step()
    assert monitor.readings[1].columns["taus"] == pytest.approx([3 * 0.02])
    assert monitor.latest.columns["taus"] == pytest.approx([5 * 0.02])
    assert monitor.step == 10
    assert np.isnan(monitor.latest.columns["update_ratio"]), "the last step was skipped"
    assert not np.isnan(monitor.latest.columns["rms_ratio"])


def test_a_parameter_starts_with_its_first_gradient():
    """One parameter gets its first gradient later, and one is added to the optimizer later."""
    params = make_params([(6, 5), (5, 6), (4, 4)])
    optimizer = AdamW(params[:2], lr=0.1, weight_decay=1.0)
    monitor = Monitor(optimizer, every=1, spectrum_every=0)
    params[0].grad = torch.randn(6, 5)
    for _ in range(5):
        optimizer.step()
    train_on_noise(optimizer, 3)
    assert monitor.latest.names == ("0.0", "0.1")
    assert monitor.latest.columns["taus"] == pytest.approx([0.7, 0.2])
    optimizer.add_param_group({"params": [params[2]], "lr": 0.3})
    train_on_noise(optimizer, 2)
    assert monitor.latest.columns["taus"] == pytest.approx([0.9, 0.4, 0.3])
    params[0].grad = None
    optimizer.step()
    assert np.isnan(monitor.latest.columns["update_ratio"]).tolist() == [True, False, False]


@pytest.mark.parametrize("every", [1, 4])
def test_steps_without_a_gradient_do_not_count(every, backend, device):
    """A layer is frozen for 40 steps and trains on. A layer that never trained has not forgotten its initial weights."""
    params = make_params([(6, 5), (30, 20)], device)
    optimizer = AdamW([("a", params[0]), ("b", params[1])], lr=0.1, weight_decay=1.0, backend=backend)
    monitor = Monitor(optimizer, every=every, spectrum_every=0)
    train_on_noise(optimizer, 8)
    before = monitor.latest.columns["expected_rms"]
    params[1].grad = None
    for _ in range(40):
        set_grads(params[:1])
        optimizer.step()
    assert monitor.latest.columns["taus"] == pytest.approx([4.7, 0.7])
    assert monitor.latest.columns["expected_rms"][1] == pytest.approx(before[1])
    assert monitor.verdicts["a"].startswith("steady from step")
    assert monitor.verdicts["b"].startswith("not before step")
    train_on_noise(optimizer, 8)
    assert monitor.latest.columns["taus"] == pytest.approx([5.5, 1.5])


@pytest.mark.parametrize("zero_at", [49, 99])
def test_a_learning_rate_of_zero_ends_no_decay_law(zero_at):
    """Corrected decay is proportional to the lr. At lr 0 its effective value is 0, and the group still decays."""
    (p,) = make_params([(30, 20)])
    optimizer = AdamW([("w", p)], lr=0.1, weight_decay=1.0, decay="corrected")
    monitor = Monitor(optimizer, every=5, spectrum_every=0, steps=100)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.0 if step == zero_at else 0.1
        train_on_noise(optimizer, 1)
        assert monitor.latest.unbounded == ()
    assert monitor.latest.columns["taus"] == pytest.approx([9.8])
    assert monitor.verdicts == {"w": "steady from step 31"}
    assert "no weight decay" not in monitor.report()


def _packed(backend, device, segments):
    """Make experts of two layers, their optimizer and its monitor. One expert of the second layer is three times as large."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in model.layers:
        layer.experts = nn.Parameter(torch.randn(6, 10, 8, device=device))
    with torch.no_grad():
        model.layers[1].experts[4] *= 3
    split = {"segments": {"*experts": 6}} if segments else {}
    groups = param_groups(model, 4, width=8, roles={"*experts": lwadamw.Matrix()}, **split)
    optimizer = AdamW(groups, lr=1e-3, weight_decay=0.1, backend=backend)
    return model, optimizer, Monitor(optimizer, every=2)


@pytest.mark.parametrize("segments", [True, False])
def test_the_worst_of_packed_experts_is_named(segments, backend, device):
    """Without segments, top, second and bulk of a parameter are those of the expert with the largest top."""
    model, optimizer, monitor = _packed(backend, device, segments)
    train_on_noise(optimizer, 2)
    columns, names = monitor.latest.columns, list(monitor.latest.names)
    for i, layer in enumerate(model.layers):
        values = torch.linalg.svdvals(layer.experts.detach().double())
        worst = int(values[:, 0].argmax())
        row = names.index(f"layers.{i}.experts[{worst}]" if segments else f"layers.{i}.experts")
        assert columns["top"][row] == pytest.approx(values[worst, 0].item(), rel=0.01)
        assert columns["second"][row] == pytest.approx(values[worst, 1].item(), rel=0.01)
        assert columns["bulk"][row] <= 1.2 * values[worst, 0].item()
        if not segments:
            assert columns["top_of"][row] == worst
    assert ("top_of" in columns) is not segments
    assert "top_of" not in monitor.by_role()["matrix"]
    key, count = ("layers.*.experts[*]", 12) if segments else ("layers.*.experts", 2)
    lines = monitor.report(100).splitlines()
    top = np.nanmax(columns["top"])
    assert f"largest top of {key}: {top:.3g} in layers.1.experts[4]" in lines
    assert sum(line.startswith(f"{key} x{count} ") for line in lines) == 1


def test_a_top_of_packed_experts_follows_their_norm_until_the_next_measurement():
    model, optimizer, monitor = _packed("torch", "cpu", False)
    train_on_noise(optimizer, 2)
    before = monitor.latest.columns["top"].copy()
    monitor.spectrum_every, monitor._first = 1000, -500
    with torch.no_grad():
        for p in model.parameters():
            p *= 2
    train_on_noise(optimizer, 2)
    assert monitor.latest.columns["calibrated_at"].tolist() == [2, 2]
    np.testing.assert_allclose(monitor.latest.columns["top"], 2 * before, rtol=0.01)
