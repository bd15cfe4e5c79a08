"""What to do about a checkpoint that has to be matched by name and has no names, as lines to paste."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Size, Tensor

StateDict = dict[str, Any]

# How training scripts split parameters into two groups: the condition on a parameter p of the model.
_SPLITS: Final = ("p.ndim >= 2", "p.ndim < 2")


def without_names(saved: Sequence[StateDict], groups: Sequence[StateDict], state: Mapping[Any, StateDict]) -> str:
    """Return what to do about a checkpoint whose groups are others than those of the optimizer, if names are missing.

    Args:
        saved: the groups of the checkpoint.
        groups: the optimizer's `param_groups`.
        state: the state in the checkpoint, by the number of the parameter.
    """
    sizes, own = ([len(g["params"]) for g in of] for of in (saved, groups))
    said = f"load_state_dict: the checkpoint has groups of {sizes} parameters, and this optimizer has groups of {own}. "
    if not all("param_names" in g for g in groups):
        return said + (
            "They can be matched by name only if both have names. Build this optimizer with names: "
            "AdamW(model.named_parameters(), ...) or AdamW(lwadamw.param_groups(model, ...), ...)."
        )
    for index, group in enumerate(saved):
        if "param_names" in group and len(group["param_names"]) != len(group["params"]):
            return said + (
                f"Group {index} of the checkpoint has {len(group['params'])} parameters and {len(group['param_names'])} "
                "names. Give it the names of its own parameters alone."
            )
    said += "The checkpoint has no names. Give each of its groups the names of its parameters, in the order in which the old "
    said += "optimizer got them. "
    place = "    state_dict['param_groups'][{}]['param_names'] = "
    every = "[name for name, _ in model.named_parameters()]"
    if len(saved) == 1:
        return said + "If it got model.parameters():\n" + place.format(0) + every
    if conditions := _conditions(saved, groups, state):
        return (
            said
            + "Sizes and shapes are those of a split by the number of dimensions:\n"
            + "\n".join(
                place.format(i) + f"[name for name, p in model.named_parameters() if {condition}]"
                for i, condition in enumerate(conditions)
            )
        )
    lines = [place.format(i) + f"[...]  # {size} names" for i, size in enumerate(sizes)]
    return said + "Here the split is not known, so fill in the names:\n" + "\n".join(lines)


def _conditions(
    saved: Sequence[StateDict], groups: Sequence[StateDict], state: Mapping[Any, StateDict]
) -> tuple[str, ...]:
    """Return the condition of each of two groups of a checkpoint, if its shapes say that they are split by dimensions."""
    params: list[Tensor] = [p for group in groups for p in group["params"]]
    ours = tuple(sorted(p.shape for p in params if (p.ndim >= 2) == wide) for wide in (True, False))
    theirs = [_shapes(group, state) for group in saved]
    if theirs == [*ours]:
        return _SPLITS
    return _SPLITS[::-1] if theirs == [*ours[::-1]] else ()


def _shapes(group: StateDict, state: Mapping[Any, StateDict]) -> list[Size]:
    """Return the sorted shapes of the parameters of a group of a checkpoint. Parameters without state are left out."""
    return sorted(state[i]["exp_avg"].shape for i in group["params"] if "exp_avg" in state.get(i, {}))
