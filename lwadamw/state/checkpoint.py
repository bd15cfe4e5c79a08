"""Checkpoints: a checkpoint is matched by parameter name, refused if it does not fit, and loaded without a cast.

torch's `load_state_dict` matches state by position, and casts it to the dtype of the parameter. It does both silently. So
this module does both itself, in hooks around torch's `load_state_dict`.
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
from .blocks import cut
from .callers import caller_level
from .companions import misfit, misfit_of_codes
from .creation import own_steps
from .groups import effective
from .members import Member, is_elsewhere, is_sharded, local, split_dimensions, wrap_like
from .missing_names import without_names
from .names import names_of
from .packing import read_moment
from .saved_form import from_saved, group_from_saved, misplaced
from .shared_names import places_decide
from .storage import ARRAYS, CODES, COMPANIONS, SCALES, wanted_companion, wanted_dtype

# These keys describe the model and not the run. So after loading, each group has the values that it had before.
_MODEL_KEYS = keys.named((*keys.WIDTH, keys.ROLE, keys.RULE, keys.SEGMENTS))
# The checkpoint decides about all other keys. If it lacks one, for instance because torch's AdamW has written it, the
# group keeps its own value.
_OPTION_KEYS = tuple(name for name in keys.named(keys.ALL) if name not in _MODEL_KEYS)

# Learning rates that torch's schedulers keep in a group, and read there when they are built to go on.
_OF_SCHEDULERS = ("initial_lr", "max_lr", "min_lr")

StateDict = dict[str, Any]


@contextmanager
def loading(optimizer: Optimizer) -> Iterator[None]:
    """Register hooks for one call of torch's `load_state_dict`, and remove them afterwards.

    The first hook adapts the checkpoint after all pre-hooks of the user. The second hook undoes torch's casts before any
    post-hook of the user.

    Args:
        optimizer: the optimizer whose `load_state_dict` is called inside the context.
    """
    loaded: list[StateDict] = []

    def before(_: Optimizer, state_dict: StateDict) -> StateDict:
        loaded.append(adapt(optimizer, state_dict))
        return loaded[0]

    def after(_: Optimizer) -> None:
        restore_dtypes(optimizer, loaded[0])
        own_steps(state for p, state in optimizer.state.items() if isinstance(p, Tensor))

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
    """Return a checkpoint in the order and grouping of an optimizer, with the optimizer's width keys.

    Args:
        optimizer: the optimizer to load into. It is not changed.
        state_dict: a checkpoint of lwadamw.AdamW or torch.optim.AdamW. It is not changed.

    Returns:
        A new state dict that shares the tensors of `state_dict`.

    Raises:
        ValueError: names, shapes, width multipliers or decay laws do not fit the optimizer.
    """
    saved, groups = [group_from_saved(g) for g in state_dict["param_groups"]], optimizer.param_groups
    if all("param_names" in g for g in [*saved, *groups]) and groups and not places_decide(saved, groups):
        saved = _by_name(saved, groups)
    elif [len(g["params"]) for g in saved] != [len(g["params"]) for g in groups]:
        raise ValueError(without_names(saved, groups, state_dict["state"]))
    _warn_of_base_values(saved, groups)
    saved = [_with_model_keys(s, g, i) for i, (s, g) in enumerate(zip(saved, groups, strict=True))]
    adapted = {**state_dict, "param_groups": saved, "state": dict(state_dict["state"])}
    for index, (s, group) in enumerate(zip(saved, groups, strict=True)):
        for i, p, name in zip(s["params"], group["params"], names_of(group, index), strict=True):
            if i in adapted["state"]:
                _check_order(adapted["state"][i], p, name)
                adapted["state"][i] = from_saved(adapted["state"][i], p)
    _check_state(adapted, groups)
    return adapted


def _warn_of_base_values(saved: list[StateDict], groups: list[StateDict]) -> None:
    """Warn if a rule will multiply learning rates that were used without a rule."""
    of_rule = any(key.name in g for g in saved for key in (keys.RULE, *keys.WIDTH))
    scaled = next((i for i, g in enumerate(groups) if keys.WIDTH_LR_MULT.of(g) != 1), None)
    if of_rule or scaled is None or not saved[scaled]["params"]:
        return
    lr, factor = saved[scaled]["lr"], keys.WIDTH_LR_MULT.of(groups[scaled])
    warnings.warn(
        f"load_state_dict: the checkpoint was written without a width rule. Its lr and weight_decay become base values, so "
        f"group {scaled} now takes steps with lr={float(lr) * factor:.4g} instead of {float(lr):.4g}. If they are not the "
        "values that were tuned at the base width, set those after loading: "
        "for g in optimizer.param_groups: g['lr'], g['weight_decay'] = lr, weight_decay",
        stacklevel=caller_level(),
    )


def _by_name(saved: list[StateDict], groups: list[StateDict]) -> list[StateDict]:
    """Return the saved groups regrouped and reordered as `groups`, with parameters matched by name."""
    for index, group in enumerate(saved):
        if len(group["param_names"]) != len(group["params"]):
            raise ValueError(
                f"load_state_dict: group {index} of the checkpoint has {len(group['params'])} parameters and "
                f"{len(group['param_names'])} names in param_names. Correct the names, or match by position:\n"
                "    for g in state_dict['param_groups']: g.pop('param_names', None)"
            )
    where = {n: (place, i) for place, g in enumerate(saved) for n, i in zip(g["param_names"], g["params"], strict=True)}
    names = [name for g in groups for name in g["param_names"]]
    missing, foreign = sorted(set(names) - set(where)), sorted(set(where) - set(names))
    if missing or foreign:
        hint = ""
        if missing and (close := difflib.get_close_matches(missing[0], foreign, n=1)):
            hint = (
                f" The name in the checkpoint that is closest to {missing[0]!r} is {close[0]!r}. To rename it:\n"
                "    for g in state_dict['param_groups']: "
                f"g['param_names'] = [{{{close[0]!r}: {missing[0]!r}}}.get(n, n) for n in g['param_names']]\n"
            )
        raise ValueError(
            f"load_state_dict: parameter names do not match. Missing in the checkpoint: {_some(missing)}. Unknown to this "
            f"optimizer: {_some(foreign)}.{hint or ' '}To match by position:\n"
            "    for g in state_dict['param_groups']: g.pop('param_names', None)"
        )
    adapted = []
    for index, group in enumerate(groups):
        sources = [where[name] for name in group["param_names"]]
        settings = [_settings_of(saved[place]) for place, _ in sources]
        for name, other, (place, _) in zip(group["param_names"], settings, sources, strict=True):
            if differ := _difference(settings[0], other):
                first, value = sources[0][0], settings[0].get(differ, other.get(differ))
                raise ValueError(
                    f"load_state_dict: group {index} joins {group['param_names'][0]!r} and {name!r}, which the checkpoint "
                    f"has in groups with different {differ!r}. Build the optimizer with the checkpoint's groups, or give the "
                    f"two groups of the checkpoint the same {differ!r}:\n"
                    f"    for i in ({first}, {place}): state_dict['param_groups'][i][{differ!r}] = {value!r}"
                )
        base = settings[0] if settings else _settings_of_empty(saved, index, group)
        adapted.append({**base, "params": [i for _, i in sources], "param_names": list(group["param_names"])})
    return adapted


def _settings_of(group: StateDict) -> StateDict:
    """Return a group without its parameters and their names."""
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _settings_of_empty(saved: list[StateDict], index: int, group: StateDict) -> StateDict:
    """Return the settings of a group without parameters: of the saved group at its place if that is empty too."""
    return _settings_of(saved[index] if index < len(saved) and not saved[index]["params"] else group)


def _difference(a: StateDict, b: StateDict) -> str | None:
    """Return the first key in which two groups differ, or None."""
    if a is b:
        return None
    return next((k for k in [*a, *b] if k not in a or k not in b or bool(a[k] != b[k])), None)


def _some(names: list[str]) -> str:
    """Return the first three names, and the number of the others, as text."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def _with_model_keys(saved: StateDict, group: StateDict, index: int) -> StateDict:
    """Return a saved group with the keys that the optimizer's own group decides about."""
    for key in keys.WIDTH:
        if key.name in saved and abs(key.of(saved) - key.of(group)) > 1e-9 * abs(key.of(saved)):
            raise ValueError(
                f"load_state_dict: group {index} has {key.name}={key.of(saved)} in the checkpoint and {key.of(group)} here, so "
                "the two follow different rules or base widths. Build param_groups with the rule and the base width of the "
                "checkpoint, or keep the width multipliers of this optimizer:\n"
                f"    for g in state_dict['param_groups']: {'; '.join(f'g.pop({k.name!r}, None)' for k in keys.WIDTH)}"
            )
    law = decay.law_of(group)
    if saved.get(keys.DECAY.name, law) != law:
        raise ValueError(
            f"load_state_dict: group {index} has decay={keys.DECAY.of(saved)!r} in the checkpoint and {law!r} here. Build "
            f"AdamW with decay={keys.DECAY.of(saved)!r}, or keep the decay of this optimizer:\n"
            f"    for g in state_dict['param_groups']: g.pop({keys.DECAY.name!r}, None)"
        )
    # The framework that runs now decides where gradients are, and not the framework that wrote the checkpoint.
    kept = {key: value for key, value in saved.items() if key != keys.GRAD_ATTRIBUTE.name}
    options = {key: group[key] for key in _OPTION_KEYS if key in group and key not in kept}
    return {**kept, **options, **{key: group[key] for key in _MODEL_KEYS if key in group}}


