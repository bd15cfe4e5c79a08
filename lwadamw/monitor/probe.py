"""The probe: the gain of every matrix on a fixed batch, and how much one optimizer step changes its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..state.arrays import Array
from ..state.members import Member, is_sharded, members_of
from ..state.transfer import moved
from .alignment import STATISTICS, statistics, sums_of
from .inputs import InputWatch, Use

if TYPE_CHECKING:
    from ..step.optimizer import AdamW


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
    matrix role, or all weights in groups without roles. The weight and the parameter in the optimizer must be the same
    object. It may belong to a module like nn.Linear, one with `in_features` and `out_features`. Or the forward pass may
    multiply with it by a function that `lwadamw.monitor.inputs.InputWatch` knows. These are the Conv1D of GPT-2, nn.Conv1d
    and nn.Conv2d without groups, whose inputs are patches, and experts that are packed into one tensor (experts, ., .). All
    other parameters are NaN, such as those of an einsum, of nn.MultiheadAttention and of nn.LSTM. Frozen weights are not in
    the optimizer, so they have no values at all. If modules share a weight, or if a module is called several times, or if
    functions multiply with its weight too, X holds the inputs of all calls.

    A weight that `param_groups(segments=...)` splits has values per segment; they are NaN if the rows of the weight are its
    inputs, as in Conv1D. Packed experts without segments have one value: the norms of W X, X and dW X are those of all experts
    together, |W| and |dW| are root mean squares over the experts that got inputs. After a skipped step the alignments of the
    update are NaN.

    Rows of X are chosen evenly from all calls, at most `max_rows` for each matrix. The probe keeps them, and a copy of the
    weights, from `before_step()` to `after_step()`, in their own dtypes.

    Args:
        optimizer: the optimizer whose steps are measured.
        model: the model that the optimizer trains. The optimizer must have the parameters of this model.
        batch: what the model is called with: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.
        forward: called as forward(model, batch), for models that need another call.
        max_rows: number of inputs (tokens) that are kept for each matrix.

    Raises:
        ValueError: max_rows is not positive, or the model has no matrix of the optimizer.
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
        # For each weight that was used: the member, a copy of the weight, and X of each matrix.
        self._before: list[tuple[Member, Tensor, Mapping[Use, Tensor]]] | None = None
        if optimizer.shards.declared:
            raise RuntimeError(
                "Probe: this AdamW was built with shard_group, so its parameters are parts of matrices, and a part has no "
                "gain. Probe a model whose weights are not sharded."
            )
        self._check_whole(self._members())
        if not self._members():
            raise ValueError(
                "Probe: no matrix of the optimizer is a parameter of this model. Give the model whose parameters the optimizer "
                "has, and make the probe before any conversion that replaces parameters."
            )

    @torch.no_grad()
    def before_step(self) -> None:
        """Run the model on the batch and keep what `after_step()` needs.

        The model runs in evaluation mode, without gradients, under the autocast of the caller. Afterwards its modes, its hooks
        and the random number generators are as they were before.

        Raises:
            RuntimeError: a weight is sharded over processes, or the forward pass multiplied with none of the weights.
        """
        members = self._members()
        self._check_whole(members)
        modules = self._linear_modules()
        watch = InputWatch([m.param for m in members], self.max_rows)
        handles = [
            handle
            for member in members
            for module in modules.get(id(member.param), ())
            for handle in watch.attach(module)
        ]
        try:
            with _evaluating(self.model), torch.random.fork_rng(_devices(self.model)), watch:
                self.forward(self.model, self.batch)
        finally:
            for handle in handles:
                handle.remove()
        found: dict[int, dict[Use, Tensor]] = {}
        for use, sample in watch.samples.items():
            of_weight = found.setdefault(use.weight, {})
            # A weight that is used in both directions is measured in the one that came first.
            if sample.values is not None and all(use.summed == other.summed for other in of_weight):
                of_weight[use] = sample.values
        self._before = [(m, m.param.detach().clone(), found[id(m.param)]) for m in members if found.get(id(m.param))]
        if not self._before:
            self._before = None
            raise RuntimeError(
                f"Probe: the forward pass multiplied with none of the {len(members)} matrices. Give the model "
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
        for member, weight, inputs in before:
            # Norms are those of segments, or of the whole where its rows are not contiguous in memory.
            names += [member.name, *member.segment_names()]
            sums.append(sums_of(member, weight, inputs))
        table = torch.cat([moved(part, sums[0].device) for part in sums]).cpu().numpy()
        measured = dict(zip(names, statistics(table), strict=True))
        unknown = np.full(len(STATISTICS), np.nan)
        rows = np.array([measured.get(name, unknown) for name in self.optimizer.norm_names()])
        return dict(zip(STATISTICS, rows.reshape(-1, len(STATISTICS)).T.copy(), strict=True))

    def _check_whole(self, members: list[Member]) -> None:
        for member in members:
            if is_sharded(member.param):
                raise RuntimeError(
                    f"Probe: {member.name!r} {tuple(member.param.shape)} is sharded over processes, and a shard has no "
                    "gain. Probe a model whose weights are not sharded."
                )

    def _linear_modules(self) -> dict[int, list[nn.Module]]:
        """Return the modules like nn.Linear by id() of their weight."""
        modules: dict[int, list[nn.Module]] = {}
        for module in self.model.modules():
            if _is_linear(module):
                modules.setdefault(id(module.weight), []).append(module)
        return modules

    def _members(self) -> list[Member]:
        """Return the matrices of the optimizer that are parameters of the model."""
        own = {id(p) for p in self.model.parameters()}
        return [
            member
            for member in members_of(self.optimizer.param_groups)
            if id(member.param) in own
            and member.param.ndim > 1
            and member.param.is_floating_point()
            and member.group.get("role", "matrix") == "matrix"
        ]


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
