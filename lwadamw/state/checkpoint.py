"""Loading a checkpoint: by name where there are names, refused where it does not fit, without touching a dtype.

torch matches optimizer state by position and casts it to the parameter's dtype. Both are silent, so both are taken
over here, through torch's own hooks around its own `load_state_dict`.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import decay, keys
from .groups import effective
from .members import Member
from .names import names_of
from .packing import like, read_moment
from .storage import ARRAYS, CODES, COMPANIONS, SCALES, wanted_companion, wanted_dtype

# What loading may set in a group that the checkpoint does not mention: all of it describes the model, not the run.
_MODEL_KEYS = keys.named((*keys.WIDTH, keys.ROLE, keys.RULE, keys.SEGMENTS))
# What this optimizer keeps of its own where the checkpoint, of torch's AdamW for instance, does not mention it.
_OPTION_KEYS = keys.named((*keys.STORAGE, *keys.LAW, keys.WIDTH_WARMUP))

StateDict = dict[str, Any]


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Around torch's `load_state_dict`: adapt what the user's pre-hooks leave, and undo casts before post-hooks run."""
    loaded: list[StateDict] = []

    def before(_: Optimizer, state_dict: StateDict) -> StateDict:
        loaded.append(adapt(optimizer, state_dict))
        return loaded[0]

    def after(_: Optimizer) -> None:
        restore_dtypes(optimizer, loaded[0])

    handles = [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adapt(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """The checkpoint in this optimizer's order and grouping, with its width keys.

    Raises:
        ValueError: it does not fit.
    """
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    if all("param_names" in g for g in [*saved, *groups]) and groups:
        saved = _by_name(saved, groups)
    elif [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        return state_dict  # torch's own error names this
    saved = [_with_model_keys(s, g, i) for i, (s, g) in enumerate(zip(saved, groups, strict=True))]
    adapted = {**state_dict, "param_groups": saved}
    _check_shapes(adapted, groups)
    return adapted


def _by_name(saved: list[StateDict], groups: list[StateDict]) -> list[StateDict]:
    where = {name: (g, i) for g in saved for name, i in zip(g["param_names"], g["params"], strict=True)}
    names = [name for g in groups for name in g["param_names"]]
    missing, foreign = sorted(set(names) - set(where)), sorted(set(where) - set(names))
    if missing or foreign:
        hint = ""
        if missing and (close := difflib.get_close_matches(missing[0], foreign, n=1)):
            hint = f" The checkpoint's closest to {missing[0]!r} is {close[0]!r}."
        raise ValueError(
            f"load_state_dict: parameter names do not match. Missing in the checkpoint: {_some(missing)}; unknown to this "
            f"optimizer: {_some(foreign)}.{hint} Rename state_dict['param_groups'][i]['param_names'], or drop 'param_names' "
            "from every group to match by position."
        )
    adapted = []
    for index, group in enumerate(groups):
        sources = [where[name] for name in group["param_names"]]
        settings = [{k: v for k, v in g.items() if k not in ("params", "param_names")} for g, _ in sources]
        for name, other in zip(group["param_names"], settings, strict=True):
            if differ := _difference(settings[0], other):
                raise ValueError(
                    f"load_state_dict: group {index} joins {group['param_names'][0]!r} and {name!r}, which the checkpoint "
                    f"has in groups with different {differ!r}. Build the optimizer with the checkpoint's groups."
                )
        base = settings[0] if settings else _settings_of_empty(saved, index, group)
        adapted.append({**base, "params": [i for _, i in sources], "param_names": list(group["param_names"])})
    return adapted


def _settings_of_empty(saved: list[StateDict], index: int, group: StateDict) -> StateDict:
    source = saved[index] if index < len(saved) and not saved[index]["params"] else group
    return {k: v for k, v in source.items() if k not in ("params", "param_names")}


def _difference(a: StateDict, b: StateDict) -> str | None:
    if a is b:
        return None
    return next((k for k in [*a, *b] if k not in a or k not in b or bool(a[k] != b[k])), None)


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _with_model_keys(saved: StateDict, group: StateDict, index: int) -> StateDict:
    for key in keys.WIDTH:
        if key.name in saved and abs(key.of(saved) - key.of(group)) > 1e-9 * abs(key.of(saved)):
            raise ValueError(
                f"load_state_dict: group {index} has {key.name}={key.of(saved)} in the checkpoint and {key.of(group)} here, so "
                "they follow different rules or base widths. Build param_groups with the checkpoint's, or keep this "
                f"optimizer's: for g in state_dict['param_groups']: g.pop({key.name!r}, None)."
            )
    law = decay.law_of(group)
    if saved.get(keys.DECAY.name, law) != law:
        raise ValueError(
            f"load_state_dict: group {index} has decay={keys.DECAY.of(saved)!r} in the checkpoint and {law!r} here. Build "
            "AdamW with the checkpoint's, or keep this optimizer's: for g in state_dict['param_groups']: g.pop('decay', None)."
        )
    # Where gradients are kept is the framework's matter, not the checkpoint's.
    kept = {key: value for key, value in saved.items() if key != keys.GRAD_ATTRIBUTE.name}
    options = {key: group[key] for key in _OPTION_KEYS if key in group and key not in kept}
    return {**kept, **options, **{key: group[key] for key in _MODEL_KEYS if key in group}}


def _check_shapes(state_dict: StateDict, groups: list[StateDict]) -> None:
    for index, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for i, p, name in zip(saved["params"], group["params"], names_of(group, index), strict=True):
            for key in ARRAYS:
                moment = state_dict["state"].get(i, {}).get(key)
                if isinstance(moment, Tensor) and moment.shape != p.shape:
                    raise ValueError(
                        f"load_state_dict: {key} of {name!r} has shape {tuple(moment.shape)} in the checkpoint, the "
                        f"parameter {tuple(p.shape)}. Load a checkpoint of this model; if only the order differs, build both "
                        "optimizers with named_parameters() or lwadamw.param_groups, and it is matched by name."
                    )


@torch.no_grad()
def restore_dtypes(optimizer: Optimizer, loaded: StateDict) -> None:
    """Give every loaded state tensor the dtype and value it was saved with, where torch cast it."""
    for saved, group in zip(loaded["param_groups"], optimizer.param_groups, strict=True):
        for i, p in zip(saved["params"], group["params"], strict=True):
            for key, value in loaded["state"].get(i, {}).items():
                current = optimizer.state[p].get(key)
                if (
                    isinstance(value, Tensor)
                    and isinstance(current, Tensor)
                    and key != "step"
                    and current.dtype != value.dtype
                ):
                    optimizer.state[p][key] = value.to(device=p.device, copy=True)


def warn_of_types(groups: list[StateDict], members: Iterable[Member], state: Any) -> None:
    """Warn if loaded state has other types than its groups ask for explicitly; members: those of the groups, in order."""
    found: list[str] = []
    segments = {id(m.param): m.segments for m in members}
    for index, group in enumerate(groups):
        for p, name in zip(group["params"], names_of(group, index), strict=True):
            for key, asked_key in (("exp_avg", keys.EXP_AVG_DTYPE), ("exp_avg_sq", keys.EXP_AVG_SQ_DTYPE)):
                if asked_key.of(group) is None or key not in state.get(p, {}):
                    continue
                asked, loaded = wanted_dtype(p, group, key, segments[id(p)]), state[p][key].dtype
                if loaded != asked:
                    found.append(f"{key} of {name!r} is {loaded}, asked for is {asked}")
            if state.get(p) and (companion := wanted_companion(p, group)) and companion not in state[p]:
                found.append(f"{name!r} has no {companion}, which the next step makes from the parameter")
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"load_state_dict: state is used as it was saved, and not as this optimizer's groups ask for: {found[0]}{more}. "
            "convert_state() converts it.",
            stacklevel=3,
        )


def for_torch(groups: list[StateDict], state_dict: StateDict) -> StateDict:
    """A state dict of ours as torch.optim.AdamW would have written it.

    Raises:
        ValueError: a group decays as torch's cannot.
    """
    own = {*_OPTION_KEYS, *_MODEL_KEYS}
    out_groups = []
    for index, (group, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        if (law := decay.law_of(group)) in ("corrected", "huber"):
            raise ValueError(
                f"to_torch_state_dict: group {index} has decay={law!r}, which no weight_decay of torch.optim.AdamW is. "
                "Set the group's decay to 'coupled' or 'independent' first, and go on with that."
            )
        plain = {key: value for key, value in saved.items() if key not in own}
        out_groups.append({**plain, **effective(group)._asdict()})
    out_state = {}
    for i, saved in state_dict["state"].items():
        entry = {k: v for k, v in saved.items() if k not in (*COMPANIONS, *SCALES.values(), decay.THRESHOLD)}
        for key in SCALES:
            if key in entry and entry[key].dtype in CODES:
                entry[key] = like(saved[key], read_moment(saved, key))
        out_state[i] = entry
    return {**state_dict, "state": out_state, "param_groups": out_groups}
