"""torch backend: torch's own functional AdamW, fed with effective values.

Serves the CPU, complex and double-precision parameters, and whoever asks for foreach, differentiable or fused=False.
Parameters whose effective values agree share one call, however many groups they come from. What torch cannot store as the
group asks is unpacked to float32 one parameter at a time, updated, and packed again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..state import creation, decay, keys, packing
from ..state.checks import check_gradient, check_state
from ..state.draws import draw_inputs
from ..state.groups import effective
from ..state.identity import same
from ..state.members import Member, any_gradient, flat, gradient_of, gradients_of, local
from ..state.random_bits import hash_bits, random_bits
from ..state.storage import CODES, MOMENTS, storage_of
from . import torch_fused_cpu as cpu
from .torch_norms import resting_sums, step_sums

_FLAGS = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused")


@dataclass(slots=True)
class Entry:
    """A parameter whose state has been checked."""

    member: Member
    state: dict[str, Any]
    # Not None if torch's fused CPU kernel can take it as long as it stays there, its gradient and its group permitting.
    address: int | None
    completed_for: tuple[bool, ...] | None = None  # amsgrad, whether `step` is on the parameter's device, huber
    kept: str = "plain"  # how the weight is, see storage.py
    sums: Tensor | None = None  # float64[4], statistics of the last step where that measured them
    threshold: Tensor | None = None  # float32[], huber's, that the last step used


@dataclass
class Bucket:
    """Parameters that one call updates."""

    options: dict[str, Any]  # keyword arguments of the functional AdamW
    attribute: str  # where gradients are
    direct: bool  # nobody asked for it, but torch's fused CPU kernel serves
    packed: bool  # stored in some way that torch's implementations do not know
    huber_decay: float | Tensor | None  # lr wd of a group with huber decay; None: the decay is torch's own
    entries: list[Entry] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    factor: Tensor | None = None  # what the step multiplied the gradients with
    skipped: Tensor | bool = False  # nonzero: the step left them alone

    @property
    def fused(self) -> bool:
        return bool(self.options["fused"]) and not self.packed

    def params(self) -> list[Tensor]:
        return [entry.member.param for entry in self.entries]

    def column(self, key: str) -> list[Tensor]:
        return [entry.state[key] for entry in self.entries]


class TorchBackend:
    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        self._entries: dict[int, Entry] = {}
        self._without_gradient: dict[str, list[Tensor]] = {}  # by where it would be
        self._group_referents: list[Any] = []

    def prepare(self, members: Iterable[Member], groups: Sequence[dict[str, Any]], state: Any, fresh: bool) -> bool:
        """Collect what this step updates; whether that created state.

        fresh: parameters and state are the objects of the last call; what was checked then is not checked again

        Raises:
            RuntimeError: sparse gradient, or state that does not fit its parameter; nothing has been written.
        """
        referents = gc.get_referents(*groups)
        if fresh and same(referents, self._group_referents) and self._refill():
            return False
        if not fresh:
            self._entries = {}
        entries = self._entries
        self._without_gradient = {}
        buckets: dict[tuple[Any, ...], Bucket] = {}
        by_group: dict[tuple[int, bool, bool], Bucket] = {}
        group_fuses: dict[int, bool] = {}
        for m in members:
            # Not the member's own group: a framework may have put a copy in its place.
            p, group = m.param, groups[m.group_index]
            if m.group is not group:
                m = m._replace(group=group)
            attribute = keys.GRAD_ATTRIBUTE.of(group)
            grad = gradient_of(p, attribute)
            if grad is None:
                self._without_gradient.setdefault(attribute, []).append(p)
                continue
            if grad.layout != torch.strided:
                check_gradient(m, grad)
            entry = entries.get(m.order)
            if entry is None or (entry.address is not None and entry.address != p.data_ptr()):
                entry = entries[m.order] = Entry(m, state[p], p.data_ptr() if cpu.serves(p, state[p]) else None)
            entry.member = m
            storage = storage_of(p, grad, group, entry.state, m.segments)
            # In 16 bits torch's step and the decay would each round the weight.
            huber = decay.is_huber(group)
            entry.kept, packed = storage.weight, not storage.plain or (huber and p.dtype.itemsize < 4)
            direct = group_fuses.get(m.group_index)
            if direct is None:
                direct = group_fuses[m.group_index] = cpu.serves_group(group)
            if direct:
                direct = not packed and entry.address is not None and cpu.is_plain(p, grad)
            place = (m.group_index, direct, packed)
            bucket = by_group.get(place)
            if bucket is None:
                names = ("lr", "weight_decay", "eps", "beta1", "beta2", *_FLAGS)
                used, huber_decay = effective(group), None
                if huber:
                    huber_decay, used = used.lr * used.weight_decay, used._replace(weight_decay=0.0)
                values = (*used, *group["betas"], *(group[flag] for flag in _FLAGS))
                new = Bucket(dict(zip(names, values, strict=True)), attribute, direct, packed, huber_decay)
                bucket = by_group[place] = buckets.setdefault((attribute, direct, packed, huber_decay, *values), new)
            bucket.entries.append(entry)
            bucket.grads.append(grad)
        self.buckets, self._group_referents = list(buckets.values()), referents
        return self._complete()

    def _complete(self) -> bool:
        stale: list[tuple[Bucket, Entry, tuple[bool, bool, bool]]] = []
        for bucket in self.buckets:
            options = bucket.options
            on_device = bool(options["capturable"] or bucket.fused or bucket.direct)
            needs = (bool(options["amsgrad"]), on_device, bucket.huber_decay is not None)
            stale += [(bucket, entry, needs) for entry in bucket.entries if entry.completed_for != needs]
        for _, entry, _ in stale:
            check_state(entry.member, entry.state)
        for bucket, entry, needs in stale:
            _complete(entry.state, entry.member, *needs[:2])
            if bucket.packed:
                creation.lay_out(entry.state, entry.member.param)
            entry.completed_for = needs
        return bool(stale)

    def _refill(self) -> bool:
        """Give the last step's buckets this step's gradients; False if they do not all take the fused CPU kernel again."""
        if not all(bucket.direct for bucket in self.buckets) or any_gradient(self._without_gradient):
            return False
        grads: list[list[Any]] = []
        for bucket in self.buckets:
            params = bucket.params()
            grads.append(gradients_of(params, bucket.attribute))
            try:
                moved = list(map(Tensor.data_ptr, params)) != [entry.address for entry in bucket.entries]
                if moved or not all(map(cpu.is_plain, params, grads[-1])):
                    return False
            except (AttributeError, RuntimeError):
                return False  # a missing or sparse gradient
        for bucket, new in zip(self.buckets, grads, strict=True):
            bucket.grads, bucket.skipped = new, False
        return True

    def sum_gradients(self) -> list[Tensor]:
        """Sums of squares of all gradients, float64[], before unscaling; over all processes where they are DTensors."""
        norms: dict[tuple[torch.device, type], list[Tensor]] = {}
        for grad in (grad for bucket in self.buckets for grad in bucket.grads):
            real = torch.view_as_real(grad) if grad.is_complex() else grad
            # In its own precision a 16-bit norm would be wrong in the third digit.
            dtype = torch.float32 if real.dtype.itemsize < 4 else None
            norm = torch.linalg.vector_norm(real, dtype=dtype)
            norms.setdefault((norm.device, type(norm)), []).append(norm)
        totals = [torch.linalg.vector_norm(torch.stack([n.double() for n in alike])) for alike in norms.values()]
        return [(t.full_tensor() if hasattr(t, "full_tensor") else t).square() for t in totals]

    def run(
        self, *, factor: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None, norms: bool = False
    ) -> None:
        """Take the step.

        factor: multiplies the gradients, scaled copies of which are updated with; None for no clipping
        grad_scale: divides the gradients; None if factor already does
        found_inf: 1 to leave everything alone. Where fused was asked for, it is read on the device, else here.
        norms: measure them now where they cannot be found out later, from rounded weights and moments.
        """
        for bucket in self.buckets:
            options, fused, params = bucket.options, bucket.fused, bucket.params()
            grads, bucket.grads = bucket.grads, []  # a gradient kept for the norms would keep its memory
            bucket.factor = 1 / grad_scale if grad_scale is not None else factor
            if found_inf is not None:
                bucket.skipped = found_inf if fused else bool(found_inf)
                if bucket.skipped is True:
                    continue
            if bucket.packed:
                for entry, grad in zip(bucket.entries, grads, strict=True):
                    _step_packed(entry, grad, bucket, norms)
            elif bucket.direct:
                moments = MOMENTS if options["amsgrad"] else MOMENTS[:2]
                columns = [params, grads, *map(bucket.column, moments)]
                cpu.step(columns, bucket.column("step"), bucket.factor, options)
            else:
                with torch.set_grad_enabled(options["differentiable"]):
                    if bucket.factor is not None and not (fused and grad_scale is not None):
                        scaled = torch._foreach_mul(grads, bucket.factor.to(params[0].device, non_blocking=True))
                        grads = [s.to(g.dtype) for s, g in zip(scaled, grads, strict=True)]  # 0-d ones were promoted
                    adamw(
                        params,
                        grads,
                        bucket.column("exp_avg"),
                        bucket.column("exp_avg_sq"),
                        bucket.column("max_exp_avg_sq") if options["amsgrad"] else [],
                        bucket.column("step"),
                        has_complex=any(map(torch.is_complex, params)),
                        grad_scale=grad_scale if fused else None,
                        found_inf=found_inf if fused else None,
                        **options,
                    )
            if bucket.huber_decay is not None and not bucket.packed:
                _decay(bucket, bucket.huber_decay)
            if bucket.direct or (fused and params[0].device.type == "cpu"):
                # That kernel writes behind autograd's back; a backward through the old weights must still be an error.
                torch._C._increment_version(params)
            # Norms are read later, when a schedule may have moved on.
            for name in ("lr", "beta1", "beta2", "weight_decay", "eps"):
                if isinstance(options[name], Tensor):
                    options[name] = options[name].detach().clone()

    @torch.no_grad()
    def measure(self) -> None:
        """Measure the last step now, while its gradients are there."""
        for bucket in self.buckets:
            for entry in bucket.entries:
                entry.sums = _sums_of(bucket, entry)

    @torch.no_grad()
    def norm_sums(self, members: Iterable[Member], state: Any) -> list[tuple[Member, Tensor]]:
        """(parameter, float64[4] of its statistics) of the last step, for every parameter that has taken one before.

        Reconstructed from weights and state. The gradient counts as NaN where it has been cleared since.
        """
        done = {id(entry.member.param): _sums_of(bucket, entry) for bucket in self.buckets for entry in bucket.entries}
        held = [m for m in members if state.get(m.param)]
        return [(m, done[id(m.param)] if id(m.param) in done else resting_sums(m, state[m.param])) for m in held]


def _complete(state: dict[str, Any], member: Member, amsgrad: bool, on_device: bool) -> None:
    """Create what is missing of a parameter's state, with `step` where torch's implementation wants it."""
    p = member.param
    step = state.get("step", 0.0)
    if not isinstance(step, Tensor) or (not on_device and step.device.type != "cpu"):
        dtype = torch.float32 if on_device else torch.get_default_dtype()
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state["step"] = torch.tensor(float(step), dtype=dtype, device=p.device if on_device else "cpu")
    elif on_device and (step.device != p.device or step.dtype != torch.float32):
        state["step"] = step.to(p.device, torch.float32)
    creation.create_state(state, p, {**member.group, "amsgrad": amsgrad}, member.segments)


def _decay(bucket: Bucket, decay_per_step: float | Tensor) -> None:
    """Huber decay, after a step without."""
    for entry in bucket.entries:
        weight, threshold = local(entry.member.param.detach()), entry.state[decay.THRESHOLD]
        entry.threshold = threshold.clone()
        skipped = None
        if isinstance(bucket.skipped, Tensor):
            skipped = bucket.skipped.to(weight.device)
            decay_per_step = torch.where(skipped == 0, decay_per_step, 0.0)
        decay.shrink(weight, threshold, decay_per_step)
        decay.follow(threshold, weight, keys.HUBER_SCALE.of(entry.member.group), skipped)


def _sums_of(bucket: Bucket, entry: Entry) -> Tensor:
    if entry.sums is not None and not bucket.skipped:
        return entry.sums
    if bucket.packed:
        return resting_sums(entry.member, entry.state)
    huber = None if bucket.huber_decay is None or entry.threshold is None else (entry.threshold, bucket.huber_decay)
    return step_sums(entry.member, entry.state, bucket.options, bucket.factor, bucket.skipped, huber)


@torch.no_grad()
def _step_packed(entry: Entry, grad: Tensor, bucket: Bucket, norms: bool) -> None:
    """The step of one parameter, in float32 however it is stored."""
    member, state, kept, options = entry.member, entry.state, entry.kept, bucket.options
    p = member.param
    weight = packing.read_weight(p, state, kept)
    before = weight.clone() if norms else weight
    moments = [key for key in MOMENTS if key in state and (key != "max_exp_avg_sq" or options["amsgrad"])]
    columns = {key: packing.read_moment(state, key) for key in moments}
    g = torch.empty_like(weight).copy_(local(grad))  # laid out in memory as the weight is
    if bucket.factor is not None:
        torch._foreach_mul_([g], bucket.factor.to(p.device))
    arrays = [[flat(array)] for array in (weight, g, *columns.values())]
    if p.device.type == "cpu" and options["fused"] is not False and cpu.takes_numbers(options):
        cpu.step(arrays, [state["step"]], None, options)
    else:
        w, g_, m, v, *x = arrays
        adamw(w, g_, m, v, x[0] if x else [], [state["step"]], **{**options, "foreach": False, "fused": False})
    if bucket.huber_decay is not None:
        decay.shrink(weight, state[decay.THRESHOLD], bucket.huber_decay)
    bits = random = None
    if kept == "stochastic" or any(state[key].dtype in CODES for key in moments):
        (seed, stream, index), step = draw_inputs(member), int(state["step"])
        bits = hash_bits(index, seed, stream, step)
        random = random_bits(index, seed, stream, step) if kept == "stochastic" else None
    for key, values in columns.items():
        packing.write_moment(state, key, values, bits)
    packing.write_weight(p, state, kept, weight, random)
    if norms or bucket.huber_decay is not None:
        after = packing.read_weight(p, state, kept)
    if bucket.huber_decay is not None:
        decay.follow(state[decay.THRESHOLD], after, keys.HUBER_SCALE.of(entry.member.group))
    if norms:
        change = after - before
        pairs = ((after, after), (change, change), (g, g), (before, change))
        entry.sums = torch.stack([(a.double() * b.double()).sum() for a, b in pairs])
