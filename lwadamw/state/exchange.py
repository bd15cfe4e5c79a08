"""Exchange: the state of an optimizer is loaded, converted, exported to torch, and read or written by a framework."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checkpoint, creation, packing
from .checks import check_conversion, check_layouts
from .companions import settle
from .itself import on_itself
from .members import Member, local, members_of, wrap_like
from .naming import Naming
from .saved_form import group_to_saved, to_saved
from .shards import Shards
from .storage import FLOATS, MOMENTS, kept_weight


class StateExchange(torch.optim.AdamW):
    """torch.optim.AdamW with state of any storage type: everything about the state, nothing about the step.

    This class is not used on its own. `lwadamw.AdamW` derives from it and adds the step.
    """

    _naming: Naming
    _shards: Shards

    @on_itself
    def state_dict(self) -> dict[str, Any]:
        """Return the state and the groups, as in torch.

        8-bit moments, int16 remainders, and `exp_avg` beside a companion have one more dimension than in `state`, so that a
        loader that does not know them fails and does not cast them. The tensors are views of the state. In the groups, dtypes
        are names.

        The state of a parameter that has left all groups is not part of it, because torch's format has no place for it.
        """
        state_dict = self._state_dict()
        state, groups = dict(state_dict["state"]), []
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            groups.append(group_to_saved(saved))
            for i, p in zip(saved["params"], group["params"], strict=True):
                if i in state:
                    state[i] = to_saved(state_dict["state"][i], p)
        return {**state_dict, "state": state, "param_groups": groups}

    def _state_dict(self) -> dict[str, Any]:
        """Return the state and the groups with the tensors as they are in `state`."""
        self._naming.follow(self.param_groups)
        kept = {id(p) for group in self.param_groups for p in group["params"]}
        state = self.state
        if all(id(key) in kept for key in state if isinstance(key, Tensor)):
            return super().state_dict()
        self.__dict__["state"] = {k: v for k, v in state.items() if not isinstance(k, Tensor) or id(k) in kept}
        try:
            return super().state_dict()
        finally:
            self.__dict__["state"] = state

    @on_itself
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim.AdamW.

        State is never cast: each tensor keeps the dtype that it was saved in. If a group asks for another dtype, a warning
        says so, and `convert_state()` converts.

        If all groups of the checkpoint and of this optimizer have parameter names, state is matched by name, in any order
        and grouping. Otherwise it is matched by position, as in torch. If several parameters share a name, all names have to be
        the same in the same order, and position decides.

        Width multipliers, storage options and a decay law that are not in the checkpoint stay as they are in this
        optimizer. `grad_attribute` always stays.

        As in torch, a tensor that needs no cast and no move is taken and not copied. So load a deepcopy if the optimizer that
        has returned it goes on in the same process.

        Args:
            state_dict: what `state_dict()` returned. It is not changed.

        Raises:
            ValueError: names, shapes, width multipliers or decay laws do not match. Then nothing has been loaded, and the
                message gives a statement that makes the checkpoint fit.
        """
        self._naming.follow(self.param_groups)
        with checkpoint.loading(self):
            super().load_state_dict(state_dict)
        checkpoint.warn_of_types(self.param_groups, self._members(), self.state)

    @on_itself
    def to_torch_state_dict(self) -> dict[str, Any]:
        """Return a state dict that torch.optim.AdamW loads.

        8-bit moments become float32, and master weights are left out. Base values are multiplied with their width
        multipliers, and the groups have torch's keys only, so that torch takes the same steps.

        torch casts moments to the dtype of the parameter when it loads them. If a bfloat16 parameter has a master weight,
        train on in torch with a parameter made from `master_weight(p)`.

        Returns:
            A new state dict. This optimizer is not changed.

        Raises:
            ValueError: a group has decay="corrected" or "huber", which torch.optim.AdamW does not have.

        Examples:
            >>> import lwadamw
            >>> p = torch.nn.Parameter(torch.ones(3))
            >>> ours = lwadamw.AdamW([{"params": [p], "width_lr_mult": 0.25}], lr=0.1)
            >>> torch.optim.AdamW([p]).load_state_dict(ours.to_torch_state_dict())
            >>> ours.to_torch_state_dict()["param_groups"][0]["lr"]
            0.025
        """
        state_dict = self._state_dict()
        return checkpoint.for_torch(self.param_groups, state_dict)

    @torch.no_grad()
    @on_itself
    def convert_state(self) -> None:
        """Convert all state to the storage types that the groups ask for now.

        Set the storage options in `param_groups` first. Each value is rounded once, to nearest. Nothing is lost between
        `master_weights=torch.float32` and `master_weights="remainder"`. If a group no longer asks for master weights, they
        are dropped, and the parameters stay the rounded weights that they are.

        Examples:
            >>> import lwadamw
            >>> optimizer = lwadamw.AdamW([torch.nn.Parameter(torch.ones(64, 128))])
            >>> for group in optimizer.param_groups:
            ...     group["exp_avg_dtype"] = torch.bfloat16
            >>> optimizer.convert_state()

        Raises:
            RuntimeError: a companion does not fit the dtype that its parameter has now, or the maximum that amsgrad keeps would
                get 8 bits.
            ValueError: a storage option of a group is not valid, or does not work with a parameter. Nothing has been written
                in any of these cases.
        """
        for member in self._members():
            if self.state.get(member.param):
                check_conversion(member, self.state[member.param])
        for member in self._members():
            if self.state.get(member.param):
                settle(member.param, self.state[member.param])
                split = bool(self._shards.split_of(member).groups)
                creation.convert_state(
                    self.state[member.param], member.param, member.group, member.whole_segments, split=split
                )

    @torch.no_grad()
    @on_itself
    def master_weight(self, p: Tensor) -> Tensor:
        """Return the weight that the step updates, which may have more digits than the parameter itself.

        Args:
            p: a parameter of this optimizer.

        Returns:
            A new tensor of the parameter's shape, a DTensor if the parameter is one. Its dtype is float32; that of a float64
            or complex parameter is its own.

        Raises:
            KeyError: `p` is not a parameter of this optimizer.
        """
        state = dict(self.state.get(self._member(p).param, {}))
        as_stepped = p.detach().clone()
        settle(as_stepped, state)
        if p.dtype not in FLOATS:
            return as_stepped
        return wrap_like(p, packing.read_weight(as_stepped, state, kept_weight(p, {}, state)))

    @torch.no_grad()
    @on_itself
    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        """Return one state tensor of a parameter in float32.

        The name is the one of Transformer Engine's method, for frameworks that reshard state through float32.

        Args:
            p: a parameter of this optimizer.
            name: "exp_avg", "exp_avg_sq", "max_exp_avg_sq" or "master_param".

        Returns:
            A new tensor of the parameter's shape, a DTensor if the parameter is one. A float64 or complex moment keeps its
            dtype.

        Raises:
            KeyError: the parameter's state does not have this tensor.
        """
        if name not in self.state[p]:
            raise KeyError(
                f"get_unscaled_state: {name!r} is not in the state of this parameter {tuple(p.shape)}, which has "
                f"{', '.join(self.state[p]) or 'nothing yet'}."
            )
        if name == "master_param":
            return self.master_weight(p)
        return wrap_like(p, packing.read_moment(self.state[p], name))

    @torch.no_grad()
    @on_itself
    def set_scaled_state(self, p: Tensor, name: str, values: Tensor) -> None:
        """Round values into one state tensor of a parameter. This is the inverse of `get_unscaled_state`.

        State that does not exist yet is created as the group asks. The name is the one of Transformer Engine's method.

        Args:
            p: a parameter of this optimizer.
            name: "exp_avg", "exp_avg_sq", "max_exp_avg_sq" or "master_param". Any other name is ignored, as in
                Transformer Engine.
            values: float32 of the parameter's shape, a DTensor if the parameter is one. They are not rounded to float32 first
                if the parameter is float64 or complex. For "master_param" also int16: the
                lower 16 bits of a weight whose upper 16 bits are the bfloat16 parameter, as Transformer Engine keeps them.

        Raises:
            ValueError: the values have another shape than the parameter, or are int16 and no remainder of its weight.
            KeyError: `p` is not a parameter of this optimizer.
        """
        if name not in (*MOMENTS, "master_param"):
            return
        if values.shape != p.shape:
            raise ValueError(
                f"set_scaled_state: {name} has shape {tuple(values.shape)}, the parameter {tuple(p.shape)}. Give values of "
                "the shape of the parameter. If the parameter is a DTensor, give a DTensor."
            )
        if values.dtype == torch.int16 and (name != "master_param" or p.dtype != torch.bfloat16):
            raise ValueError(
                f"set_scaled_state: {name} of a parameter {tuple(p.shape)} of {p.dtype} is given in torch.int16. Only the "
                "master weight of a bfloat16 parameter has a remainder of 16 bits. Give float32 values."
            )
        member = self._member(p)
        check_layouts([member], self.state)
        state = self.state[p]
        amsgrad = member.group["amsgrad"] or name == "max_exp_avg_sq"
        state.setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
        split = bool(self._shards.split_of(member).groups)
        creation.create_state(state, p, {**member.group, "amsgrad": amsgrad}, member.whole_segments, split=split)
        creation.lay_out(state, p)  # the parameter may have another memory layout since the last step
        given = local(values)
        if given.dtype == torch.int16:
            given = packing.join_remainder(local(p.detach()), given)
        held = torch.empty_like(local(p), dtype=torch.float32 if p.dtype in FLOATS else p.dtype).copy_(given)
        if name == "master_param":
            packing.write_weight(p, state, kept_weight(p, member.group, state), held)
        else:
            packing.write_moment(state, name, held)

    @on_itself
    def initialize_state(self, p: Tensor, store_param_remainders: bool | None = None) -> None:
        """Create the state of a parameter as its group asks, with `step` 0.

        The name and the arguments are those of Transformer Engine's method. Tensors that exist already are kept.

        Args:
            p: a parameter of this optimizer.
            store_param_remainders: ignored. The group's `master_weights` decides.

        Raises:
            KeyError: `p` is not a parameter of this optimizer.
        """
        member = self._member(p)
        check_layouts([member], self.state)
        self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32, device="cpu"))
        split = bool(self._shards.split_of(member).groups)
        creation.create_state(self.state[p], p, member.group, member.whole_segments, split=split)

    def _members(self) -> list[Member]:
        self._naming.follow(self.param_groups)
        return list(members_of(self.param_groups))

    def _member(self, p: Tensor) -> Member:
        found = next((m for m in self._members() if m.param is p), None)
        if found is None:
            raise KeyError(
                f"a tensor of shape {tuple(p.shape)} is not a parameter of this optimizer. Give one of the tensors in "
                "optimizer.param_groups[i]['params']."
            )
        return found
