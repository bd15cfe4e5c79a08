"""What a monitor says is what float64 says of the weights, and what it predicts is what noise does under any schedule."""

import copy
import gc
import json
import math
import pickle
import re
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import lwadamw
from lwadamw import AdamW, Monitor, param_groups
from tests.cases import make_params, set_grads, train_on_noise

SHAPES = [(30, 20), (12,), (5, 40)]


def _rms(p):
    return p.detach().double().square().mean().sqrt().item()


def test_columns_are_float64s_of_the_weights(backend, device):
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


def test_carrying_over_is_exact_where_only_the_norm_changes(backend, device):
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
    # What is left of the power iteration's own error is below a thousandth here.
    assert [columns["top"][0], columns["second"][0]] == pytest.approx(3 * exact, rel=1e-3)
    assert columns["top"] == pytest.approx(3 * monitor.readings[-2].columns["top"], rel=1e-6)
    assert columns["bulk"] == pytest.approx(3 * monitor.readings[-2].columns["bulk"], rel=1e-6)


def test_spectra_are_measured_often_at_the_start():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    monitor = Monitor(optimizer, every=5, spectrum_every=40)
    train_on_noise(optimizer, 95)
    measured = dict.fromkeys(int(r.columns["calibrated_at"][0]) for r in monitor.readings)
    assert list(measured) == [1, 5, 10, 20, 40, 80]
    assert [r.step for r in monitor.readings] == [1, *range(5, 96, 5)]


def test_segments_are_matrices_of_their_own(device):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24, bias=False)
            self.experts = nn.Parameter(torch.randn(3, 10, 8))

    model = Model().to(device)
    groups = param_groups(
        model, 4, width=8, roles={"experts": lwadamw.Matrix()}, segments={"qkv.weight": 3, "experts": 3}
    )
    optimizer = AdamW(groups, lr=1e-3, weight_decay=0.1, backend="triton")
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


def test_the_torch_backend_has_one_row_for_all_segments():
    model = nn.Linear(8, 24, bias=False)
    groups = param_groups(model, 4, width=8, roles={"weight": "matrix"}, segments={"weight": 3})
    optimizer = AdamW(groups, weight_decay=0.1, backend="torch")
    with Monitor(optimizer) as monitor:
        train_on_noise(optimizer, 1)
    assert monitor.latest.names == ("weight",)
    assert monitor.latest.columns["weight_rms"][0] == pytest.approx(_rms(model.weight), rel=1e-5)
    top = torch.linalg.matrix_norm(model.weight.detach(), ord=2).item()
    assert monitor.latest.columns["top"][0] == pytest.approx(top, rel=0.01)


def test_a_learning_rate_in_a_tensor_is_followed(backend, device):
    lr = torch.tensor(0.02, device=device)
    (p,) = make_params([(6, 5)], device)
    optimizer = AdamW([p], lr=lr, weight_decay=1.0, backend=backend)
    monitor = Monitor(optimizer, every=10, spectrum_every=0)
    train_on_noise(optimizer, 10)
    lr.fill_(0.01)
    train_on_noise(optimizer, 10)
    assert monitor.latest.lr == pytest.approx([0.01])
    # Read at steps 1, 10 and 20: what changed in between counts from then on.
    assert monitor.latest.columns["taus"] == pytest.approx([9 * 0.02 + 9 * 0.02 + 0.01])


def test_skipped_steps_do_not_age_weights(backend, device):
    (p,) = make_params([(6, 5)], device)
    optimizer = AdamW([p], lr=0.02, weight_decay=1.0, max_grad_norm=1.0, backend=backend)
    monitor = Monitor(optimizer, every=10, spectrum_every=0)
    train_on_noise(optimizer, 1)
    for step in range(2, 21):
        set_grads([p])
        if step in (4, 15, 16, 20):
            p.grad[0, 0] = math.nan
        optimizer.step()
    assert monitor.readings[1].columns["taus"] == pytest.approx([8 * 0.02])
    assert monitor.latest.columns["taus"] == pytest.approx([15 * 0.02])
    assert monitor.step == 20
    assert np.isnan(monitor.latest.columns["update_ratio"]), "the last one did not happen"
    assert not np.isnan(monitor.latest.columns["rms_ratio"])


def test_a_parameter_starts_with_its_first_gradient_and_may_come_later():
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


def test_training_is_the_same_with_a_monitor(backend, device):
    ours = make_params([(20, 30), (7,)], device)
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    watched, plain = (AdamW(params, backend=backend, max_grad_norm=1.0) for params in (ours, theirs))
    monitor = Monitor(watched, every=2, spectrum_every=2)
    for _ in range(5):
        set_grads(ours, theirs)
        watched.step()
        plain.step()
    assert len(monitor.readings) == 3
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_remove_detaches_and_readings_stay():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    with Monitor(optimizer, every=1) as monitor:
        train_on_noise(optimizer, 2)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    train_on_noise(optimizer, 2)
    assert (monitor.step, len(monitor.readings), monitor.latest.step) == (2, 2, 2)
    monitor.remove()


