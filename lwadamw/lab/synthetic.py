r"""The smallest network that shows what a rule holds constant: two layers whose gradients are noise.

The network has one of two variants:

    relu     y = W_out relu(W_in x)
    swiglu   y = W_out (silu(W_gate x) * W_in x)

All matrices are d by d. At every step x and the gradient of y are drawn again from N(0, 1). The gradients of the matrices
follow by the chain rule. AdamW takes the matrices to their steady state. Fan et al. 2510.15262 use a two-layer network too;
we do not know whether it is the same one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lwadamw
from lwadamw.width.steady_state import tau_of, weight_rms_of

from .arms import arm_rule
from .pool import Alive

VARIANTS: Final = ("relu", "swiglu")
MATRICES: Final = ("in", "out", "gate")
PER_MATRIX: Final = ("gain", "top", "second", "bulk", "median_singular", "rms")
# A spectrum column holds the singular values at these ranks, as "rank:value" pairs with spaces between them.
RANKS: Final = tuple(sorted({round(2 ** (k / 4)) for k in range(45)}))
# Columns with the result of a run.
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
# Statistics are measured at these shares of the run. The result is their geometric mean.
MEASURED: Final = np.linspace(0.7, 1.0, 13)[1:]
PROBE: Final = 256  # inputs that measure a gain


@dataclass(frozen=True, slots=True)
class Noise:
    """The full setting of one run. The fields are the columns that identify the run in a CSV file.

    Args:
        arm: a rule or exponents; see `arm_rule`.
        lr_exponent: exponent of the lr of matrices.
        wd_exponent: exponent of the weight decay of matrices.
        variant: one of `VARIANTS`.
        width: width d of the network.
        lr: base value of the learning rate.
        weight_decay: base value of the weight decay.
        seed: seed of the initial weights and of the noise.
        base_width: width of the proxy.
        batch: rows of x per step.
        run_taus: length of the run in tau, with effective values.
    """

    arm: str
    lr_exponent: float
    wd_exponent: float
    variant: str
    width: int
    lr: float
    weight_decay: float
    seed: int
    base_width: int
    batch: int
    run_taus: float

    @classmethod
    def of(cls, arm: str, variant: str, width: int, seed: int, **setting: Any) -> Noise:
        """Build the setting of a run under an arm.

        Args:
            arm: a rule or exponents; see `arm_rule`.
            variant: one of `VARIANTS`.
            width: width d of the network.
            seed: seed of the initial weights and of the noise.
            setting: all other fields except the exponents.

        Raises:
            ValueError: the arm is neither a rule nor exponents.
        """
        scale = arm_rule(arm).matrix
        return cls(arm, scale.lr, scale.wd or 0.0, variant, width, seed=seed, **setting)

    def shared(self) -> Noise:
        """Return a setting that is equal for all arms at the proxy's width, where all rules give the same values."""
        return replace(self, arm="", lr_exponent=0.0, wd_exponent=0.0) if self.width == self.base_width else self

    @property
    def effective(self) -> tuple[float, float]:
        """Effective lr and weight decay of the matrices."""
        m = self.width / self.base_width
        return self.lr * m**self.lr_exponent, self.weight_decay * m**self.wd_exponent

    @property
    def steps(self) -> int:
        """Length of the run in steps."""
        return round(self.run_taus * float(tau_of(*self.effective)))

    @property
    def cost(self) -> float:
        """A number proportional to the time of the run."""
        return self.steps * (self.width**2 + 5000.0)

    @property
    def memory(self) -> int:
        """Memory of a GPU that the run needs, in bytes."""
        return 3 * 20 * self.width**2


class Network(nn.Module):
    """The two-layer network: W_in, W_out and for swiglu W_gate, [d, d] each. Their entries start at N(0, 1/d).

    Args:
        width: width d.
        variant: one of `VARIANTS`.
        generator: source of the initial weights, on the CPU.
    """

    def __init__(self, width: int, variant: str, generator: torch.Generator) -> None:
        super().__init__()
        names = ("in", "out") if variant == "relu" else MATRICES
        self.matrices = {name: nn.Linear(width, width, bias=False) for name in names}
        self.layers = nn.ModuleDict(self.matrices)
        with torch.no_grad():
            for layer in self.matrices.values():
                layer.weight.copy_(torch.randn(width, width, generator=generator) * width**-0.5)

    def hidden(self, x: Tensor) -> Tensor:
        """Return the input of W_out, shape [batch, d], for x of shape [batch, d]."""
        z: Tensor = self.matrices["in"](x)
        return F.relu(z) if "gate" not in self.matrices else F.silu(self.matrices["gate"](x)) * z

    def forward(self, x: Tensor) -> Tensor:
        """Return y, shape [batch, d], for x of shape [batch, d]."""
        y: Tensor = self.matrices["out"](self.hidden(x))
        return y


def run(task: Noise, device: torch.device, alive: Alive) -> dict[str, Any]:
    """Take one network to its steady state, and measure it.

    Args:
        task: the setting of the run.
        device: where to run.
        alive: called after every hundredth of the run; see `pool.run_all`.

    Returns:
        The columns in `RESULT` that the variant has, and "seconds".
    """
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
        if step % max(1, task.steps // 100) == 0:
            alive(step, task.steps)
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
            # Singular value at which the spectrum would end if all values but the two largest were those of a random matrix
            # (Marchenko-Pastur law).
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
