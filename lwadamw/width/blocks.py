"""Residual blocks: which parameters are inside of them, and the depth ratio of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from torch import nn

from .patterns import as_mapping, matches_any
from .roles import Decided, decide
from .sites import children, unwrapped
from .widths import config_values

# Gives the depth ratio of a parameter, or None outside of the blocks, and a remark for its evidence.
DepthRatio = Callable[[Decided], tuple[float | None, str]]

# Fields of a config that hold the number of blocks.
_DEPTHS: Final = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth")


def depth_ratios(
    model: nn.Module, base_depth: int | Mapping[str, int], depth: int | None, found: Sequence[Decided]
) -> DepthRatio:
    """Return the function that gives the depth ratio of a parameter.

    Args:
        model: the model whose parameters are to be grouped.
        base_depth: number of blocks of the proxy. Or patterns of the parameters inside blocks, and the number of such blocks at
            the proxy.
        depth: number of blocks of the whole model; None: counted.
        found: every distinct parameter of the model.

    Raises:
        ValueError: `base_depth` or `depth` is no positive number, or the blocks are not determined.
        TypeError: `base_depth` has another type.
    """
    if depth is not None and not _is_count(depth):
        raise ValueError(
            f"param_groups: depth={depth!r} is not a number of blocks. Give the blocks of the whole model."
        )
    if isinstance(base_depth, Mapping):
        return _from_map(base_depth, depth, found)
    if isinstance(base_depth, bool) or not isinstance(base_depth, int):
        raise TypeError(
            f"param_groups: base_depth is {type(base_depth).__name__}. Give the number of blocks of the proxy as an int, or a "
            "mapping from patterns to it."
        )
    if base_depth < 1:
        raise ValueError(f"param_groups: base_depth={base_depth} is not a number of blocks. Give the proxy's.")
    stacks = _stacks(found)
    if len(stacks) != 1:
        raise ValueError(_unclear(base_depth, stacks))
    ((path, count),) = stacks.items()
    if depth is None:
        depth = count
        told = {value for value in config_values(model, _DEPTHS) if value != count}
        if told:
            raise ValueError(
                f"param_groups: cannot tell the depth. {path!r} has {count} blocks here, but the config says "
                f"{sorted(told)[0]}. Pass depth={sorted(told)[0]} if this process holds a part of the blocks, or "
                f"depth={count}."
            )
    ratio, remark = depth / base_depth, f"; one of {depth} blocks, {base_depth} at the proxy"
    return lambda d: (ratio, remark) if _stack(d)[0] == path else (None, "")


def blocks_of(model: nn.Module) -> int | dict[str, int]:
    """Return the number of residual blocks of a model, in the form of the argument `base_depth` of `param_groups`.

    Args:
        model: the model, for instance the proxy.

    Returns:
        A number. If the model has several lists of blocks, a mapping from their patterns to their numbers; it is empty if there
        is no list of blocks.
    """
    stacks = _stacks(decide(model, {}))
    return next(iter(stacks.values())) if len(stacks) == 1 else _patterns(stacks)


def _patterns(stacks: Mapping[str, int]) -> dict[str, int]:
    return {f"{path}.*" if path else "*": count for path, count in stacks.items()}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _from_map(base: Mapping[str, int], depth: int | None, found: Sequence[Decided]) -> DepthRatio:
    if depth is not None and len(base) > 1:
        raise ValueError(
            f"param_groups: depth={depth} cannot be the depth of {len(base)} patterns of base_depth. Leave depth out: the "
            "blocks of each pattern are counted."
        )
    known: dict[str, tuple[float, str]] = {}
    for pattern, there in base.items():
        if not _is_count(there):
            raise ValueError(
                f"param_groups: base_depth[{pattern!r}]={there!r} is not a number of blocks. Give the proxy's."
            )
        inside = [d for d in found if matches_any(pattern, d.names) and d.name not in known]
        blocks = {(path, number) for path, number in map(_stack, inside) if number}
        if not blocks:
            raise ValueError(
                f"param_groups: base_depth pattern {pattern!r} matches no parameter inside a numbered layer. Correct the "
                "pattern or leave it out."
            )
        here = depth or len(blocks)
        remark = f"; one of {here} blocks, {there} at the proxy"
        known |= {d.name: (here / there, remark) for d in inside}
    return lambda d: known.get(d.name, (None, ""))


def _stack(found: Decided) -> tuple[str, str]:
    """Return the path of the outermost list of numbered layers around a parameter, and the number of its layer."""
    path = found.site.path
    first = next((i for i, part in enumerate(path) if part.isdigit()), None)
    return ("", "") if first is None else (".".join(path[:first]), path[first])


def _stacks(found: Sequence[Decided]) -> dict[str, int]:
    """Return the lists of blocks of a model and the number of blocks in each, by path.

    A block is a numbered layer that holds modules itself. A list with other layers too, such as an embedding and a head, is no
    list of blocks.
    """
    stacks: dict[str, int] = {}
    for d in found:
        path, number = _stack(d)
        if number and path not in stacks:
            depth = d.site.path.index(number, path.count(".") + 1 if path else 0)
            inside = [unwrapped(module) for module in children(unwrapped(d.site.trail[depth])).values()]
            if all(children(module) for module in inside):
                stacks[path] = len(inside)
    return stacks


def _unclear(base_depth: int, stacks: Mapping[str, int]) -> str:
    if not stacks:
        return (
            "param_groups: base_depth is given, but the model has no list of numbered layers that could be its blocks. "
            f'Say which parameters are inside blocks: base_depth={{"<pattern>": {base_depth}}}.'
        )
    listed = ", ".join(f"{path!r} of {count}" for path, count in stacks.items())
    text = as_mapping(_patterns(dict.fromkeys(stacks, base_depth)))
    return (
        f"param_groups: base_depth={base_depth} is one number, but there are several lists of blocks: {listed}. Give the depth "
        f"of each at the proxy, and leave out those that are no residual blocks: base_depth={text}."
    )
