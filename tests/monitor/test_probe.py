"""The probe measures gain and alignment at one step like float64 by hand, and leaves model and randomness as they were."""

import numpy as np
import pytest
import torch
from torch import nn

from lwadamw import AdamW, Probe, param_groups
from lwadamw.lab.model import ModelConfig, Transformer
from lwadamw.monitor.inputs import InputSample
from lwadamw.monitor.probe import STATISTICS


class MLP(nn.Module):
    def __init__(self, d=12):
        super().__init__()
        self.up = nn.Linear(d, 3 * d)
        self.down = nn.Linear(3 * d, d, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.down(self.dropout(torch.tanh(self.up(x))))


def _by_hand(x, before, after):
    """Return the statistics of one matrix in float64, in the order of STATISTICS. x holds the inputs, [n, fan_in]."""
    x, w = x.double(), before.double()
    y, dw = x @ w.T, after.double() - before.double()
    dy = x @ dw.T
    of_weight = y.norm() / (w.norm() * x.norm())
    of_update = dy.norm() / (dw.norm() * x.norm())
    gain = y.square().mean().sqrt() / x.square().mean().sqrt()
    return [float(value) for value in (gain, of_weight, of_update, of_update / of_weight, dy.norm() / y.norm())]


def _train_step(model, optimizer, loss):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def _measure(model, optimizer, probe, loss):
    """Measure one step. Return the statistics, the weights before and the weights after."""
    optimizer.zero_grad()
    loss(model).backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    probe.before_step()
    optimizer.step()
    return probe.after_step(), before, {name: p.detach().clone() for name, p in model.named_parameters()}


def test_statistics_of_an_mlp_equal_float64_by_hand(backend, device):
    model = MLP().to(device).eval()
    optimizer = AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.3, backend=backend)
    batch = torch.randn(4, 5, 12, device=device)
    probe = Probe(optimizer, model, batch)
    for _ in range(2):
        target = torch.randn(4, 5, 12, device=device)
        found, before, after = _measure(model, optimizer, probe, lambda m, t=target: (m(batch) - t).square().mean())
    x = batch.double().reshape(-1, 12)
    hidden = torch.tanh(x @ before["up.weight"].double().T + before["up.bias"].double())
    expected = {
        "up.weight": _by_hand(x, before["up.weight"], after["up.weight"]),
        "down.weight": _by_hand(hidden, before["down.weight"], after["down.weight"]),
        "up.bias": [np.nan] * 5,
    }
    assert tuple(found) == STATISTICS
    for i, name in enumerate(optimizer.norm_names()):
        np.testing.assert_allclose([found[key][i] for key in STATISTICS], expected[name], rtol=2e-5, err_msg=name)


def test_statistics_of_a_transformer_equal_float64_by_hand(backend, device):
    model = Transformer(ModelConfig(width=16, depth=2, head_dim=8, context=8, vocab=32)).to(device)
    optimizer = AdamW(param_groups(model, 8), lr=1e-2, weight_decay=0.5, max_grad_norm=1.0, backend=backend)
    tokens = torch.randint(32, (3, 9), device=device)
    _train_step(model, optimizer, lambda m: m.loss(tokens))
    inputs = {}
    probe = Probe(optimizer, model, tokens[:, :-1])
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    found, before, after = _measure(model, optimizer, probe, lambda m: m.loss(tokens))
    for handle in handles:
        handle.remove()
    names = optimizer.norm_names()
    matrices = [n for n in names if n.startswith("layers") and "norm" not in n]
    assert len(matrices) == 2 * 5
    for name in names:
        row = [found[key][names.index(name)] for key in STATISTICS]
        if name in matrices:
            x = inputs[name.removesuffix(".weight")].flatten(0, 1)
            np.testing.assert_allclose(row, _by_hand(x, before[name], after[name]), rtol=1e-4, err_msg=name)
        else:
            assert np.isnan(row).all(), name
    norms = optimizer.norms()
    index = [names.index(name) for name in matrices]
    relative = norms.update[index] / [before[name].double().norm().item() for name in matrices]
    np.testing.assert_allclose(
        found["representation_change"][index], (found["alignment_ratio"][index] * relative), 1e-4
    )


def test_gain_and_representation_change_follow_from_the_alignments():
    """representation_change = alignment_ratio |dW|/|W|, and gain = weight_alignment rms(W) fan_in."""
    model = MLP()
    optimizer = AdamW(model.parameters(), lr=3e-2)
    batch = torch.randn(9, 12)
    found, before, after = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).sum())
    for i, (name, w) in enumerate(before.items()):
        if w.ndim == 2:
            relative = float((after[name].double() - w.double()).norm() / w.double().norm())
            rms = float(w.double().square().mean().sqrt())
            assert found["representation_change"][i] == pytest.approx(found["alignment_ratio"][i] * relative, rel=1e-5)
            assert found["gain"][i] == pytest.approx(found["weight_alignment"][i] * rms * w.shape[1], rel=1e-5)


