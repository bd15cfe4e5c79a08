"""The contestants: the AdamW of this package in its variants, and its peers, all on the same parameters and gradients.

If an implementation keeps moments as torch does, it shares them with the others, so that the largest workloads fit. The time
of a step does not depend on the values. A peer that cannot take part is returned with the reason.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import lwadamw
from bench.field import Contestant, Field
from bench.workloads import make_groups
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES

FUSED = "torch fused"
COMPILE_TENSORS = 200  # Compiling a step of more tensors takes minutes.

# How many arrays of the size of the parameters an implementation reads and writes, if p, g, m and v have one type.
STEP = 7  # read p, g, m, v; write p, m, v
FOREACH = 20  # mul_ 2, lerp_ 3, mul_ 2, addcmul_ 3, sqrt 2, div_ 2, add_ 2, addcdiv_ 4
CLIP = 3  # clip_grad_norm_: read g for the norm; read and write it to scale it
LOG = 2  # read p and g for a norm of each


class Unavailable(Exception):
    """A peer cannot take part; the message says why."""


class OtherStorage(Exception):
    """A peer does not exist for the storage types of this field. It is left out without a reason."""


def _require_uniform(field: Field) -> None:
    if not field.uniform:
        raise Unavailable("keeps everything in the parameter's type")


def _require_fp32(field: Field) -> None:
    if field.combination != "fp32":
        raise Unavailable("is measured in float32 only")


def _fused(field: Field, n_groups: int | None = None) -> Contestant:
    optimizer = torch.optim.AdamW(field.groups(n_groups), fused=True)
    return field.enter(optimizer, STEP * field.itemsize, step=field.counter)


def _fused_one_group(field: Field) -> Contestant:
    _require_uniform(field)
    if field.n_groups == 1:
        raise Unavailable("there is one group anyway")
    return _fused(field, 1)


def _fused_mixed(field: Field) -> Contestant:
    if field.combination != "fp32, bf16 moments":
        raise OtherStorage
    if torch.__version__ < (2, 12):
        raise Unavailable(f"torch {torch.__version__} has no such kernel, torch 2.12 has")
    if field.device.type != "cuda":
        raise Unavailable("needs a GPU")
    optimizer = torch.optim.AdamW(field.groups(), fused=True)
    return field.enter(optimizer, field.bytes_per_element, field.state, step=field.counter)


def _fused_copies(field: Field) -> Contestant:
    """Mixed precision without support by the optimizer: float32 copies of weights and gradients."""
    if field.storage.weight not in ("master", "remainder"):
        raise OtherStorage
    masters = [torch.nn.Parameter(p.detach().float()) for p in field.params]
    for master in masters:
        master.grad = torch.zeros_like(master)
    gradients = [p.grad for p in field.params], [master.grad for master in masters]
    params = [p.detach() for p in field.params]
    optimizer = torch.optim.AdamW(make_groups(masters, field.n_groups), fused=True)

    def step() -> None:
        torch._foreach_copy_(gradients[1], gradients[0])
        optimizer.step()
        torch._foreach_copy_(params, [master.detach() for master in masters])

    return Contestant(step, STEP * 4 + 2 * (4 + field.itemsize), optimizer)


def _foreach(field: Field) -> Contestant:
    _require_uniform(field)
    optimizer = torch.optim.AdamW(field.groups(), foreach=True)
    return field.enter(optimizer, FOREACH * field.itemsize, step=lambda: torch.ones(()))


def _compile(field: Field) -> Contestant:
    _require_uniform(field)
    if len(field.params) > COMPILE_TENSORS or field.n_groups > 1:
        raise Unavailable(f"compiled only in one group of up to {COMPILE_TENSORS} tensors, else it takes minutes")
    optimizer = torch.optim.AdamW(field.groups(), foreach=True)
    contestant = field.enter(optimizer, STEP * field.itemsize, step=field.counter)
    contestant.step = torch.compile(optimizer.step)
    return contestant


def _require(module: str, device: torch.device) -> ModuleType:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Unavailable(f"{module.partition('.')[0]} is not installed")
    if device.type != "cuda":
        raise Unavailable("needs a GPU")
    return importlib.import_module(module)


def _optimi(field: Field) -> Contestant:
    kahan = field.combination == "bf16, kahan"
    if not kahan:
        _require_uniform(field)
    module = _require("optimi", field.device)
    optimizer = module.AdamW(field.groups(), lr=1e-5, kahan_sum=kahan, triton=True)
    if kahan:
        return field.enter(optimizer, field.bytes_per_element, field.state)
    return field.enter(
        optimizer, field.bytes_per_element, kahan_comp=lambda: torch.zeros(1, dtype=torch.uint8, device=field.device)
    )


def _deepspeed(field: Field) -> Contestant:
    _require_fp32(field)
    module = _require("deepspeed.ops.adam", field.device)
    if shutil.which("nvcc") is None:
        raise Unavailable("compiles itself with nvcc, which is not here")
    return field.enter(module.FusedAdam(field.groups(), weight_decay=1e-2), STEP * 4, step=0)


def _apex(field: Field) -> Contestant:
    _require_fp32(field)
    return field.enter(_require("apex.optimizers", field.device).FusedAdam(field.groups(), weight_decay=1e-2), STEP * 4)


def _in_8_bits(field: Field, make: Callable[[], torch.optim.Optimizer]) -> Contestant:
    """An optimizer whose moments are 8-bit codes with one float32 scale per 256 elements."""
    if field.storage.exp_avg not in CODES or field.storage.weight not in ("plain", "stochastic"):
        raise Unavailable("has 8-bit moments, and nothing besides the parameter")
    optimizer = make()
    return Contestant(optimizer.step, 3 * field.itemsize + 2 * 2 * (1 + 4 / 256), optimizer)


def _torchao(field: Field) -> Contestant:
    stochastic = field.storage.weight == "stochastic"
    return _in_8_bits(
        field,
        lambda: _require("torchao.optim", field.device).AdamW8bit(field.groups(), bf16_stochastic_round=stochastic),
    )


def _bitsandbytes(field: Field) -> Contestant:
    return _in_8_bits(field, lambda: _require("bitsandbytes.optim", field.device).AdamW8bit(field.groups()))


def usual_way(params: Sequence[Tensor], optimizer: torch.optim.Optimizer, max_norm: float = 1.0) -> list[float]:
    """Do with torch alone what lwadamw does in its step: clip, take the step, and compute the norms.

    clip_grad_norm_ computes norms and clips with torch's foreach operators, its default on a GPU.

    Args:
        params: the parameters, all with gradients.
        optimizer: an optimizer over these parameters.
        max_norm: the gradients are clipped to this global norm.

    Returns:
        The norm of every weight, then the norm of every gradient, moved to the host in one copy.
    """
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    optimizer.step()
    tensors = [p.detach() for p in params] + [p.grad for p in params if p.grad is not None]
    norms: list[float] = torch.stack(torch._foreach_norm(tensors)).tolist()
    return norms


def _flashoptim(field: Field) -> Contestant:
    """bfloat16 weights with 16 bits of correction, and 8-bit moments with one 16-bit scale per 32 elements."""
    if field.combination != "bf16, remainder, 8-bit moments":
        raise OtherStorage
    optimizer = _require("flashoptim", field.device).FlashAdamW(field.groups(), master_weight_bits=32)
    return Contestant(optimizer.step, 3 * 2 + 2 * 2 + 2 * 2 * (1 + 2 / 32), optimizer)


def _norm_kernel(field: Field) -> Contestant:
    """What NeMo Automodel does since its pull request 3685: one Triton kernel for all gradient norms, and a clip in place."""
    _require_uniform(field)
    contestant, measures = _fused(field), lwadamw.AdamW(field.groups(), norms=False)
    field.enter(measures, 0, field.state, step=_one)
    tensors = [p.detach() for p in field.params] + [p.grad for p in field.params]
    gradients = tensors[len(field.params) :]

    def step() -> list[float]:
        norm = measures.clip_grad_norm_(1.0)
        torch._foreach_mul_(gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0))
        contestant.optimizer.step()
        norms: list[float] = torch.stack(torch._foreach_norm(tensors)).tolist()
        return norms

    return Contestant(step, (STEP + CLIP + LOG) * field.itemsize, contestant.optimizer)


def _usual_way(field: Field) -> Contestant:
    _require_uniform(field)
    contestant = _fused(field)
    contestant.step = lambda: usual_way(field.params, contestant.optimizer)
    contestant.bytes_per_element = (STEP + CLIP + LOG) * field.itemsize
    return contestant


# Key: the name for --peers. Value: the name in tables, and the function that makes the contestant.
PEERS: dict[str, tuple[str, Callable[[Field], Contestant]]] = {
    "fused": (FUSED, _fused),
    "fused_one_group": ("torch fused, one group", _fused_one_group),
    "fused_mixed": ("torch fused, bf16 moments", _fused_mixed),
    "fused_copies": ("torch fused on float32 copies", _fused_copies),
    "foreach": ("torch foreach", _foreach),
    "compile": ("torch.compile of foreach", _compile),
    "optimi": ("optimi Triton", _optimi),
    "deepspeed": ("DeepSpeed FusedAdam", _deepspeed),
    "apex": ("apex FusedAdam", _apex),
    "torchao": ("torchao AdamW8bit", _torchao),
    "bitsandbytes": ("bitsandbytes AdamW8bit, to nearest", _bitsandbytes),
    "flashoptim": ("flashoptim FlashAdamW", _flashoptim),
    "usual": ("usual way: clip_grad_norm_, fused, norms", _usual_way),
    "norm_kernel": ("Triton norm, clip in place, fused, norms", _norm_kernel),
}


def _clip_step_norms(optimizer: Any) -> Callable[[], object]:
    def step() -> object:
        optimizer.step()
        return optimizer.norms()

    return step


def ours(field: Field, package: ModuleType, backend: str | None, label: str = "lwadamw") -> dict[str, Contestant]:
    """The variants of lwadamw as contestants.

    Args:
        field: the parameters.
        package: the package of the working tree or of another revision.
        backend: the backend of the package; None: the default.
        label: name of the package in tables.

    Returns:
        Contestants by name.
    """
    moved, again = field.bytes_per_element, field.storage.grad.itemsize

    def enter(bytes_per_element: float, **options: Any) -> Contestant:
        stored = COMBINATIONS[field.combination].options
        optimizer = package.AdamW(field.groups(), backend=backend, **stored, **options)
        return field.enter(optimizer, bytes_per_element, field.state, step=_one)

    entered = {
        label: enter(moved),
        f"{label}, norms off": enter(moved, norms=False),
        f"{label}, clipping": enter(moved + again, max_grad_norm=1.0),
        f"{label}, clipping, norms read": enter(moved + again, max_grad_norm=1.0),
    }
    if backend == "torch":  # This backend computes norms only when they are read, so both variants take the same step.
        del entered[f"{label}, norms off"]
    measured = entered[f"{label}, clipping, norms read"]
    measured.step = _clip_step_norms(measured.optimizer)
    return entered


def _one() -> Tensor:
    return torch.ones(())


def peers(field: Field, wanted: Sequence[str] | None = None) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Make the peers. Each peer takes one step, so that a peer that cannot work fails here.

    Args:
        field: the parameters.
        wanted: keys of PEERS; None: all. torch fused always takes part.

    Returns:
        Contestants by name, and by name the reason for each peer that cannot take part.
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
        except OtherStorage:
            continue
        except Unavailable as reason:
            missing[name] = str(reason)
        except Exception as error:
            # The error comes from another package or a compiler. Whatever it is, the other peers are measured.
            if key == "fused":
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error) else ''}"
    return entered, missing
