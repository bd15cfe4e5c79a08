"""torch's ZeroRedundancyOptimizer with names: every process keeps the names of the parameters that it updates.

torch's own class takes tensors only, not (name, tensor) pairs, and copies `param_names` of all parameters to processes that
have some of them. Run with torch 2.13.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's module warns about torch.jit
    from torch.distributed import optim

from ..state import keys
from ..state.names import has_names
from ..step.optimizer import AdamW

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Base: Any = optim.ZeroRedundancyOptimizer
_NAMES = "param_names"
# Every process has these keys for its own parameters.
_OWN = ("params", _NAMES, keys.SEGMENTS.name)

# torch's class has arguments of its own, and shows these values in its groups, where schedulers look for them.
_SHARED = ("lr", "betas", "eps", "weight_decay", "parameters_as_bucket_view", "overlap_with_ddp")


class ZeroRedundancyOptimizer(_Base):  # type: ignore[misc]
    """A `torch.distributed.optim.ZeroRedundancyOptimizer` around `lwadamw.AdamW` that takes groups with names.

    `max_grad_norm`, `norms()` of the inner optimizer `self.optim` and a `Monitor` of it work on the whole model: processes tell
    each other about their parameters under their names. Then they are collective.

    Args:
        params: what `lwadamw.param_groups` returned, (name, parameter) pairs, or tensors.
        process_group: the processes that share the parameters. None: all.
        **options: further arguments of torch's class, and those of `lwadamw.AdamW`.

    Raises:
        TypeError: an option is not known.

    Examples:
        ```python
        optimizer = ZeroRedundancyOptimizer(lwadamw.param_groups(model, base_width=256), lr=3e-3, weight_decay=0.1)
        ```
    """

    def __init__(self, params: Iterable[Any], *, process_group: ProcessGroup | None = None, **options: Any) -> None:
        self._names: dict[int, str] = {}
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        world = torch.distributed.group.WORLD if process_group is None else process_group
        super().__init__(
            [self._unpaired(group) for group in groups],
            functools.partial(AdamW, shard_group=world, **{k: v for k, v in options.items() if k not in _SHARED}),
            process_group=process_group,
            **{k: v for k, v in options.items() if k in _SHARED},
        )
        self.optim.evidence.update(getattr(params, "evidence", {}))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with or without names."""
        super().add_param_group(self._unpaired(param_group))

    def _unpaired(self, group: dict[str, Any]) -> dict[str, Any]:
        """Return a group with tensors, and their names in `param_names` if they have names."""
        params: list[Tensor] = []
        names = list(group.get(_NAMES) or ())
        for given in group["params"]:
            name, p = given if isinstance(given, tuple) else (None, given)
            params.append(p)
            if name is not None:
                names.append(name)
        if len(names) == len(params):
            self._names |= {id(p): name for p, name in zip(params, names, strict=True)}
        return {**group, "params": params, **({_NAMES: names} if names else {})}

    def _partition_param_group(self, param_group: dict[str, Any], params_per_rank: list[list[Tensor]]) -> None:
        """Give every process a group with the names of its own parameters."""
        first = [len(cached) for cached in self._partition_parameters_cache]
        super()._partition_param_group(param_group, params_per_rank)
        if has_names(param_group):
            for cached, start in zip(self._partition_parameters_cache, first, strict=True):
                for group in cached[start:]:
                    group[_NAMES] = [self._names[id(p)] for p in group["params"]]
                    if segments := keys.SEGMENTS.of(group):
                        group[keys.SEGMENTS.name] = {n: rows for n, rows in segments.items() if n in group[_NAMES]}

    @staticmethod
    def _sync_param_groups(src_param_groups: list[dict[Any, Any]], dst_param_groups: list[dict[Any, Any]]) -> None:
        """Copy the values of groups from one optimizer to the other, but no names: the two have other parameters."""
        for source, target in zip(src_param_groups, dst_param_groups, strict=True):
            target.update({key: value for key, value in source.items() if key not in _OWN})
