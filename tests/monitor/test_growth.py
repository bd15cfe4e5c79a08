"""What has no weight decay: its growth is in the report, its forecast brackets what happens, and DriftWatch tells it once."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lwadamw import AdamW, DriftWatch, Monitor, param_groups
from lwadamw.monitor.growth import growths
from lwadamw.monitor.profile import Profile
from tests.cases import train_on_noise
from tests.monitor import llama


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 40, bias=False)


def _run(every=10, steps=None):
    model = _Model()
    optimizer = AdamW(param_groups(model, 32, width=32, roles={"head.weight": "output"}), lr=1e-2, weight_decay=1.0)
    return model, optimizer, Monitor(optimizer, every=every, spectrum_every=every, steps=steps)


def _train_alike(optimizer, steps, directions):
    """Take steps whose gradients all have the same direction."""
    for _ in range(steps):
        for p, direction in directions.items():
            p.grad = direction.clone()
        optimizer.step()


def _seen(monitor, name):
    index = monitor.latest.names.index(name)
    return monitor.latest.columns["weight_rms"][index], monitor.latest.columns["top"][index]


def test_on_noise_a_norm_grows_as_the_forecast_for_noise_says():
    _, optimizer, monitor = _run()
    train_on_noise(optimizer, 100)
    (found,) = (one for one in growths(monitor.readings, 400) if one.name == "head.weight")
    train_on_noise(optimizer, 300)
    later, top = _seen(monitor, "head.weight")
    assert later / found.rms == pytest.approx(found.noise, rel=0.05)
    assert found.noise > 1.5
    assert top / found.top < 0.8 * found.top_aligned


def test_on_equal_gradients_a_norm_and_its_top_grow_as_the_forecast_for_aligned_updates_says():
    model, optimizer, monitor = _run()
    directions = {p: torch.randn_like(p) for p in model.parameters()}
    directions[model.head.weight] = torch.outer(torch.randn(40), torch.randn(32)).sign()  # Adam's updates have rank 1
    _train_alike(optimizer, 100, directions)
    (found,) = (one for one in growths(monitor.readings, 400) if one.name == "head.weight")
    _train_alike(optimizer, 300, directions)
    later, top = _seen(monitor, "head.weight")
    assert later / found.rms == pytest.approx(found.aligned, rel=0.05)
    assert top / found.top == pytest.approx(found.top_aligned, rel=0.05)
    assert found.aligned > 1.5 * found.noise


def test_a_learning_rate_that_has_fallen_makes_the_forecast_smaller():
    _, optimizer, monitor = _run()
    train_on_noise(optimizer, 100)
    before = growths(monitor.readings, 200)[0]
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    train_on_noise(optimizer, 10)
    after = growths(monitor.readings, 210)[0]
    assert 1 < after.noise < 1 + 0.1 * (before.noise - 1)
    assert 1 < after.aligned < 1 + 0.2 * (before.aligned - 1)


@pytest.mark.parametrize("run", ["fan-64-0", "fan-256-0", "kosson-256-1"])
def test_heads_and_embeddings_of_a_real_llama_grow_as_much_as_the_forecasts_say(run):
    """A reading at step 100 forecasts step 200. The learning rate is constant until then."""
    seen = [r for r in llama.readings(run) if r.step <= 200]
    names = tuple(n for n in seen[0].names if "embed" in n or "head" in n)
    assert len(names) == 2
    early = [replace(r, unbounded=names) for r in seen if r.step <= 100]
    last = seen[-1]
    for one in growths(early, last.step):
        index = last.names.index(one.name)
        grown = last.columns["weight_rms"][index] / one.rms
        assert 0.95 * one.noise <= grown <= 1.05 * one.aligned, one
        if not np.isnan(one.top):
            assert grown < last.columns["top"][index] / one.top <= 1.05 * one.top_aligned


def test_the_report_names_heads_and_embeddings_without_decay_and_no_vectors():
    _, optimizer, monitor = _run(steps=1000)
    train_on_noise(optimizer, 100)
    lines = monitor.report(120).split("\n\n")[1].splitlines()
    header, *rows = [line for line in lines if "  " in line]
    assert header.split("  ")[-1] == "top up to"
    assert "rms at step 1000" in header
    assert [row.split()[0] for row in rows] == ["embed.weight", "head.weight"]
    rms, top = _seen(monitor, "head.weight")
    (one,) = (one for one in growths(monitor.readings, 1000) if one.name == "head.weight")
    grown = f"{rms:.3g} x{one.grown:.3g} {top:.3g} x{one.noise:.3g} to x{one.aligned:.3g} x{one.top_aligned:.3g}"
    assert " ".join(rows[1].split()[1:]) == grown
    assert monitor.latest.unbounded == ("embed.weight", "head.weight")


def test_the_report_says_since_when_a_norm_grows_that_came_later():
    later, head = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4, 8))
    optimizer = AdamW([("head", head), ("later", later)], lr=0.1, weight_decay=0.0)
    monitor = Monitor(optimizer, every=1)
    for step in range(1, 9):
        head.grad = torch.randn(4, 8)
        later.grad = torch.randn(4, 8) if step >= 5 else None
        optimizer.step()
    lines = {line.split()[0]: line for line in monitor.report(160).split("\n\n")[1].splitlines()}
    begin = monitor.readings[4].columns["weight_rms"][1]
    assert f"x{monitor.latest.columns['weight_rms'][1] / begin:.3g} since step 5" in lines["later"]
    assert "since step 1" in next(line for line in lines.values() if "rms at step" in line)
    assert "since" not in lines["head"]


def test_everything_that_decays_is_not_mentioned():
    model = nn.Linear(8, 8)
    optimizer = AdamW(model.named_parameters(), weight_decay=0.1)
    monitor = Monitor(optimizer, every=1)
    train_on_noise(optimizer, 3)
    assert monitor.latest.unbounded == ()
    assert "no weight decay" not in monitor.report()


def test_drift_watch_logs_the_growth_once_and_does_not_warn(caplog):
    _, optimizer, monitor = _run()
    train_on_noise(optimizer, 1)
    watch = DriftWatch(Profile.of(list(monitor.readings)))
    monitor.on_reading.append(watch)
    with caplog.at_level(logging.INFO, logger="lwadamw"):
        train_on_noise(optimizer, 9)
        assert not caplog.records
        train_on_noise(optimizer, 390)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "no weight decay bounds head.weight (2" in record.getMessage()
    assert "top singular value" in record.getMessage()
    assert not watch.warned