@pytest.mark.parametrize(("weight", "gain"), [("orthogonal", 1.0), ("halved", 0.5), ("summing", 12**0.5)])
def test_gain_of_known_matrices(weight, gain):
    model = nn.Linear(12, 12, bias=False)
    batch = torch.randn(30, 12)
    with torch.no_grad():
        nn.init.orthogonal_(model.weight)
        if weight == "halved":
            model.weight *= 0.5
        if weight == "summing":  # all inputs and all rows of the weight have one direction
            batch = torch.randn(30, 1) * torch.ones(12) / 12**0.5
            model.weight.fill_(12**-0.5)
    optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    found, _, _ = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).square().sum())
    assert found["gain"] == pytest.approx([gain], rel=1e-5)
    assert found["weight_alignment"] == pytest.approx([1.0 if weight == "summing" else 12**-0.5], rel=1e-5)


def test_a_segment_has_its_own_statistics(backend, device):
    model = nn.Sequential(nn.Linear(8, 12, bias=False)).to(device)
    groups = param_groups(model, 8, width=8, roles={"0.weight": "matrix"}, segments={"0.weight": (3, 4, 5)})
    optimizer = AdamW(groups, lr=1e-2, backend=backend)
    batch = torch.randn(6, 8, device=device)
    found, before, after = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).pow(3).sum())
    names = optimizer.norm_names()
    assert names == ["0.weight[0]", "0.weight[1]", "0.weight[2]"]
    parts = zip(*(weights["0.weight"].split((3, 4, 5)) for weights in (before, after)), strict=True)
    for i, (b, a) in enumerate(parts):
        np.testing.assert_allclose([found[key][i] for key in STATISTICS], _by_hand(batch, b, a), rtol=2e-5)


class Recurrent(nn.Module):
    """Calls one module twice, and then a second module that has the same weight."""

    def __init__(self):
        super().__init__()
        self.cell, self.twin, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.twin.weight = self.cell.weight

    def forward(self, x):
        return self.twin(self.cell(self.cell(x)))


def test_x_holds_all_calls_of_a_weight_and_a_weight_without_calls_is_nan():
    model = Recurrent()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    batch = torch.randn(5, 6)

    def loss(m):
        return m(batch).square().sum() + sum(p.sum() for p in m.idle.parameters())

    found, before, after = _measure(model, optimizer, Probe(optimizer, model, batch), loss)
    w, b = before["cell.weight"].double(), before["cell.bias"].double()
    calls = [batch.double()]
    for _ in range(2):
        calls.append(calls[-1] @ w.T + b)
    names = optimizer.norm_names()
    row, idle = names.index("cell.weight"), names.index("idle.weight")
    expected = _by_hand(torch.cat(calls), before["cell.weight"], after["cell.weight"])
    np.testing.assert_allclose([found[key][row] for key in STATISTICS], expected, rtol=2e-5)
    assert all(np.isnan(found[key][idle]) for key in STATISTICS)


class Functional(nn.Module):
    """Multiplies with the weight of a linear module by a function, and calls the module too if `calls` says so."""

    def __init__(self, calls):
        super().__init__()
        self.project, self.calls = nn.Linear(6, 6, bias=False), calls

    def forward(self, x):
        y = nn.functional.linear(3 * x + 1, self.project.weight)
        return y + self.project(x) if self.calls else y


@pytest.mark.parametrize("calls", [False, True], ids=["function alone", "function and module"])
def test_x_holds_what_a_function_multiplies_with_the_weight_of_a_linear_module(calls):
    model, batch = Functional(calls), torch.randn(5, 6)
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    found, before, after = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).square().sum())
    x = torch.cat([3 * batch + 1, batch]) if calls else 3 * batch + 1
    expected = _by_hand(x, before["project.weight"], after["project.weight"])
    np.testing.assert_allclose([found[key][0] for key in STATISTICS], expected, rtol=2e-5)


