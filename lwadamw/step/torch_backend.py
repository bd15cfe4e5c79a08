"""torch backend: updates parameters with torch's own functional AdamW and effective hyperparameters.

It updates parameters on the CPU, complex and double-precision parameters, and groups that ask for foreach, differentiable or
fused=False. buckets.py says which parameters share a call. packed_step.py updates parameters that torch cannot update as
they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..state import creation, decay, keys
from ..state.checks import capturing, check_state
from ..state.members import Member, local, wrap_like
from ..state.shards import Shards, Split
from ..state.storage import MOMENTS
from ..state.transfer import moved
from ..state.whole_thresholds import WholeThresholds
from . import torch_fused_cpu as fused_cpu
from .buckets import Bucket, Entry, Needs, fill_buckets, follow_threshold, follow_values, refill_buckets
from .packed_step import step_packed
from .seen_groups import SeenGroups
from .torch_norms import HalfNorms, resting_sums, sums_of


class TorchBackend:
    """The parameters that torch's AdamW updates, sorted into buckets.

    Args:
        thresholds: says what the huber thresholds of split parameters need of other processes.

    Attributes:
        buckets: the parameters that the current or last step updates. Parameters without a gradient are in no bucket.
    """

    def __init__(self, thresholds: WholeThresholds) -> None:
        self._thresholds = thresholds
        self.buckets: list[Bucket] = []
        self._entries: dict[int, Entry] = {}  # by the parameter's order
        self._without_gradient: dict[str, list[Tensor]] = {}  # by the attribute that would hold the gradient
        self._seen = SeenGroups()

    def fits(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether the members that the last step had still have the names and segments that their groups give them.

        Args:
            groups: the optimizer's parameter groups.
        """
        return self._seen.names_hold(groups)

    def prepare(self, members: Iterable[Member], groups: Sequence[dict[str, Any]], state: Any, fresh: bool) -> bool:
        """Collect the parameters and gradients of this step, and create missing state.

        Args:
            members: parameters of the torch backend.
            groups: the optimizer's parameter groups.
            state: the optimizer's state by parameter.
            fresh: parameters and state are the same objects as in the last call. What was checked then is not checked
                again.

        Returns:
            Whether state has been created or moved.

        Raises:
            RuntimeError: a gradient is sparse, torch cannot update a parameter, or state does not fit its parameter.
                Nothing has been written then.
            TypeError: a hyperparameter is neither a number nor a tensor of one element.
        """
        change = self._seen.change(groups) if fresh else "other"
        usable = change == "none" or (change == "values" and follow_values(self.buckets, groups))
        if usable and refill_buckets(self.buckets, self._without_gradient):
            self._seen.accept()
            return False
        if not fresh:
            self._entries = {}
        self.buckets, self._without_gradient = fill_buckets(members, groups, state, self._entries)
        for bucket in self.buckets:
            bucket.split = self._thresholds.counts
        self._seen.remember(groups)
        return self._complete_state()

    def _complete_state(self) -> bool:
        """Create the state that the parameters of this step lack. Return whether there was any."""
        stale: list[tuple[Bucket, Entry, Needs]] = []
        for bucket in self.buckets:
            options = bucket.options
            on_device = bool(options["capturable"] or bucket.fused or bucket.implicit_fused)
            flags = (bool(options["amsgrad"]), on_device, bucket.huber_decay is not None, bucket.packed)
            needs = [(*flags, entry.kept) for entry in bucket.entries]
            stale += [(bucket, e, n) for e, n in zip(bucket.entries, needs, strict=True) if e.completed_for != n]
        if stale and capturing():
            raise RuntimeError(
                f"lwadamw.AdamW: {stale[0][1].member.name!r} has no state yet, and a CUDA graph would create it again at each "
                "replay. Take one uncaptured step with the same gradients before the capture."
            )
        for _, entry, _ in stale:
            check_state(entry.member, entry.state)
        if stale:
            creation.own_steps(entry.state for bucket in self.buckets for entry in bucket.entries)
        for bucket, entry, needed in stale:
            _complete(entry.state, entry.member, *needed[:2], self._thresholds.first.get(id(entry.member.param)))
            if bucket.packed:
                creation.lay_out(entry.state, entry.member.param)
            entry.completed_for = needed
        return bool(stale)

    def sum_gradients(self, shards: Shards) -> list[tuple[Split, Tensor]]:
        """Return sums of squares of what this process holds of all gradients, before unscaling.

        Args:
            shards: says how each parameter is split over processes.

        Returns:
            For each split and device the split, and a float64[].
        """
        norms: dict[tuple[Split, torch.device], list[Tensor]] = {}
        for bucket in self.buckets:
            for entry, whole in zip(bucket.entries, bucket.grads, strict=True):
                grad = local(whole)
                norm = _norm(torch.view_as_real(grad) if grad.is_complex() else grad)
                norms.setdefault((shards.split_of(entry.member), norm.device), []).append(norm)
        return [
            (split, torch.linalg.vector_norm(torch.stack([n.double() for n in alike])).square())
            for (split, _), alike in norms.items()
        ]

    def run(
        self, *, factor: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None, norms: bool = False
    ) -> None:
        """Update all parameters of the buckets. `prepare` has to be called before.

        Args:
            factor: multiplies the gradients, one element. The update uses scaled copies; the gradients stay as they are.
                None: no clipping.
            grad_scale: divides the gradients, one element. None: the gradients are not scaled, or `factor` unscales them.
            found_inf: not zero if the step must change nothing, one element. torch's fused kernel reads it on the device
                if the group asks for fused. Otherwise the host reads it. None: the step happens.
            norms: measure 16-bit and packed parameters now. Later that is not possible, because weights and moments are
                rounded.

        Raises:
            RuntimeError: the host would have to read `found_inf` while a CUDA graph is being captured.
        """
        if found_inf is not None and capturing():
            for bucket in self.buckets:
                if not bucket.fused:
                    raise RuntimeError(
                        f"lwadamw.AdamW: whether {bucket.entries[0].member.name!r} takes its step is decided on the host, "
                        "which nothing can do in a CUDA graph. Use nonfinite='pass' and no GradScaler, or fused=True."
                    )
        for bucket in self.buckets:
            grads, bucket.grads = bucket.grads, []  # norms are read later; do not keep gradients alive until then
            bucket.factor = 1 / grad_scale if grad_scale is not None else factor
            if found_inf is not None:
                bucket.skipped = found_inf if bucket.fused else bool(found_inf)
                if bucket.skipped is True:
                    continue
            if bucket.packed:
                for entry, grad in zip(bucket.entries, grads, strict=True):
                    step_packed(entry, grad, bucket, norms)
            else:
                measured = HalfNorms(bucket, grads) if norms else None
                _step_plain(bucket, grads, grad_scale, found_inf)
                if measured is not None:
                    measured.finish()
                if bucket.fused and grad_scale is not None:
                    bucket.factor = None  # torch's fused kernel has unscaled the gradients in place
            _keep_hyperparameters(bucket.options)

    def absolute_sums(self) -> list[tuple[Sequence[Tensor], Tensor]]:
        """Return what the huber thresholds of split parameters need after a step: parameters, and their sums of |w|."""
        entries = [entry for bucket in self.buckets for entry in bucket.entries]
        return [([e.member.param], e.absolute.view(1)) for e in entries if e.absolute is not None]

    def follow_thresholds(self, totals: Sequence[Tensor]) -> None:
        """Move the huber thresholds of split parameters after a step.

        Args:
            totals: for each entry of `absolute_sums`, the sum over the whole parameter, float64[1].
        """
        waiting = [(b, entry) for b in self.buckets for entry in b.entries if entry.absolute is not None]
        for (bucket, entry), total in zip(waiting, totals, strict=True):
            member = entry.member
            scale = keys.HUBER_SCALE.of(member.group) / max(self._thresholds.counts[id(member.param)], 1)
            skipped = bucket.skipped if isinstance(bucket.skipped, Tensor) else None
            decay.follow(entry.state[decay.THRESHOLD], (total[0] * scale).float(), skipped)
            entry.absolute = None

    @torch.no_grad()
    def measure(self) -> None:
        """Compute the statistics of the last step now, because its gradients are about to be dropped."""
        for bucket in self.buckets:
            for entry in bucket.entries:
                entry.sums = sums_of(bucket, entry)

    @torch.no_grad()
    def norm_sums(self, members: Iterable[Member], state: Any) -> list[tuple[Member, Tensor]]:
        """Return the statistics of the last step for every parameter that has taken a step so far.

        They are computed from weights and state. The sum of a gradient that was cleared since the step is NaN.

        Args:
            members: parameters of the torch backend.
            state: the optimizer's state by parameter.

        Returns:
            Each parameter with its statistics, float64[segments, 4]. The columns are those of `AdamW.norm_sums`.
        """
        held = [m for m in members if state.get(m.param)]
        places = {id(entry.member.param): (bucket, entry) for bucket in self.buckets for entry in bucket.entries}
        done = {id(m.param): sums_of(*places[id(m.param)]) for m in held if id(m.param) in places}
        return [(m, done[id(m.param)] if id(m.param) in done else resting_sums(m, state[m.param])) for m in held]