def _check_order(saved: StateDict, p: Tensor, name: str) -> None:
    """Raise a ValueError if codes of 8 bits are no longer in the memory layout that their scales belong to."""
    if lost := misplaced(saved, p):
        raise ValueError(
            f"load_state_dict: the codes of {' and '.join(lost)} of {name!r} {tuple(p.shape)} have been copied into another "
            "memory layout since they were saved, as formats without strides do, and their scales have not. Save with "
            "torch.save. If the parameter has the memory layout that it had then, copy them back, for the state s of this "
            "parameter in the checkpoint:\n"
            f"    for key in {lost}: s[key] = torch.empty_like(p, dtype=s[key].dtype).unsqueeze(-1).copy_(s[key])"
        )


def _check_state(state_dict: StateDict, groups: list[StateDict]) -> None:
    """Raise a ValueError if a state tensor of an adapted checkpoint cannot be used with its parameter."""
    for index, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for i, p, name in zip(saved["params"], group["params"], names_of(group, index), strict=True):
            entry = {k: v for k, v in state_dict["state"].get(i, {}).items() if isinstance(v, Tensor)}
            _check_wrapping(entry, p, name)
            for key in ARRAYS:
                if key in entry and entry[key].shape != p.shape:
                    raise ValueError(
                        f"load_state_dict: {key} of {name!r} has shape {tuple(entry[key].shape)} in the checkpoint, the "
                        f"parameter {tuple(p.shape)}. Load a checkpoint of this model. If only the order of the parameters "
                        "differs, give both optimizers named parameters, so that they are matched by name: "
                        "AdamW(model.named_parameters(), ...) or AdamW(lwadamw.param_groups(model, ...), ...)."
                    )
            if any(entry[key].dtype in CODES for key in SCALES if key in entry) and (reason := cut(p)) is not None:
                raise ValueError(
                    f"load_state_dict: {name!r} {tuple(p.shape)} has moments in 8 bits in the checkpoint, and {reason}. Load "
                    "the checkpoint in a layout of whole blocks, for instance on one process, convert the moments there to "
                    "torch.bfloat16 with optimizer.convert_state(), and save it again."
                )
            if (reason := misfit_of_codes(p, entry)) is not None:
                raise ValueError(
                    f"load_state_dict: the state of {name!r} {tuple(p.shape)} does not fit: {reason}. Load moments and scales "
                    "from the same checkpoint, into an optimizer that was built with the exp_avg_dtype and exp_avg_sq_dtype of "
                    "the checkpoint. To change the dtypes after that, set them in optimizer.param_groups and call "
                    "optimizer.convert_state()."
                )
            if (reason := misfit(p, entry)) is not None:
                raise ValueError(
                    f"load_state_dict: the state of {name!r} {tuple(p.shape)} does not fit: {reason}. Load the checkpoint into "
                    "a model of its own dtype, or drop the companions and with them the digits that they hold:\n"
                    "    for s in state_dict['state'].values(): s.pop('master_param', None); s.pop('kahan_comp', None)"
                )