def test_modes_hooks_randomness_and_gradients_stay_as_they_were():
    model = nn.Sequential(MLP(), nn.BatchNorm1d(12), nn.Linear(12, 2))
    model[1].eval()
    optimizer = AdamW(model.parameters())

    def forward(m, batch):
        assert not any(module.training for module in m.modules())
        return torch.nn.functional.dropout(m(batch), 0.5, training=True)  # draws random numbers in every mode

    batch = torch.randn(7, 12)
    model(batch).sum().backward()
    probe = Probe(optimizer, model, batch, forward)
    modes = [module.training for module in model.modules()]
    buffers = [b.clone() for b in model.buffers()]
    grads = [p.grad.clone() for p in model.parameters()]
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    state = torch.random.get_rng_state()
    probe.before_step()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert set(modes) == {False, True}
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert [dict(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_failing_forward_leaves_model_and_probe_as_they_were():
    model = MLP()
    probe = Probe(AdamW(model.parameters()), model, torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        probe.before_step()
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError, match="after_step\\(\\) without before_step"):
        probe.after_step()


def test_autocast_does_not_reach_the_measurement():
    model = nn.Linear(64, 64, bias=False)
    optimizer = AdamW(model.parameters(), lr=1e-4)
    batch = torch.randn(16, 64)
    seen = []

    def forward(m, x):
        seen.append(m(x).dtype)

    model(batch).sum().backward()
    before = model.weight.detach().clone()
    probe = Probe(optimizer, model, batch, forward)
    with torch.autocast("cpu", torch.bfloat16):
        probe.before_step()
        optimizer.step()
        found = probe.after_step()
    assert seen == [torch.bfloat16]
    np.testing.assert_allclose(
        [found[k][0] for k in STATISTICS], _by_hand(batch, before, model.weight.detach()), rtol=2e-5
    )


def test_after_a_skipped_step_the_alignments_of_the_update_are_nan():
    model = nn.Linear(5, 5, bias=False)
    optimizer = AdamW(model.parameters(), max_grad_norm=1.0)
    batch = torch.randn(4, 5)
    found, _, _ = _measure(model, optimizer, Probe(optimizer, model, batch), lambda m: m(batch).sum() * float("inf"))
    assert found["gain"] > 0
    assert found["representation_change"] == 0
    assert np.isnan(found["update_alignment"])
    assert np.isnan(found["alignment_ratio"])


@pytest.mark.parametrize("batch", ["tensor", "tuple", "mapping"])
def test_the_model_is_called_with_the_batch(batch):
    model, x = nn.Linear(4, 3, bias=False), torch.randn(6, 4)
    optimizer = AdamW(model.parameters())
    given = {"tensor": x, "tuple": (x,), "mapping": {"input": x}}[batch]
    found, before, after = _measure(model, optimizer, Probe(optimizer, model, given), lambda m: m(x).sum())
    assert found["gain"] == pytest.approx([_by_hand(x, before["weight"], after["weight"])[0]], rel=1e-5)


def test_the_kept_rows_lie_evenly_over_all_rows():
    """The limit holds for any number of calls, and no position within a window of 64 tokens is preferred."""
    x = torch.arange(4096.0).reshape(-1, 1)
    for calls in (1, 8):
        sample = InputSample(500)
        for part in x.chunk(calls):
            sample.add(part)
        kept = sample.values.flatten().sort().values
        assert len(kept) == 500
        assert kept[0] == 0
        assert max(kept.diff().max(), 4096 - kept[-1]) <= 2.7 * 4096 / 500
        positions = torch.bincount((kept % 64).long(), minlength=64)  # within windows of 64 tokens
        assert positions.min() >= 5
        assert positions.max() <= 11


def test_the_gain_of_512_rows_is_close_to_the_gain_of_all_rows():
    model = MLP(32)
    optimizer = AdamW(model.parameters())
    batch = torch.randn(64, 64, 32) * torch.rand(64, 64, 1)
    gains = []
    for rows in (64 * 64, 512):
        probe = Probe(optimizer, model, batch, max_rows=rows)
        gains.append(_measure(model, optimizer, probe, lambda m: 0 * m(batch[0]).sum())[0]["gain"])
    np.testing.assert_allclose(gains[0], gains[1], rtol=0.05)


def test_a_probe_that_cannot_measure_is_an_error():
    model = MLP()
    with pytest.raises(ValueError, match="max_rows=0 is not positive"):
        Probe(AdamW(model.parameters()), model, None, max_rows=0)
    with pytest.raises(ValueError, match="no matrix of the optimizer"):
        Probe(AdamW(MLP().parameters()), model, None)
    with pytest.raises(RuntimeError, match="multiplied with none of the 2 matrices"):
        Probe(AdamW(model.parameters()), model, None, lambda m, _: None).before_step()


def test_a_compiled_model_is_measured_through_its_modules():
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = AdamW(model.parameters())
    compiled = torch.compile(model, backend="eager")
    batch = torch.randn(3, 4)
    compiled(batch).sum().backward()
    with torch.no_grad():  # compiles the model in evaluation mode, without the hooks of the probe
        compiled.eval()(batch)
    probe = Probe(optimizer, compiled, batch)
    probe.before_step()
    optimizer.step()
    assert np.isfinite(probe.after_step()["alignment_ratio"][0])