def _norm(grad: Tensor) -> Tensor:
    """Return the norm of a real gradient. A square that float32 cannot hold does not spoil it."""
    if grad.device.type != "cpu" or grad.dtype == torch.float64:
        double: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64)
        return double
    # A CPU takes 14 times as long for float64, because torch makes a copy first.
    single: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float32)
    if 1e-15 < single < math.inf or not grad.numel():
        return single
    largest: Tensor = torch.linalg.vector_norm(grad, ord=math.inf)
    if not 0 < largest < math.inf:
        return largest.float()
    exact: Tensor = torch.linalg.vector_norm(grad, dtype=torch.float64)
    return exact


def _complete(state: dict[str, Any], member: Member, amsgrad: bool, on_device: bool, threshold: Tensor | None) -> None:
    """Create what the state of one parameter lacks. Put `step` on the device that torch's implementation reads it on."""
    p = member.param
    step = state.get("step", 0.0)
    # A counter of 16 bits would stop at 256 or 2048.
    counts = isinstance(step, Tensor) and step.dtype in (torch.float32, torch.float64)
    if not isinstance(step, Tensor) or (not on_device and (step.device.type != "cpu" or not counts)):
        dtype = torch.float32 if on_device else torch.get_default_dtype()
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state["step"] = torch.tensor(float(step), dtype=dtype, device=p.device if on_device else "cpu")
    elif on_device and (step.device != p.device or step.dtype != torch.float32):
        state["step"] = step.to(p.device, torch.float32)
    creation.create_state(state, p, {**member.group, "amsgrad": amsgrad}, member.whole_segments, threshold)


