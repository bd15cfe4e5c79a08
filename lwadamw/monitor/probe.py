"""The probe: the gain of every matrix on a fixed batch, and how much one optimizer step changes its output."""

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
_GOLDEN: Final = 0.6180339887498949  # the golden ratio minus 1


class Probe:
    r"""Measures gain and alignment of every matrix at one step, on a batch that stays the same.

    W_t is the weight before step t. X holds the inputs that the weight gets on the probe batch, under the weights before step
    t. dW = W_(t+1) - W_t is the whole change in the step, including weight decay and the rounding of the parameter. All
    statistics of one measurement use the same X, W_t and dW, so changes in earlier layers do not count. Norms are Frobenius
    norms.

        gain                   rms(W_t X) / rms(X)                source: Fan et al. 2510.15262, Figure 1
        weight_alignment       |W_t X| / (|W_t| |X|)              source: Kosson et al. 2510.19093
        update_alignment       |dW X| / (|dW| |X|)
        alignment_ratio        update_alignment / weight_alignment
        representation_change  |dW X| / |W_t X| = alignment_ratio |dW| / |W_t|

    It follows that gain = weight_alignment * rms(W_t) * fan_in. Kosson et al. measure on the batch of the step itself. To do
    the same, assign that batch to `batch` before `before_step()`.

    The probe measures the multiplication alone, without the bias and without what comes after it. It measures weights of the
    matrix role, or all weights in groups without roles. The weight must belong to a module like nn.Linear, one with
    `in_features` and `out_features`. The weight and the parameter in the optimizer must be the same object. All other
    parameters are NaN: convolutions, packed experts, and weights that are used without calling their module. Frozen weights are
    not in the optimizer, so they have no values at all. If modules share a weight, or if a module is called several times, X
    holds the inputs of all calls. A weight that `param_groups(segments=...)` splits has values per segment. After a skipped
    step the alignments of the update are NaN.

    Rows of X are chosen evenly from all calls, at most `max_rows` for each weight. The probe keeps them, and a copy of the
    weights, from `before_step()` to `after_step()`, in their own dtypes.

    Args:
        optimizer: the optimizer whose steps are measured.
        model: the model that the optimizer trains. The optimizer must have the parameters of this model.
        batch: what the model is called with: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        forward: called as forward(model, batch), for models that need another call.
        max_rows: number of inputs (tokens) that are kept for each weight.

    Raises:
        ValueError: max_rows is not positive, or the model has no weight that can be measured.
        RuntimeError: a weight is split over processes: a part of a matrix has no gain.

    Examples:
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
            raise ValueError(f"Probe: max_rows={max_rows} is not positive. Give a positive number, for instance 512.")
        self.optimizer = optimizer
        self.model = model
        self.batch = batch
        self.forward = _call if forward is None else forward
        self.max_rows = max_rows
        # For each weight that was used: the member, X of shape [rows, fan_in], and a copy of the weight.
        self._before: list[tuple[Member, Tensor, Tensor]] | None = None
        if optimizer.shards.declared:
            raise RuntimeError(
                "Probe: this AdamW was built with shard_group, so its parameters are parts of matrices, and a part has no "
                "gain. Probe a model whose weights are not sharded."
            )
        self._check_whole(self._sites())
        if not self._sites():
            raise ValueError(
                "Probe: no matrix of the optimizer is the weight of a module like nn.Linear in this model. Give the model "
                "whose parameters the optimizer has, and make the probe before any conversion that replaces parameters."
            )

    @torch.no_grad()
    def before_step(self) -> None:
        """Run the model on the batch and keep what `after_step()` needs.

        The model runs in evaluation mode, without gradients, under the autocast of the caller. Afterwards its modes, its hooks
        and the random number generators are as they were before.

        Raises:
            RuntimeError: a weight is sharded over processes, or the forward pass called none of the modules.
        """
        sites = self._sites()
        self._check_whole(sites)
        samples = [_InputSample(self.max_rows) for _ in sites]
        handles = [
            module.register_forward_pre_hook(sample.hook, with_kwargs=True)
            for (_, modules), sample in zip(sites, samples, strict=True)
            for module in modules
        ]
        try:
            with _evaluating(self.model), torch.random.fork_rng(_devices(self.model)):
                self.forward(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()
        self._before = [
            (member, sample.values, member.param.detach().clone())
            for (member, _), sample in zip(sites, samples, strict=True)
            if sample.values is not None
        ]
        if not self._before:
            self._before = None
            raise RuntimeError(
                f"Probe: the forward pass called none of the {len(sites)} modules with a matrix. Give the model "
                "before torch.compile, or a forward(model, batch) that calls that model."
            )

    @torch.no_grad()
    def after_step(self) -> dict[str, Array]:
        """Measure the step since `before_step()`. This copies from the device once, and frees what was kept.

        Returns:
            statistic -> float64[len(names)], in the order of `optimizer.norm_names()`.

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
            # The torch backend has no norms of segments, but one for the whole weight. So both are measured.
            parts = _sums(member, x, weight)
            names += [member.name, *member.segment_names()]
            sums.append(torch.cat([_whole(parts), parts]))
        table = torch.cat([part.to(sums[0].device, non_blocking=True) for part in sums]).cpu().numpy()
        measured = dict(zip(names, _statistics(table), strict=True))
        unknown = np.full(len(STATISTICS), np.nan)
        rows = np.array([measured.get(name, unknown) for name in self.optimizer.norm_names()])
        return dict(zip(STATISTICS, rows.reshape(-1, len(STATISTICS)).T.copy(), strict=True))

    def _check_whole(self, sites: list[tuple[Member, list[nn.Module]]]) -> None:
        for member, _ in sites:
            if is_sharded(member.param):
                raise RuntimeError(
                    f"Probe: {member.name!r} {tuple(member.param.shape)} is sharded over processes, and a shard has no "
                    "gain. Probe a model whose weights are not sharded."
                )

    def _sites(self) -> list[tuple[Member, list[nn.Module]]]:
        """Return the weights that can be measured, each with the modules that multiply with it."""
        modules: dict[int, list[nn.Module]] = {}
        for module in self.model.modules():
            if _is_linear(module):
                modules.setdefault(id(module.weight), []).append(module)
        return [
            (member, modules[id(member.param)])
            for member in members_of(self.optimizer.param_groups)
            if id(member.param) in modules and member.group.get("role", "matrix") == "matrix"
        ]


