"""Probe: gain of every matrix on a fixed batch, and what one optimizer step changes of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from ..state.arrays import Array
from ..state.members import Member, is_sharded, members_of

if TYPE_CHECKING:
    from ..step.optimizer import AdamW

STATISTICS: Final = ("gain", "weight_alignment", "update_alignment", "alignment_ratio", "representation_change")
_GOLDEN: Final = 0.6180339887498949


class Probe:
    r"""Gain and alignment of every matrix at one time step, on a batch that stays the same.

    With W_t the weight before step t, X the inputs it gets on the probe batch under the weights before step t, and
    dW = W_(t+1) - W_t the whole change of the step, decay and the parameter's rounding included. Inputs are held fixed,
    norms are Frobenius norms:

        gain                   rms(W_t X) / rms(X)                Fan et al. 2510.15262, Figure 1
        weight_alignment       |W_t X| / (|W_t| |X|)              Kosson et al. 2510.19093
        update_alignment       |dW X| / (|dW| |X|)
        alignment_ratio        update_alignment / weight_alignment
        representation_change  |dW X| / |W_t X|                   = alignment_ratio |dW| / |W_t|

    All of one measurement come from the same X, W_t and dW. And gain = weight_alignment rms(W_t) fan_in. Kosson et al.
    measure on the batch of the step itself; for that, assign it to `batch` before `before_step()`.

    Measured is the multiplication, without bias and whatever follows. Only a matrix-role weight (or, in groups without
    roles, any) of a module like nn.Linear is, one with `in_features` and `out_features`, found by its identity. Convolutions,
    packed experts, weights used without calling their module, and frozen ones are NaN or have no row in the optimizer.
    Where modules share a weight, or one is called several times, X holds the inputs of all calls. A weight split by
    `param_groups(segments=...)` has its values per part. A skipped step has alignments of the update NaN.

    Rows of X are taken evenly from all calls, at most `max_rows` for each weight. They and a copy of the weights are kept
    from `before_step()` to `after_step()`, in their own types.

    Args:
        optimizer: whose steps are measured.
        model: that it trains; the modules that are called, not a compiled form of them.
        batch: what the model is called with: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        forward: forward(model, batch), for models that are called in another way.
        max_rows: inputs (tokens) kept of each weight.

    Raises:
        ValueError: max_rows is not positive, or the model has no weight that can be measured.

    Example:
        >>> from lwadamw import AdamW
        >>> model = nn.Linear(4, 4, bias=False)
        >>> optimizer = AdamW(model.parameters())
        >>> probe = Probe(optimizer, model, torch.randn(8, 4))
        >>> model(torch.randn(2, 4)).sum().backward()
        >>> probe.before_step()
        >>> optimizer.step()
        >>> probe.after_step()["gain"].shape
        (1,)
    """

    def __init__(
        self,
        optimizer: AdamW,
        model: nn.Module,
        batch: Any,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        *,
        max_rows: int = 512,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"Probe: max_rows={max_rows} is not positive. Give 512, for instance.")
        self.optimizer = optimizer
        self.model = model
        self.batch = batch
        self.forward = _call if forward is None else forward
        self.max_rows = max_rows
        self._before: list[tuple[Member, Tensor, Tensor]] | None = (
            None  # member, X of [rows, fan_in], copy of the weight
        )
        if not self._sites():
            raise ValueError(
                "Probe: no matrix of the optimizer is the weight of a module like nn.Linear in this model. Give the model "
                "whose parameters the optimizer has, before any conversion that replaces them."
            )

    @torch.no_grad()
    def before_step(self) -> None:
        """Run the model on the batch and keep what `after_step()` needs.

        The model runs in evaluation mode, without gradients, under the caller's autocast. Modes, hooks and random number
        generators are afterwards as they were.

        Raises:
            RuntimeError: a weight is sharded over processes, or the model called none of the modules.
        """
        sites = self._sites()
        for member, _ in sites:
            if is_sharded(member.param):
                raise RuntimeError(
                    f"Probe: {member.name!r} {tuple(member.param.shape)} is sharded over processes, and a part of it has no "
                    "gain. Probe a model whose weights are whole."
                )
        rows = [_Rows(self.max_rows) for _ in sites]
        handles = [
            module.register_forward_pre_hook(kept.hook, with_kwargs=True)
            for (_, modules), kept in zip(sites, rows, strict=True)
            for module in modules
        ]
        try:
            with _evaluating(self.model), torch.random.fork_rng(_devices(self.model)):
                self.forward(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()
        self._before = [
            (member, kept.values, member.param.detach().clone())
            for (member, _), kept in zip(sites, rows, strict=True)
            if kept.values is not None
        ]
        if not self._before:
            self._before = None
            raise RuntimeError(
                f"Probe: the forward pass called none of the {len(sites)} modules with a matrix. Give the model that is "
                "not compiled, or a forward(model, batch) that calls it."
            )

    @torch.no_grad()
    def after_step(self) -> dict[str, Array]:
        """Statistics of the step since `before_step()`, float64[len(names)] each, in the order of `optimizer.norm_names()`.

        Reads the result from the device once, and frees what was kept.

        Raises:
            RuntimeError: there was no `before_step()`, or the optimizer was built with norms=False.
        """
        if self._before is None:
            raise RuntimeError(
                "Probe: after_step() without before_step(). Call before_step() before each step to measure."
            )
        before, self._before = self._before, None
        names, sums = [], []
        for member, x, weight in before:
            # The torch backend has no norms of parts, and one row for the whole of a weight.
            parts = _sums(member, x, weight)
            names += [member.name, *member.segment_names()]
            sums.append(torch.cat([_whole(parts), parts]))
        table = torch.cat([part.to(sums[0].device, non_blocking=True) for part in sums]).cpu().numpy()
        measured = dict(zip(names, _statistics(table), strict=True))
        unknown = np.full(len(STATISTICS), np.nan)
        rows = np.array([measured.get(name, unknown) for name in self.optimizer.norm_names()])
        return dict(zip(STATISTICS, rows.reshape(-1, len(STATISTICS)).T.copy(), strict=True))

    def _sites(self) -> list[tuple[Member, list[nn.Module]]]:
        """The weights that can be measured, and the modules that multiply with them."""
        modules: dict[int, list[nn.Module]] = {}
        for module in self.model.modules():
            if _is_linear(module):
                modules.setdefault(id(module.weight), []).append(module)
        return [
            (member, modules[id(member.param)])
            for member in members_of(self.optimizer.param_groups)
            if id(member.param) in modules and member.group.get("role", "matrix") == "matrix"
        ]


class _Rows:
    """At most `limit` of all rows that pass, spread evenly over them.

    Row i is kept while frac(i golden ratio) is among the smallest. Any number of these lie evenly, and prefer no position
    within a sequence, as every n-th row of windows of 2^k tokens would.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.values: Tensor | None = None  # [rows, fan_in]
        self._keys: Tensor | None = None
        self._seen = 0

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.detach().reshape(-1, x.shape[-1])
        index = torch.arange(self._seen, self._seen + len(x), dtype=torch.float64, device=x.device)
        self._seen += len(x)
        keys = (index * _GOLDEN).frac()
        chosen = keys.argsort()[: self.limit]
        x, keys = x[chosen], keys[chosen]
        if self.values is not None and self._keys is not None:
            keys = torch.cat([self._keys, keys])
            chosen = keys.argsort()[: self.limit]
            x, keys = torch.cat([self.values, x])[chosen], keys[chosen]
        self.values, self._keys = x, keys


