"""The synthetic network: its steady state, and that its gradients are what it says they are."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lwadamw.lab.synthetic import MATRICES, RESULT, Network, Noise, run

CPU = torch.device("cpu")
SETTING = {"lr": 0.02, "weight_decay": 1.0, "base_width": 32, "batch": 16, "run_taus": 6.0}


@pytest.mark.parametrize("variant", ["relu", "swiglu"])
def test_weights_settle_where_noise_takes_them(variant):
    task = Noise.of("kosson2025", variant, 64, seed=int(torch.randint(1000, ())), **SETTING)
    result = run(task, CPU, lambda: None)
    lr, wd = 0.02 / 2, 2.0
    assert result["steady_rms"] == pytest.approx(math.sqrt(lr / (2 * wd)))
    assert result["steps"] == 300
    assert result["taus"] == pytest.approx(6)
    for name in MATRICES[: 2 if variant == "relu" else 3]:
        assert result[f"rms_{name}"] == pytest.approx(result["steady_rms"], rel=0.15)
        assert result[f"top_{name}"] > result[f"second_{name}"] > result[f"median_singular_{name}"]
    assert set(result) <= {*RESULT, "seconds"}
    assert ("gain_gate" in result) == (variant == "swiglu")


def test_statistics_are_those_of_the_weights(monkeypatch):
    """Of a run that hardly moves its weights, whose spectrum NumPy knows."""
    task = Noise.of("standard", "relu", 48, seed=3, **{**SETTING, "lr": 1e-9, "base_width": 48, "run_taus": 4e-8})
    result = run(task, CPU, lambda: None)
    network = Network(48, "relu", torch.Generator().manual_seed(3))
    for name, layer in network.matrices.items():
        weight = layer.weight.detach().double().numpy()
        values = np.linalg.svd(weight, compute_uv=False)
        assert result[f"top_{name}"] == pytest.approx(values[0], rel=1e-4)
        assert result[f"second_{name}"] == pytest.approx(values[1], rel=1e-4)
        left = (values[2:] ** 2).sum() / weight.size
        assert result[f"bulk_{name}"] == pytest.approx(2 * math.sqrt(48) * math.sqrt(left), rel=1e-4)
        assert result[f"rms_{name}"] == pytest.approx(np.sqrt((weight**2).mean()), rel=1e-4)
        spectrum = {
            int(rank): float(value) for rank, value in (pair.split(":") for pair in result[f"spectrum_{name}"].split())
        }
        assert spectrum[1] == pytest.approx(values[0], rel=1e-4)
        assert spectrum[32] == pytest.approx(values[31], rel=1e-4)
    # Independent entries of variance 1/d keep the rms of independent inputs.
    assert result["gain_in"] == pytest.approx(1.0, rel=0.15)
    assert result["gain_network"] == pytest.approx(math.sqrt(0.5), rel=0.25)


def test_rules_change_the_setting_as_they_say():
    for arm, lr, wd in (("mup", 1 / 4, 1.0), ("fan2025", 1 / 4, 2.0), ("balanced", 4**-0.75, 4**0.75)):
        task = Noise.of(arm, "relu", 128, 0, **SETTING)
        assert task.effective == pytest.approx((0.02 * lr, wd))
        assert task.steps == round(6 / (0.02 * lr * wd))
    assert replace(task, width=32).shared() == Noise.of("mup", "relu", 32, 0, **SETTING).shared()
    assert task.shared() == task