class _InputSample:
    """Keeps at most `limit` rows of the inputs of all calls, spread evenly over them.

    Row i is kept while frac(i * golden ratio) is among the `limit` smallest. For every limit, the kept rows lie evenly. They
    prefer no position within a sequence. Every n-th row would prefer some positions, if sequences have 2^k tokens.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.values: Tensor | None = None  # [rows, fan_in]
        self._keys: Tensor | None = None
        self._seen = 0

    def hook(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the inputs of one call. A module calls this as its forward pre-hook."""
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
    """Return the sums that the statistics need, float64[segments, 6].

    The columns hold the square sums of W, dW, X, W X and dW X, and the number of rows of W over the fan_in.
    """
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
    """Return the sums of the whole weight, float64[1, 6]. All segments have the same inputs."""
    whole = parts.sum(dim=0, keepdim=True)
    whole[:, 2] = parts[:1, 2]
    return whole


def _squares(tensor: Tensor, dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=dim, dtype=torch.float64)
    return norm.square()


def _statistics(sums: Array) -> Array:
    """Return the statistics, float64[n, 5], in the order of STATISTICS. 0/0 is NaN."""
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
    # A compiled module does not run hooks that are added after compilation. The original module does.
    model = getattr(model, "_orig_mod", model)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _devices(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    # This sets the flags directly, because train() and eval() of some modules do more, for instance merge weights.
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