def test_copies_have_no_monitor_and_checkpoints_do_not_know_it():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    saved = optimizer.state_dict()
    monitor = Monitor(optimizer, every=1)
    assert optimizer.state_dict() == saved
    train_on_noise(optimizer, 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        train_on_noise(other, 3)
    assert monitor.step == 2
    again = Monitor(other, every=1)
    train_on_noise(other, 1)
    assert again.latest.step == 6, "it goes on counting"


def test_a_monitor_that_nobody_holds_goes_with_its_optimizer():
    optimizer = AdamW(make_params([(6, 5)]))
    monitor = Monitor(optimizer)
    seen = []
    weakly = weakref.ref(monitor, seen.append)
    del monitor, optimizer
    gc.collect()
    assert weakly() is None
    assert len(seen) == 1


def test_steps_with_a_closure_and_a_scaler_are_seen():
    model = nn.Linear(4, 3)
    optimizer = AdamW(model.parameters(), backend="triton")
    monitor = Monitor(optimizer, every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(2, 4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    loss = model(torch.randn(2, 4)).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert [reading.step for reading in monitor.readings] == [1, 2]
    assert (monitor.latest.columns["relative_update"] > 0).all()


class _Probe:
    def __init__(self, columns):
        self.columns, self.calls = columns, []

    def before_step(self):
        self.calls.append("before")

    def after_step(self):
        self.calls.append("after")
        return self.columns


def test_a_probe_is_asked_around_the_steps_with_a_spectrum():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    probe = _Probe({"gain": np.array([2.5])})
    monitor = Monitor(optimizer, every=2, spectrum_every=8, probe=probe)
    train_on_noise(optimizer, 9)
    assert [r.step for r in monitor.readings if "gain" in r.columns] == [1, 2, 4, 8]
    assert probe.calls == ["before", "after"] * 4
    assert monitor.readings[0].columns["gain"] == [2.5]
    probe.columns = {"gain": np.zeros(2)}
    with pytest.raises(ValueError, match=r"'gain' has shape \(2,\), 1 segments need \(1,\)"):
        train_on_noise(optimizer, 16)


def test_a_probe_batch_becomes_a_probe():
    model = nn.Linear(5, 4, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    monitor = Monitor(optimizer, model, every=1, probe=torch.randn(7, 5))
    before = model.weight.detach().clone()
    train_on_noise(optimizer, 1)
    x = monitor.probe.batch
    gain = (x @ before.T).square().mean().sqrt() / x.square().mean().sqrt()
    assert monitor.latest.columns["gain"] == pytest.approx([gain.item()], rel=1e-4)


def _model_with_roles():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(3))
            self.norm = nn.LayerNorm(8)

    model = Model()
    optimizer = AdamW(param_groups(model, 4, rule="fan2025"), lr=1e-2, weight_decay=1.0)
    return optimizer, Monitor(optimizer, every=5, steps=1000)


def test_as_dict_and_by_role_are_the_readings():
    optimizer, monitor = _model_with_roles()
    assert (monitor.latest, monitor.as_dict(), monitor.by_role()) == (None, {}, {})
    train_on_noise(optimizer, 5)
    columns, names = monitor.latest.columns, monitor.latest.names
    flat = monitor.as_dict("lw/")
    assert flat["lw/rms_ratio/layers.1.weight"] == columns["rms_ratio"][names.index("layers.1.weight")]
    matrices = [i for i, role in enumerate(monitor.latest.roles) if role == "matrix"]
    assert len(matrices) == 3
    median = np.median(columns["top"][matrices])
    assert flat["lw/role/matrix/top"] == monitor.by_role()["matrix"]["top"] == median
    assert set(monitor.by_role()) == {"matrix", "vector"}
    assert "rms_ratio" not in monitor.by_role()["vector"]
    assert "lw/rms_ratio/embed.weight" not in flat
    assert all(type(value) is float and math.isfinite(value) for value in flat.values())


def test_the_report_has_a_line_per_role_and_kind_of_layer():
    optimizer, monitor = _model_with_roles()
    assert monitor.report() == "no reading yet: the first is after step 1"
    train_on_noise(optimizer, 10)
    lines = monitor.report().splitlines()
    assert lines[0].startswith("step 10 of 1000   median")
    assert [re.split(r"\s{2,}", line)[0] for line in lines[2:]] == [
        "role vector x3",
        "role matrix x3",
        "embed.weight",
        "norm.weight",
        "norm.bias",
        "layers.*.weight x3",
    ]
    ratios = monitor.latest.columns["rms_ratio"]
    shown = f"{np.nanmedian(ratios):.3g} ({np.nanmin(ratios):.3g} to {np.nanmax(ratios):.3g})"
    assert shown in lines[3]
    assert lines[3].endswith("  " + monitor.verdicts["layers.0.weight"])
    assert lines[2].endswith("  no decay")


def test_readings_are_bounded_and_announced():
    (p,) = make_params([(6, 5)])
    optimizer = AdamW([p])
    monitor = Monitor(optimizer, every=1, history=3)
    heard = []
    monitor.on_reading.append(heard.append)
    train_on_noise(optimizer, 5)
    assert [r.step for r in monitor.readings] == [3, 4, 5]
    assert [r.step for r in heard] == [1, 2, 3, 4, 5]
    assert heard[-1] is monitor.latest


def test_save_writes_a_profile(tmp_path):
    optimizer, monitor = _model_with_roles()
    train_on_noise(optimizer, 5)
    monitor.save(tmp_path / "proxy.json", batch=7)
    assert (tmp_path / "proxy.json").read_text().count("layers.1.weight") == 1


def test_what_cannot_be_monitored_is_an_error_with_a_remedy():
    params = make_params([(6, 5)])
    optimizer = AdamW(params)
    with pytest.raises(TypeError, match=r"torch\.optim\.adamw\.AdamW does not measure its steps\. Use lwadamw\.AdamW"):
        Monitor(torch.optim.AdamW(params))
    with pytest.raises(RuntimeError, match="norms=False. Build it with norms=True"):
        Monitor(AdamW(params, norms=False))
    with pytest.raises(ValueError, match="every=0 is not a whole number >= 1"):
        Monitor(optimizer, every=0)
    with pytest.raises(ValueError, match="spectrum_every=-1 is not"):
        Monitor(optimizer, spectrum_every=-1)
    with pytest.raises(ValueError, match="steps=2.5 is not"):
        Monitor(optimizer, steps=2.5)
    with pytest.raises(ValueError, match="needs the model it is for. Give model="):
        Monitor(optimizer, probe=torch.randn(2, 5))
    with pytest.raises(ValueError, match="spectrum_every=0 is never asked"):
        Monitor(optimizer, probe=_Probe({}), spectrum_every=0)
    params[0]._local_tensor = torch.zeros(3, 5)  # as a DTensor has
    with pytest.raises(RuntimeError, match=r"\(6, 5\) is sharded over processes.* Add optimizer\.norm_sums\(\) up"):
        Monitor(optimizer)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_a_resumed_run_is_monitored_as_one_that_never_stopped(backend, device):
    """Under a warm-up, its state through JSON."""
    weights = [p.detach().clone() for p in make_params(SHAPES, device)]
    grads = [[torch.randn_like(w) for w in weights] for _ in range(60)]

    def begin():
        params = [nn.Parameter(w.clone()) for w in weights]
        groups = [{"params": [("a", params[0]), ("b", params[1])]}, {"params": [("c", params[2])], "weight_decay": 0.0}]
        optimizer = AdamW(groups, lr=0.1, weight_decay=1.0, backend=backend)
        return params, optimizer, Monitor(optimizer, every=7, spectrum_every=14, steps=60)

    def train(params, optimizer, steps):
        for step in steps:
            optimizer.param_groups[0]["lr"] = 0.1 * min(1.0, (step + 1) / 25)
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g
            optimizer.step()

    whole = begin()
    train(*whole[:2], range(60))
    params, optimizer, monitor = begin()
    train(params, optimizer, range(31))
    saved, state = copy.deepcopy(optimizer.state_dict()), json.loads(json.dumps(monitor.state_dict()))
    values = [p.detach().clone() for p in params]
    params, optimizer, monitor = begin()
    with torch.no_grad():
        for p, v in zip(params, values, strict=True):
            p.copy_(v)
    with pytest.raises(ValueError, match="the state is of step 31, and the optimizer has taken 0"):
        monitor.load_state_dict(state)
    optimizer.load_state_dict(saved)
    monitor = Monitor(optimizer, every=7, spectrum_every=14, steps=60)
    monitor.load_state_dict(state)
    train(params, optimizer, range(31, 60))
    assert [reading.step for reading in monitor.readings] == [35, 42, 49, 56]
    assert monitor.verdicts == whole[2].verdicts
    assert "steady from step" in monitor.verdicts["a"]
    for ours, theirs in zip(monitor.readings, list(whole[2].readings)[-4:], strict=True):
        for column, expected in theirs.columns.items():
            if column in ("top", "second", "bulk", "calibrated_at"):
                continue
            np.testing.assert_allclose(ours.columns[column], expected, rtol=1e-5, err_msg=column)
    assert np.isfinite(monitor.readings[0].columns["top"][0])
