"""Remedies: the errors that say what to paste, complete for all parameters at once."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from .patterns import ALL, as_lines, matches_any, separating
from .roles import Decided

# Stands for a number that only the user knows. It is not valid Python, so nobody can run a remedy without filling it in.
TO_FILL = "<its fan_in at the proxy>"
_ROLES = """For <role> write one of
    lwadamw.Matrix(fan_in=-1)   a matrix, with weight decay: fan_in is the last dimension, as F.linear(x, w) has it, and packed
                                experts of shape (experts, out, in)
    lwadamw.Matrix(fan_in=-2)   a matrix, with weight decay: fan_in is the last dimension but one, as x @ w has it, and packed
                                experts of shape (experts, in, out)
    lwadamw.Output(fan_in=-1)   a head or a router: the lr follows the width, no weight decay; -1 or -2 as for matrices
    "vector"                    an embedding, a position, a gain: constant lr, no weight decay"""


def for_undecided(undecided: Sequence[Decided], grouped: Sequence[Decided]) -> str:
    """Return the error about parameters whose role nothing decides.

    Args:
        undecided: these parameters.
        grouped: all parameters that are to be grouped. The patterns of the remedy match no other one of them.
    """
    patterns = separating({d.names: d.decision.role is None for d in grouped}, unlisted=[False])

    def show(pattern: str) -> tuple[str, str]:
        matched = [d for d in undecided if matches_any(pattern, d.names)]
        shapes = " or ".join(dict.fromkeys(str(tuple(d.param.shape)) for d in matched))
        count = f" x{len(matched)}" if len(matched) > 1 else ""
        short = ' Write "matrix" or "output".' if all(d.evidence.dims for d in matched) else ""
        return "<role>", f"{shapes}{count}: {matched[0].decision.why}{short}"

    return (
        f"param_groups: cannot decide a role for {len(undecided)} parameter{'s' * (len(undecided) > 1)}. Fill in each <role>, "
        f"and give these before any other roles:\nroles={as_lines({p: p for p in patterns}, show)}\n{_ROLES}\n"
        "lwadamw.register_role decides it for all modules of a class."
    )


def for_int(
    base_width: int,
    width: int,
    scaled: Sequence[Decided],
    odd: Sequence[Decided],
    assumed: Collection[str],
    apart: Mapping[str, int],
) -> str:
    """Return the error about an int base_width that does not determine every width ratio, with the mapping that does.

    Args:
        base_width: the width of the proxy.
        width: the width of the model.
        scaled: all parameters whose multipliers depend on the width.
        odd: those whose ratio is not determined.
        assumed: names of those of which nothing tells that their inputs follow the width.
        apart: names of those in a part of the model that has a width of its own, and this width.
    """
    unclear = {d.name for d in odd} | set(assumed)

    def base_fan_in(found: Decided) -> int | tuple[str, int, int | None]:
        factor, rest = divmod(found.inputs, width)
        if rest or factor == 0 or found.name in unclear:
            # Parameters of the same layer type but another fan_in need places of their own.
            return TO_FILL, found.inputs, apart.get(found.name)
        return factor * base_width

    def show(value: int | tuple[str, int, int | None]) -> tuple[str, str]:
        if isinstance(value, int):
            return str(value), ""
        _, fan_in, own = value
        scaled_down = (
            "" if own or fan_in * base_width % width else f"{fan_in * base_width // width} if it follows the width, "
        )
        part = f" in a part of width {own}" if own else ""
        return TO_FILL, f"{fan_in} here{part}; {scaled_down}{fan_in} if it is the same at the proxy"

    patterns = separating({d.names: base_fan_in(d) for d in scaled}, unlisted=[base_width])
    patterns.setdefault("*", base_width)
    first, own = odd[0], apart.get(odd[0].name)
    what = (
        f"{first} is in a part of the model whose config has the width {own}, and not {width}"
        if own
        else f"fan_in {first.fan_in} of {first} is not a multiple of the width {width}"
    )
    return (
        f"param_groups: {what}, so base_width={base_width} does not determine its width ratio. Pass the proxy model, for "
        f'example built under torch.device("meta"). Or pass this mapping, with every fan_in at the proxy filled in:\n'
        f"base_width={as_lines(patterns, show)}"
    )


def for_missing(missing: Sequence[Decided], scaled: Sequence[Decided]) -> str:
    """Return the error about parameters that no base_width pattern matches.

    Args:
        missing: these parameters.
        scaled: all parameters whose multipliers depend on the width.
    """
    entries = _open_entries(missing, scaled)
    return (
        f"param_groups: no base_width pattern matches {missing[0]}, fan_in {missing[0].inputs}. Add these to the end of "
        f"base_width, with every fan_in at the proxy filled in:\n{entries}"
    )


def for_unlike(pattern: str, base_fan_in: int, matched: Sequence[Decided], scaled: Sequence[Decided]) -> str:
    """Return the error about a base_width pattern that gives one fan_in to parameters of different fan_ins.

    Args:
        pattern: the pattern.
        base_fan_in: the fan_in that it gives.
        matched: the parameters to which it gives the fan_in.
        scaled: all parameters whose multipliers depend on the width.
    """
    entries = _open_entries(matched, scaled)
    fan_ins = " and ".join(map(str, sorted({d.inputs for d in matched})))
    what = "matrices" if all(d.fan_in is not None for d in matched) else "parameters"
    return (
        f"param_groups: base_width pattern {pattern!r} gives the fan_in {base_fan_in} at the proxy to {what} whose fan_in "
        f"here is {fan_ins}. So their width ratios would differ. Put these before it, with every fan_in at the proxy filled "
        f"in:\n"
        f"{entries}\nIf {base_fan_in} is the fan_in of all of them at the proxy, write {json.dumps(ALL + pattern)}."
    )


def _open_entries(wanted: Sequence[Decided], scaled: Sequence[Decided]) -> str:
    """Return a mapping to fill in, whose patterns match the wanted parameters and no other ones."""
    ours = {d.name for d in wanted}
    labels = {d.names: d.inputs if d.name in ours else None for d in scaled}
    return as_lines(separating(labels, unlisted=[None]), lambda fan_in: (TO_FILL, f"{fan_in} here"))
