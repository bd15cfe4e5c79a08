"""Each tracker gets readings by its own call and under the names it expects, without unknown values."""

import math

import numpy as np
import pytest
import torch

from lwadamw import AdamW, Monitor, param_groups
from lwadamw.loggers import LightningHooks, TensorBoardLogger, WandbLogger, report_to_composer
from lwadamw.monitor.reading import Reading

ONE = np.ones(2)
READING = Reading(
    70,
    ("a.weight", "b"),
    ("matrix", "vector"),
    ONE,
    ONE,
    ONE,
    {"gain": np.array([2.0, math.nan]), "weight_rms": ONE * 3},
)
EXPECTED = {
    "net/gain/a.weight": 2.0,
    "net/weight_rms/a.weight": 3.0,
    "net/weight_rms/b": 3.0,
    "net/role/matrix/gain": 2.0,
    "net/role/matrix/weight_rms": 3.0,
    "net/role/vector/weight_rms": 3.0,
}


class Calls(list):
    """A list of the calls of every method: name, arguments, keyword arguments."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.append((name, args, kwargs))


def test_tensorboard_gets_a_scalar_per_value():
    writer = Calls()
    TensorBoardLogger(writer, "net/")(READING)
    assert {name for name, _, _ in writer} == {"add_scalar"}
    assert {args[0]: args[1] for _, args, _ in writer} == EXPECTED
    assert {args[2] for _, args, _ in writer} == {70}


def test_wandb_gets_one_dict_with_the_step_of_the_optimizer():
    run = Calls()
    WandbLogger(run, "net/")(READING)
    assert run == [("log", (EXPECTED,), {"step": 70})]


def test_with_roles_only_trackers_get_the_values_of_roles():
    writer, run = Calls(), Calls()
    TensorBoardLogger(writer, "net/", roles_only=True)(READING)
    WandbLogger(run, "net/", roles_only=True)(READING)
    expected = {name: value for name, value in EXPECTED.items() if name.startswith("net/role/")}
    assert {args[0]: args[1] for _, args, _ in writer} == run[0][1][0] == expected


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3, bias=False))


def _step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(5, 6)).square().sum().backward()
    optimizer.step()


def test_lightning_logs_every_reading_once_at_the_end_of_its_batch():
    class Callback:
        def __init__(self):
            self.made = True

    class LogReadings(LightningHooks, Callback):
        pass

    model = _model()
    optimizer = AdamW(model.named_parameters(), weight_decay=0.1)
    monitor = Monitor(optimizer, every=2, spectrum_every=0)
    callback, module = LogReadings(monitor), Calls()
    assert callback.made
    callback.on_train_batch_end(None, module, None, None, 0)
    assert module == []
    for i in range(4):
        _step(model, optimizer)
        callback.on_train_batch_end(None, module, None, None, i)
    assert [name for name, _, _ in module] == ["log_dict"] * 3  # after steps 1, 2 and 4
    assert module[-1][1] == (monitor.as_dict(),)
    assert "relative_update/0.weight" in module[-1][1][0]


def _composer(model, optimizer):
    """Do what `OptimizerMonitor.batch_end` of Composer does in one process."""
    out = {}
    for name, p in model.named_parameters(prefix="module"):
        if p.grad is not None:
            out = optimizer.report_per_parameter_metrics(p, name, out)
            if f"l2_norm/grad/{name}" not in out:
                out[f"l2_norm/grad/{name}"] = "by composer"
    return out


def test_composer_gets_norms_under_its_own_names(monkeypatch):
    model = _model()
    optimizer = AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    remove = report_to_composer(optimizer)
    reads = []
    norms = optimizer.norms
    monkeypatch.setattr(optimizer, "norms", lambda: reads.append(1) or norms())
    for step in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        _step(model, optimizer)
        found = _composer(model, optimizer)
        assert len(reads) == step + 1
        assert len(found) == 4 * 3
        for name, p in model.named_parameters():
            update = (p.detach().double() - before[name].double()).norm().item()
            weight = p.detach().double().norm().item()
            expected = {"param": weight, "update": update, "grad": p.grad.double().norm().item()}
            for kind, value in expected.items():
                assert found[f"l2_norm/{kind}/module.{name}"] == pytest.approx(value, rel=1e-4)
            assert found[f"l2_norm_ratio/update_param/module.{name}"] == pytest.approx(update / weight, rel=1e-4)
    remove()
    assert not hasattr(optimizer, "report_per_parameter_metrics")


def test_composer_gets_one_norm_for_a_parameter_with_segments(backend, device):
    """Composer computes its global norm from every `l2_norm/grad`, so a parameter must not count twice."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False)).to(device)
    groups = param_groups(model, 6, width=6, roles={"0.weight": "matrix"}, segments={"0.weight": 2})
    optimizer = AdamW(groups, backend=backend)
    report_to_composer(optimizer)
    model(torch.randn(5, 6, device=device)).sum().backward()
    optimizer.step()
    found = _composer(model, optimizer)
    assert len(optimizer.norm_names()) == 2
    assert [name for name in found if name.startswith("l2_norm/grad")] == ["l2_norm/grad/module.0.weight"]
    assert found["l2_norm/grad/module.0.weight"] == pytest.approx(model[0].weight.grad.norm().item(), rel=1e-5)
    assert found["l2_norm/param/module.0.weight"] == pytest.approx(model[0].weight.norm().item(), rel=1e-5)


def test_composer_computes_a_norm_that_is_not_known():
    model = _model()
    optimizer = AdamW(model.named_parameters())
    report_to_composer(optimizer)
    _step(model, optimizer)
    weight = model[0].weight
    weight.grad = None  # The torch backend reads gradients only when norms are asked for.
    found = optimizer.report_per_parameter_metrics(weight, "w", {})
    assert set(found) == {"l2_norm/param/w", "l2_norm/update/w", "l2_norm_ratio/update_param/w"}