def _cuts(tensor: Any) -> list[Any]:
    """Return how a DTensor is split, the same on every process."""
    return [(d, tensor.device_mesh.size(d), tensor.placements[d]) for d in split_dimensions(tensor)]


def _check_wrapping(entry: StateDict, p: Tensor, name: str) -> None:
    """Raise a ValueError if an array of a checkpoint is not sharded as its parameter. Every process finds the same array."""
    if not is_sharded(p) or is_elsewhere(p):
        return
    placements = p.placements  # type: ignore[attr-defined]
    for key in ARRAYS:
        if key not in entry:
            continue
        value, held = entry[key], local(entry[key])
        # The shape of what this process holds may fit by chance, so that one process would accept what another one refuses.
        if held is value or held.ndim != p.ndim or _cuts(value) != _cuts(p):
            what = "a plain tensor" if held is value else "a DTensor with other shards"
            raise ValueError(
                f"load_state_dict: {key} of {name!r} {tuple(p.shape)} is {what} of shape {tuple(value.shape)} in the "
                f"checkpoint, and the parameter is sharded as {placements}. Build AdamW with the storage options of the "
                "checkpoint, and load whole tensors with torch.distributed.checkpoint.state_dict.set_optimizer_state_dict("
                "model, optimizer, state_dict, options=StateDictOptions(full_state_dict=True))."
            )