def _sums(member: Member, x: Tensor, before: Tensor) -> Tensor:
    """float64[segments, 6]: squares of W, dW, X, W X, dW X, and the rows of W times those of X."""
    dtype = torch.promote_types(torch.promote_types(before.dtype, x.dtype), torch.float32)
    x, weight = x.to(dtype), before.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        change = member.param.detach().to(dtype) - weight
        by_row = [_squares(weight, 1), _squares(change, 1), _squares(x @ weight.T, 0), _squares(x @ change.T, 0)]
    fan_in = weight.shape[1]
    sizes = [size // fan_in for size in member.segments] or [len(weight)]
    parts = [torch.stack([part.sum() for part in torch.split(squares, sizes)]) for squares in by_row]
    inputs = _squares(x.flatten(), 0).expand(len(sizes))
    outputs = torch.tensor(sizes, dtype=torch.float64, device=x.device) / fan_in
    return torch.stack([parts[0], parts[1], inputs, parts[2], parts[3], outputs], dim=1)


def _whole(parts: Tensor) -> Tensor:
    """float64[1, 6] of all segments; they have their inputs in common."""
    whole = parts.sum(dim=0, keepdim=True)
    whole[:, 2] = parts[:1, 2]
    return whole


def _squares(tensor: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float64)
    return norm.square()


def _statistics(sums: Array) -> Array:
    """float64[n, 5] in the order of STATISTICS; 0/0 is NaN."""
    weight, change, x, y, dy, outputs_per_input = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.sqrt(y / x / outputs_per_input)
        of_weight, of_update = np.sqrt(y / (weight * x)), np.sqrt(dy / (change * x))
        out = np.stack([gain, of_weight, of_update, of_update / of_weight, np.sqrt(dy / y)], axis=1)
    out[~np.isfinite(out)] = np.nan
    return out


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    sizes = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    return isinstance(weight, Tensor) and tuple(weight.shape) == sizes and weight.is_floating_point()


def _call(model: nn.Module, batch: Any) -> Any:
    # A compiled module does not run hooks that are added later.
    model = getattr(model, "_orig_mod", model)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # The flags themselves: train() and eval() of some modules do more, such as merging weights.
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
