"""Exchange: state of an optimizer as it is saved, loaded, converted, and handed to or taken over from a framework."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checkpoint, packing
from .members import Member, local, members_of
from .storage import MOMENTS, kept_weight


class StateExchange(torch.optim.AdamW):
    """torch's AdamW whose state may be of any storage type; `lwadamw.AdamW` takes the step."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.AdamW.

        Everything keeps the dtype it was saved in; where a group asks for another, a warning says so, and
        `convert_state()` converts. Where checkpoint and optimizer both have parameter names, state is matched by name,
        whatever the order and grouping; without names, by position, as in torch. Width multipliers, storage options and
        a decay law that the checkpoint lacks stay this optimizer's.

        Raises:
            ValueError: names, shapes, width multipliers or decay laws do not match. Nothing has been loaded then.
        """
        with checkpoint.loading(self):
            super().load_state_dict(state_dict)
        checkpoint.warn_of_types(self.param_groups, self._members(), self.state)

    def to_torch_state_dict(self) -> dict[str, Any]:
        """A state dict that torch.optim.AdamW loads: 8-bit moments as float32, no master weights, torch's group keys.

        Base values are multiplied with their width multipliers, so that torch takes the same steps. torch casts moments to
        the parameter's dtype as it loads them. Load parameters of bfloat16 with master weights from `master_weight(p)`.

        Raises:
            ValueError: a group has decay="corrected" or "huber", which torch's AdamW does not have.
        """
        state_dict = self.state_dict()
        return checkpoint.for_torch(self.param_groups, state_dict)

    @torch.no_grad()
    def convert_state(self) -> None:
        """Bring all state to the types that its groups ask for now, each value rounded once, to nearest.

        Set storage options of `param_groups` first. Between master weights of either kind nothing is lost; where they are
        given up, parameters stay the rounded weights they are.
        """
        for member in self._members():
            if self.state.get(member.param):
                packing.convert_state(self.state[member.param], member.param, member.group, member.segments)

    @torch.no_grad()
    def master_weight(self, p: Tensor) -> Tensor:
        """The weight that steps of this parameter update, a new float32 tensor: more digits than `p` may have."""
        member = self._member(p)
        state = self.state.get(p, {})
        return packing.like(p, packing.read_weight(p, state, kept_weight(p, member.group, state) if state else "plain"))

    @torch.no_grad()
    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        """`exp_avg`, `exp_avg_sq`, `max_exp_avg_sq` or `master_param` of a parameter, a new float32 tensor of its shape.

        Named as in Transformer Engine, for frameworks that reshard through float32.

        Raises:
            KeyError: the parameter's state has no such tensor.
        """
        if name not in self.state[p]:
            raise KeyError(f"{name!r} is not in this parameter's state, which has {', '.join(self.state[p])}.")
        if name == "master_param":
            return self.master_weight(p)
        return packing.like(p, packing.read_moment(self.state[p], name))

    @torch.no_grad()
    def set_scaled_state(self, p: Tensor, name: str, values: Tensor) -> None:
        """Round float32 values of the parameter's shape into its state, creating that as its group asks; see above.

        Names other than those of `get_unscaled_state` are ignored, as in Transformer Engine.

        Raises:
            ValueError: the values have another shape.
        """
        if name not in (*MOMENTS, "master_param"):
            return
        if values.shape != p.shape:
            raise ValueError(
                f"set_scaled_state: {name} has shape {tuple(values.shape)}, the parameter {tuple(p.shape)}. Give values of "
                "the parameter's own shape; of a DTensor, as a DTensor."
            )
        member = self._member(p)
        state = self.state[p]
        amsgrad = member.group["amsgrad"] or name == "max_exp_avg_sq"
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        packing.create_state(state, p, {**member.group, "amsgrad": amsgrad}, member.segments)
        held = torch.empty_like(local(p), dtype=torch.float32).copy_(local(values))
        if name == "master_param":
            packing.write_weight(p, state, kept_weight(p, member.group, state), held)
        else:
            packing.write_moment(state, name, held)

    def initialize_state(self, p: Tensor, store_param_remainders: bool | None = None) -> None:
        """Create a parameter's state as its group asks, as Transformer Engine's method of this name; the flag is ignored."""
        member = self._member(p)
        self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32))
        packing.create_state(self.state[p], p, member.group, member.segments)

    def _members(self) -> list[Member]:
        return list(members_of(self.param_groups))

    def _member(self, p: Tensor) -> Member:
        found = next((m for m in self._members() if m.param is p), None)
        if found is None:
            raise KeyError(f"a tensor of shape {tuple(p.shape)} is not a parameter of this optimizer.")
        return found
