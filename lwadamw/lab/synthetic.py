r"""The smallest network that shows what a rule holds constant: two layers, and gradients that are noise.

    relu     y = W_out relu(W_in x)
    swiglu   y = W_out (silu(W_gate x) * W_in x)

All matrices are d by d. x and the gradient of y are drawn anew from N(0, 1) at every step, the gradients of the matrices
follow by the chain rule, and AdamW takes them to their steady state. Fan et al. 2510.15262 use a two-layer network of the
kind; that theirs is this one is not known.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lwadamw
from lwadamw.width.steady_state import weight_rms_of

from .study import arm_rule

VARIANTS: Final = ("relu", "swiglu")
MATRICES: Final = ("in", "out", "gate")
PER_MATRIX: Final = ("gain", "top", "second", "bulk", "median_singular", "rms")
# For each matrix, of its spectrum the singular values at these ranks, as "rank:value" with spaces between.
RANKS: Final = tuple(sorted({round(2 ** (k / 4)) for k in range(45)}))
RESULT: Final = (
    "effective_lr",
    "effective_wd",
    "steps",
    "taus",
    "steady_rms",  # sqrt(lr/2wd)
    "gain_network",  # |y|rms / |x|rms
    *(f"{statistic}_{name}" for name in MATRICES for statistic in PER_MATRIX),
    *(f"spectrum_{name}" for name in MATRICES),
)
# Where the statistics of a run are taken, as shares of it: geometric means over the last part.
MEASURED: Final = np.linspace(0.7, 1.0, 13)[1:]
PROBE: Final = 256


@dataclass(frozen=True, slots=True)
class Noise:
    """The setting of one run. It takes `taus` of its own tau = 1/(lr wd)."""

    arm: str
    lr_exponent: float
    wd_exponent: float
    variant: str
    width: int
    lr: float  # base values
    weight_decay: float
    seed: int
    base_width: int
    batch: int
    run_taus: float

    @classmethod
    def of(cls, arm: str, variant: str, width: int, seed: int, **setting: Any) -> Noise:
        scale = arm_rule(arm).matrix
        return cls(arm, scale.lr, scale.wd or 0.0, variant, width, seed=seed, **setting)

    def shared(self) -> Noise:
        return replace(self, arm="", lr_exponent=0.0, wd_exponent=0.0) if self.width == self.base_width else self

    @property
    def effective(self) -> tuple[float, float]:
        """(lr, weight decay) of the matrices."""
        m = self.width / self.base_width
        return self.lr * m**self.lr_exponent, self.weight_decay * m**self.wd_exponent

    @property
    def steps(self) -> int:
        lr, wd = self.effective
        return round(self.run_taus / (lr * wd))

    @property
    def cost(self) -> float:
        return self.steps * (self.width**2 + 5000.0)

    @property
    def memory(self) -> int:
        return 3 * 20 * self.width**2


class Network(nn.Module):
    """W_in and W_out, with a gate W_gate, [d, d] each; entries start at N(0, 1/d)."""

    def __init__(self, width: int, variant: str, generator: torch.Generator) -> None:
        super().__init__()
        names = ("in", "out") if variant == "relu" else MATRICES
        self.matrices = {name: nn.Linear(width, width, bias=False) for name in names}
        self.layers = nn.ModuleDict(self.matrices)
        with torch.no_grad():
            for layer in self.matrices.values():
                layer.weight.copy_(torch.randn(width, width, generator=generator) * width**-0.5)

    def hidden(self, x: Tensor) -> Tensor:
        """What W_out is applied to, [batch, d]."""
        z: Tensor = self.matrices["in"](x)
        return F.relu(z) if "gate" not in self.matrices else F.silu(self.matrices["gate"](x)) * z

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.matrices["out"](self.hidden(x))
        return y


def run(task: Noise, device: torch.device, alive: Callable[[], None]) -> dict[str, Any]:
    """Make the run; its columns of `RESULT`."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(task.seed)
    network = Network(task.width, task.variant, generator).to(device)
    groups = lwadamw.param_groups(network, task.base_width, arm_rule(task.arm), width=task.width)
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-12, "norms": False}
    optimizer = lwadamw.AdamW(groups, lr=task.lr, weight_decay=task.weight_decay, **settings)
    noise = torch.Generator(device).manual_seed(task.seed)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, task.width, generator=noise, device=device)

    places = {round(share * task.steps) for share in MEASURED}
    seen: list[dict[str, float]] = []
    for step in range(1, task.steps + 1):
        network(draw(task.batch)).backward(draw(task.batch) / task.batch)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if step in places:
            seen.append(_measure(network, draw(PROBE)))
            alive()
    lr, wd = task.effective
    return {
        "effective_lr": lr,
        "effective_wd": wd,
        "steps": task.steps,
        "taus": task.steps * lr * wd,
        "steady_rms": weight_rms_of(lr, wd),
        **{name: math.exp(float(np.mean([math.log(s[name]) for s in seen]))) for name in seen[0]},
        **{f"spectrum_{name}": _spectrum(layer.weight) for name, layer in network.matrices.items()},
        "seconds": round(time.perf_counter() - start, 2),
    }


@torch.no_grad()
def _measure(network: Network, x: Tensor) -> dict[str, float]:
    hidden = network.hidden(x)
    inputs = {"in": x, "gate": x, "out": hidden}
    out = {"gain_network": _ratio(network(x), x)}
    for name, layer in network.matrices.items():
        weight = layer.weight
        values = torch.linalg.svdvals(weight).double()
        left = (values[2:] ** 2).sum() / weight.numel()
        edge = sum(size**0.5 for size in weight.shape)
        found = {
            "gain": _ratio(layer(inputs[name]), inputs[name]),
            "top": float(values[0]),
            "second": float(values[1]),
            # Where the spectrum would end if all but the two largest were those of a random matrix (Marchenko-Pastur).
            "bulk": edge * float(left.sqrt()),
            "median_singular": float(values.median()),
            "rms": float(weight.square().mean().sqrt()),
        }
        out |= {f"{statistic}_{name}": value for statistic, value in found.items()}
    return out


def _ratio(y: Tensor, x: Tensor) -> float:
    return float((y.square().mean() / x.square().mean()).sqrt())


def _spectrum(weight: Tensor) -> str:
    values = torch.linalg.svdvals(weight.detach()).tolist()
    return " ".join(f"{rank}:{values[rank - 1]:.5g}" for rank in RANKS if rank <= len(values))
