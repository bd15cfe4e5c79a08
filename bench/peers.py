"""Who is timed: this package's AdamW in its variants, and its peers, all on the same parameters and gradients.

Moments are shared too wherever an implementation keeps them as torch does, so that the largest workloads fit; what is
timed does not depend on values. A peer that cannot take part is returned with the reason.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench.workloads import make_groups

FUSED = "torch fused"
COMPILE_TENSORS = 200  # compiling a step of more takes minutes

# Bytes per element that an implementation reads and writes, by what it does to float32 p, g, m, v.
STEP_BYTES = 28  # read p, g, m, v; write p, m, v
NORM_BYTES = 4  # read g once more, for the global norm
FOREACH_BYTES = 80  # mul_ 8, lerp_ 12, mul_ 8, addcmul_ 12, sqrt 8, div_ 8, add_ 8, addcdiv_ 16
CLIP_BYTES = 12  # clip_grad_norm_: read g for the norm; read and write it to scale it
LOG_BYTES = 8  # read p and g for a norm of each


class Unavailable(Exception):
    """Why a peer cannot take part."""


@dataclass
class Contestant:
    step: Callable[[], object]
    bytes_per_element: int
    optimizer: torch.optim.Optimizer


@dataclass
class Field:
    """Parameters with gradients, dealt out to groups, and the moments that contestants share."""

    params: Sequence[Tensor]
    n_groups: int
    moments: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.moments:
            self.moments = [{k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")} for p in self.params]

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def groups(self, n_groups: int | None = None) -> list[dict[str, Any]]:
        return make_groups(self.params, n_groups or self.n_groups)

    def enter(self, optimizer: torch.optim.Optimizer, bytes_per_element: int = STEP_BYTES, **state: Any) -> Contestant:
        """Give the optimizer the shared moments; `state` has what else it keeps of a parameter, or makes that."""
        # Not through `optimizer.state`: once that has been read, lwadamw verifies every moment at every step.
        own = vars(optimizer)["state"]
        for p, moments in zip(self.params, self.moments, strict=True):
            own[p] = {**moments, **{k: v() if callable(v) else v for k, v in state.items()}}
        return Contestant(optimizer.step, bytes_per_element, optimizer)


def _fused(field: Field, n_groups: int | None = None) -> Contestant:
    optimizer = torch.optim.AdamW(field.groups(n_groups), fused=True)
    return field.enter(optimizer, step=lambda: torch.ones((), device=field.device))


def _fused_one_group(field: Field) -> Contestant:
    if field.n_groups == 1:
        raise Unavailable("there is one group anyway")
    return _fused(field, 1)


def _foreach(field: Field) -> Contestant:
    return field.enter(torch.optim.AdamW(field.groups(), foreach=True), FOREACH_BYTES, step=lambda: torch.ones(()))


def _compile(field: Field) -> Contestant:
    if len(field.params) > COMPILE_TENSORS or field.n_groups > 1:
        raise Unavailable(f"compiled only in one group of up to {COMPILE_TENSORS} tensors, else it takes minutes")
    optimizer = torch.optim.AdamW(field.groups(), foreach=True)
    contestant = field.enter(optimizer, step=lambda: torch.ones((), device=field.device))
    contestant.step = torch.compile(optimizer.step)
    return contestant


def _require(module: str, device: torch.device) -> ModuleType:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Unavailable(f"{module.partition('.')[0]} is not installed")
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    return importlib.import_module(module)


def _optimi(field: Field) -> Contestant:
    optimizer = _require("optimi", field.device).AdamW(field.groups(), lr=1e-5, triton=True)
    return field.enter(optimizer, kahan_comp=lambda: torch.zeros(1, dtype=torch.uint8, device=field.device))


def _deepspeed(field: Field) -> Contestant:
    module = _require("deepspeed.ops.adam", field.device)
    if shutil.which("nvcc") is None:
        raise Unavailable("compiles itself with nvcc, which is not here")
    return field.enter(module.FusedAdam(field.groups(), weight_decay=1e-2), step=0)


def _apex(field: Field) -> Contestant:
    return field.enter(_require("apex.optimizers", field.device).FusedAdam(field.groups(), weight_decay=1e-2))


def usual_way(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, max_norm: float = 1.0) -> list[float]:
    """clip_grad_norm_, the step, and the norm of every weight and gradient, moved to the host at once."""
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    optimizer.step()
    tensors = [p.detach() for p in params] + [p.grad for p in params if p.grad is not None]
    norms: list[float] = torch.stack(torch._foreach_norm(tensors)).tolist()
    return norms


def _usual_way(field: Field) -> Contestant:
    contestant = _fused(field)
    contestant.step = lambda: usual_way(field.params, contestant.optimizer)
    contestant.bytes_per_element = STEP_BYTES + CLIP_BYTES + LOG_BYTES
    return contestant


# By the name --peers takes: the name in tables, and what makes it.
PEERS: dict[str, tuple[str, Callable[[Field], Contestant]]] = {
    "fused": (FUSED, _fused),
    "fused_one_group": ("torch fused, one group", _fused_one_group),
    "foreach": ("torch foreach", _foreach),
    "compile": ("torch.compile of foreach", _compile),
    "optimi": ("optimi Triton", _optimi),
    "deepspeed": ("DeepSpeed FusedAdam", _deepspeed),
    "apex": ("apex FusedAdam", _apex),
    "usual": ("usual way: clip_grad_norm_, fused, norms", _usual_way),
}


def _clip_step_norms(optimizer: Any) -> Callable[[], object]:
    def step() -> object:
        optimizer.step()
        return optimizer.norms()

    return step


def ours(field: Field, package: ModuleType, backend: str | None, label: str = "lwadamw") -> dict[str, Contestant]:
    """The working tree's package, or another revision's, in its variants."""

    def enter(bytes_per_element: int, **options: Any) -> Contestant:
        return field.enter(package.AdamW(field.groups(), backend=backend, **options), bytes_per_element, step=_one)

    entered = {
        label: enter(STEP_BYTES),
        f"{label}, norms off": enter(STEP_BYTES, norms=False),
        f"{label}, clipping": enter(STEP_BYTES + NORM_BYTES, max_grad_norm=1.0),
        f"{label}, clipping, norms read": enter(STEP_BYTES + NORM_BYTES, max_grad_norm=1.0),
    }
    if backend == "torch":  # measures norms when they are read, and not before
        del entered[f"{label}, norms off"]
    measured = entered[f"{label}, clipping, norms read"]
    measured.step = _clip_step_norms(measured.optimizer)
    return entered


def _one() -> Tensor:
    return torch.ones(())


def peers(field: Field, wanted: Sequence[str] | None = None) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Contestants by name, all or those wanted, torch fused always; and the reason of each that cannot take part.

    Each takes one step, so that what fails does so here.
    """
    entered: dict[str, Contestant] = {}
    missing: dict[str, str] = {}
    for key, (name, make) in PEERS.items():
        if wanted is not None and key not in wanted and key != "fused":
            continue
        try:
            if wanted is None and key == "compile" and field.device.type == "cpu":
                raise Unavailable("on the CPU only when asked for: it takes longer to compile than all else to measure")
            contestant = make(field)
            contestant.step()
            entered[name] = contestant
        except Unavailable as reason:
            missing[name] = str(reason)
        except Exception as error:
            # Somebody else's package or compiler; whatever it raises, the others are measured.
            if key == "fused":
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    return entered, missing