@torch.no_grad()
def restore_dtypes(optimizer: Optimizer, loaded: StateDict) -> None:
    """Give every loaded state tensor that torch has cast the dtype and the values that it was saved with.

    Args:
        optimizer: the optimizer that has loaded a checkpoint.
        loaded: the adapted checkpoint, with parameters in the order of the optimizer.
    """
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
    """Warn if loaded state has other dtypes than its groups ask for explicitly.

    Args:
        groups: the optimizer's `param_groups`.
        members: its members, all of them.
        state: its state, by parameter.
    """
    found: list[str] = []
    segments = {id(m.param): m.whole_segments for m in members}
    for index, group in enumerate(groups):
        for p, name in zip(group["params"], names_of(group, index), strict=True):
            for key, asked_key in (("exp_avg", keys.EXP_AVG_DTYPE), ("exp_avg_sq", keys.EXP_AVG_SQ_DTYPE)):
                if asked_key.of(group) is None or key not in state.get(p, {}):
                    continue
                asked, loaded = wanted_dtype(p, group, key, segments[id(p)]), state[p][key].dtype
                if loaded != asked:
                    found.append(f"{key} of {name!r} is {loaded}, its group asks for {asked}")
            if state.get(p) and (companion := wanted_companion(p, group)) and companion not in state[p]:
                found.append(f"{name!r} has no {companion}, which the next step creates from the parameter")
    if found:
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        warnings.warn(
            f"load_state_dict: state is used as it was saved, not as the groups of this optimizer ask for: {found[0]}{more}. "
            "To convert it: optimizer.convert_state()",
            stacklevel=caller_level(),
        )


def for_torch(groups: list[StateDict], state_dict: StateDict) -> StateDict:
    """Return a state dict in the form in which torch.optim.AdamW would have written it.

    Args:
        groups: the optimizer's `param_groups`.
        state_dict: the state dict of the same optimizer. It is not changed.

    Returns:
        A new state dict: lr, weight_decay and eps are effective values, the keys of this package are gone, 8-bit moments
        are float32, and there are no companions.

    Raises:
        ValueError: a group has a decay law that torch.optim.AdamW does not have.
    """
    own = keys.named(keys.ALL)
    out_groups = []
    for index, (group, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        if (law := decay.law_of(group)) in ("corrected", "huber"):
            raise ValueError(
                f"to_torch_state_dict: group {index} has decay={law!r}, which torch.optim.AdamW does not have. Training can go "
                "on with another law only. To choose it before exporting:\n"
                f"    optimizer.param_groups[{index}][{keys.DECAY.name!r}] = 'coupled'"
            )
        plain = {key: value for key, value in saved.items() if key not in own}
        plain |= {key: plain[key] * keys.WIDTH_LR_MULT.of(group) for key in _OF_SCHEDULERS if key in plain}
        out_groups.append({**plain, **effective(group)._asdict()})
    out_state = {}
    for i, saved in state_dict["state"].items():
        entry = {k: v for k, v in saved.items() if k not in (*COMPANIONS, *SCALES.values(), decay.THRESHOLD)}
        for key in SCALES:
            if key in entry and entry[key].dtype in CODES:
                entry[key] = wrap_like(saved[key], read_moment(saved, key))
        out_state[i] = entry
    return {**state_dict, "state": out_state, "param_groups": out_groups}