def _step_plain(bucket: Bucket, grads: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Update a bucket of parameters that torch can update as they are stored. Arguments are those of `run`."""
    options, params = bucket.options, bucket.params()
    if bucket.implicit_fused:
        moments = MOMENTS if options["amsgrad"] else MOMENTS[:2]
        columns = [params, grads, *map(bucket.column, moments)]
        fused_cpu.step(columns, bucket.column("step"), bucket.factor, options)
    else:
        _call_torch(bucket, params, grads, grad_scale, found_inf)
    if bucket.huber_decay is not None:
        _decay_huber(bucket, bucket.huber_decay)
    if bucket.implicit_fused or (bucket.fused and params[0].device.type == "cpu"):
        # torch's fused CPU kernel does not tell autograd that it has written. A later backward through the old weights
        # must still be an error.
        torch._C._increment_version(params)


def _call_torch(
    bucket: Bucket,
    params: list[Tensor],
    grads: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Call torch's functional `adamw`."""
    options, fused = bucket.options, bucket.fused
    with torch.set_grad_enabled(options["differentiable"]):
        if bucket.factor is not None and not (fused and grad_scale is not None):
            # DTensors on different meshes cannot be multiplied in one call. What the process holds of them can.
            scaled = _products(list(map(local, grads)), bucket.factor)
            # The product of a 0-d gradient has the dtype of the factor.
            grads = [wrap_like(g, s.to(g.dtype)) for s, g in zip(scaled, grads, strict=True)]
        adamw(
            params,
            grads,
            bucket.column("exp_avg"),
            bucket.column("exp_avg_sq"),
            bucket.column("max_exp_avg_sq") if options["amsgrad"] else [],
            bucket.column("step"),
            has_complex=any(map(torch.is_complex, params)),
            grad_scale=_beside(params, grad_scale) if fused else None,
            found_inf=_beside(params, found_inf) if fused else None,
            **options,
        )


def _products(tensors: list[Tensor], factor: Tensor) -> list[Tensor]:
    """Return tensors times a factor of one element, each on its own device. torch wants both on the same device."""
    factors = {device: moved(factor, device) for device in {t.device for t in tensors}}
    if len(factors) == 1:
        return list(torch._foreach_mul(tensors, factors[tensors[0].device]))
    return [product for t in tensors for product in torch._foreach_mul([t], factors[t.device])]


def _beside(params: list[Tensor], scalar: Tensor | None) -> Tensor | None:
    """Return a scalar for torch's fused kernel. torch itself would not wait for a copy to the CPU."""
    return None if scalar is None else moved(scalar, params[0].device)


def _keep_hyperparameters(options: dict[str, Any]) -> None:
    """Copy hyperparameters that are tensors. Norms are read later, when a schedule may have overwritten them."""
    for name in ("lr", "beta1", "beta2", "weight_decay", "eps"):
        if isinstance(options[name], Tensor):
            options[name] = options[name].detach().clone()


def _decay_huber(bucket: Bucket, decay_per_step: float | Tensor) -> None:
    """Apply huber decay to the parameters of a bucket, after an update without decay."""
    for entry in bucket.entries:
        weight, threshold = local(entry.member.param.detach()), entry.state[decay.THRESHOLD]
        entry.threshold = threshold.clone()
        skipped, taken = None, decay_per_step
        if isinstance(bucket.skipped, Tensor):
            skipped = bucket.skipped.to(weight.device)
            taken = torch.where(skipped == 0, decay_per_step, 0.0)
        decay.shrink(weight, threshold, taken)
        follow_threshold(entry, weight, bucket, skipped)
