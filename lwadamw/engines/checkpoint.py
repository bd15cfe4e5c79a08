"""torch.distributed.checkpoint: a checkpoint of torch.optim.AdamW is loaded into an optimizer with a width rule.

The groups of a rule have keys that a checkpoint of torch's AdamW lacks, such as `role`. torch's own planner then fails with
"Missing key in checkpoint state_dict: ....role". With allow_partial_load=True it would also leave out missing moments.

Checkpoints that torch 2.6 wrote, of its AdamW or of this package, fail in the same way in later torch: "Missing key in
checkpoint state_dict: ....decoupled_weight_decay". Run with torch 2.13, on checkpoints of torch 2.13 and 2.6.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from ..state import keys

# torch itself adds the names, where parameters have any. From torch 2.7 on, it also adds decoupled_weight_decay, which is True
# in every AdamW.
_OPTIONAL = frozenset((*keys.named(keys.ALL), "param_names", "decoupled_weight_decay"))


class LoadPlanner(DefaultLoadPlanner):
    """A `DefaultLoadPlanner` that asks a checkpoint for some group keys only if it has them.

    These keys are names, the group keys of this package, and torch's `decoupled_weight_decay`. The optimizer keeps its own
    values of the keys that are left out. Any other key that is missing is an error, as always.
    Arguments are those of torch's class.

    The groups of a rule are other groups than those of the checkpoint. So write and read with names: give
    `get_optimizer_state_dict` and `set_optimizer_state_dict` options=StateDictOptions(flatten_optimizer_state_dict=True).

    Raises:
        RuntimeError: by `dcp.load`, if any other key is missing.

    Examples:
        ```python
        torch.distributed.checkpoint.load(state, checkpoint_id=folder, planner=LoadPlanner())
        ```
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the state dict to load into, as torch's planner does, without the optional keys that the checkpoint lacks."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        known = {} if metadata is None else metadata.state_dict_metadata
        for key in [k for k in self.state_dict if _is_optional(k) and k not in known]:
            del self.state_dict[key]


def _is_optional(key: str) -> bool:
    return key.rpartition(".")[2] in _OPTIONAL or f".{keys.SEGMENTS.name}." in key
