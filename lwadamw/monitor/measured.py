"""What a monitor needs of an optimizer, and several optimizers of one model as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from ..state.shards import Shards
from ..step.norms import Norms
from ..step.optimizer import AdamW

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..state.shards import ShardGroup


class Measured(Protocol):
    """An `lwadamw.AdamW`, or `Joined`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups."""
        ...

    @property
    def evidence(self) -> Mapping[str, Any]:
        """What was decided about each parameter, by name."""
        ...

    @property
    def shards(self) -> Shards:
        """What is known about processes that hold other parts of the parameters."""
        ...

    @property
    def skipped_steps(self) -> Tensor:
        """Number of skipped steps, int64[]."""
        ...

    def steps_taken(self) -> int:
        """Return the largest number of steps that any parameter has taken."""
        ...

    def norms(self) -> Norms:
        """Return the norms of the last step."""
        ...

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Call a function before every step. Return a handle with `remove()`."""
        ...

    def register_step_post_hook(self, hook: Any) -> Any:
        """Call a function after every step. Return a handle with `remove()`."""
        ...

    def register_load_state_dict_post_hook(self, hook: Any) -> Any:
        """Call a function after state has been loaded. Return a handle with `remove()`."""
        ...


class Joined:
    """Several `AdamW` that together update one model, one after the other, as one optimizer to a `Monitor`.

    Args:
        optimizers: the optimizers in the order of their steps, at least one.
        order: names of all parameters that any process of their groups holds. Norms come in this order.
        shard_group: the process groups among which parameters are split, by name, of all optimizers together.
        alike: process groups whose members hold the same parameters, whole or in parts. The first of each writes.
    """

    def __init__(
        self,
        optimizers: Sequence[AdamW],
        order: Sequence[str],
        shard_group: ShardGroup | None = None,
        alike: Sequence[ProcessGroup] = (),
    ) -> None:
        self.optimizers, self.alike = list(optimizers), list(alike)
        self._shards = Shards(shard_group)
        self._position = {name: i for i, name in enumerate(order)}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def evidence(self) -> dict[str, Any]:
        """What was decided about each parameter, by name."""
        return {name: found for optimizer in self.optimizers for name, found in optimizer.evidence.items()}

    @property
    def shards(self) -> Shards:
        """What is known about processes that hold other parts of the parameters."""
        return self._shards

    @property
    def skipped_steps(self) -> Tensor:
        """Number of steps that the first optimizer has skipped, int64[]."""
        return self.optimizers[0].skipped_steps

    def steps_taken(self) -> int:
        """Return the largest number of steps that any parameter has taken."""
        return max(optimizer.steps_taken() for optimizer in self.optimizers)

    def norms(self) -> Norms:
        """Return the norms of the last step of all optimizers, as `AdamW.norms` does.

        Raises:
            RuntimeError: as in `AdamW.norms`, or a parameter has a name that is not in the order.
        """
        found = [optimizer.norms() for optimizer in self.optimizers]
        names = [name for norms in found for name in norms.names]
        columns = (
            np.concatenate([getattr(norms, column) for norms in found])
            for column in ("weight", "update", "grad", "angle")
        )
        strange = [name for name in names if name not in self._position]
        if strange:
            raise RuntimeError(
                f"{strange[0]!r} is no name of the model, so a tensor of the optimizer has been replaced since its name was "
                "told. Tell the names again: watch = lwadamw.engines.megatron.attach(optimizer, model_chunks)."
            )
        order = sorted(range(len(names)), key=lambda i: self._position[names[i]])
        return Norms(tuple(names[i] for i in order), *(column[order] for column in columns))

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Call a function before the first optimizer takes its step. Return a handle with `remove()`."""
        return self.optimizers[0].register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """Call a function after the last optimizer has taken its step. Return a handle with `remove()`."""
        return self.optimizers[-1].register_step_post_hook(hook)

    def register_load_state_dict_post_hook(self, hook: Any) -> Any:
        """Call a function after the last optimizer has loaded its state. Return a handle with `remove()`."""
        return self.optimizers[-1].register_load_state_dict_post_hook(hook)
