"""With noise as gradients, weights reach the RMS sqrt(lr/2wd). So each rule's exponents show in the weight norms."""

import math

import numpy as np
import pytest
import torch

from lwadamw import RULES, AdamW, param_groups

WIDTHS = (32, 64, 128)
LR, WEIGHT_DECAY = 1e-2, 1.0


def _settled(rule: str, width: int) -> tuple[float, float]:
    """Return the measured and the predicted Frobenius norm of a square matrix after six tau of noise gradients."""
    torch.manual_seed(width)
    model = torch.nn.Linear(width, width, bias=False)
    groups = param_groups(model, WIDTHS[0], rule, width=width, roles={"weight": "matrix"})
    optimizer = AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.95), fused=True)
    ((lr, wd),) = [(float(e["lr"]), float(e["weight_decay"])) for e in optimizer.effective()]
    tau = 1 / (lr * wd)
    norms = []
    for step in range(int(6 * tau)):
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        if step > 4 * tau and step % 20 == 0:
            norms.append(float(optimizer.norms().weight[0]))
    return float(np.mean(norms)), width * math.sqrt(lr / (2 * wd))


@pytest.mark.parametrize("rule", ["mup", "fan2025", "kosson2025", "balanced"])
def test_width_exponent_of_the_weight_norm_is_the_rules(rule):
    settled = [_settled(rule, width) for width in WIDTHS]
    measured = np.polyfit(np.log(WIDTHS), np.log([norm for norm, _ in settled]), 1)[0]
    scale = RULES[rule].matrix
    predicted = 1 + (scale.lr - scale.wd) / 2
    assert measured == pytest.approx(predicted, abs=0.08)
    for norm, expected in settled:
        assert norm == pytest.approx(expected, rel=0.1)
