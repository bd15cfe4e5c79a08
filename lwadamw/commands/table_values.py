"""The arguments of `python -m lwadamw table` as values: widths, depths, roles and fields of a config."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..width.rules import ROLES, get_rule
from .arguments import whole

if TYPE_CHECKING:
    from torch import nn

    from ..width.specs import RoleSpec


def setting(text: str) -> tuple[str, Any]:
    """Convert a text of --set to the path of a field and its value."""
    path, equals, value = text.partition("=")
    try:
        if not (equals and all(part.isidentifier() for part in path.split("."))):
            raise ValueError(text)
        return path, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise ValueError(
            f"argument --set: {text!r} is not field=value with a Python literal, like num_key_value_heads=2 or "
            "text_config.head_dim=64."
        ) from None


def base_width(texts: Sequence[str]) -> int | dict[str, int]:
    """Convert the texts of --base-width."""
    return _numbers(
        "--base-width", texts, "pattern=fan_in, like '*=256'. Give pairs, or one number alone as the width."
    )


def base_depth_of(
    given: Sequence[str] | None, rule: str, proxy: nn.Module, unknown: bool
) -> int | dict[str, int] | None:
    """Return the number of blocks of the proxy, for a rule that has to know them; None for another rule.

    Args:
        given: the texts of --base-depth, or None.
        rule: name of the rule.
        proxy: the proxy, whose blocks are counted where nothing is given. It is the model itself where there is no proxy.
        unknown: whether the proxy was given by its width alone, so that its blocks are not known.

    Raises:
        ValueError: the rule does not scale the depth and --base-depth is given, or the number of blocks is not known.
    """
    from ..width.applied import needs_depth
    from ..width.blocks import blocks_of

    if not needs_depth(get_rule(rule)):
        if given is not None:
            raise ValueError(
                f"argument --base-depth: the rule {rule!r} says nothing of the depth. Leave it out, or give --rule "
                "completep."
            )
        return None
    if given is not None:
        return _numbers(
            "--base-depth", given, "pattern=blocks, like 'layers.*=4'. Give pairs, or one number of blocks alone."
        )
    if unknown:
        raise ValueError(
            f"argument --base-depth: the rule {rule!r} scales residual blocks too, and --base-width does not tell those of "
            "the proxy. Give --base-depth N, the number of its blocks; this model may have as many."
        )
    counted = blocks_of(proxy)
    if not counted:
        raise ValueError(
            f"argument --rule: {rule} scales residual blocks, and {type(proxy).__name__} has no list of numbered layers "
            "that could be its blocks. Say which parameters are inside blocks, and how many the proxy has: --base-depth "
            "'<pattern>=<number>'."
        )
    return counted


def _numbers(argument: str, texts: Sequence[str], wanted: str) -> int | dict[str, int]:
    """Return one number, or numbers by pattern."""
    if len(texts) == 1 and "=" not in texts[0]:
        return number(argument, texts[0], texts[0])
    pairs = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals:
            raise ValueError(f"argument {argument}: {text!r} is not {wanted}")
        pairs[pattern] = number(argument, value, text)
    return pairs


def number(argument: str, value: str, text: str) -> int:
    """Convert a part of an argument to a positive whole number.

    Args:
        argument: name of the argument, for messages.
        value: the part.
        text: the whole text, for messages.

    Raises:
        ValueError: the part is no such number.
    """
    try:
        return whole(value)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"argument {argument}: {error}, in {text!r}") from None


def role(text: str) -> tuple[str, RoleSpec]:
    """Convert a text of --role to a pattern and a role."""
    from ..width.specs import Matrix, Output

    pattern, _, spec = text.rpartition("=")
    name, colon, dimension = spec.partition(":")
    kinds: dict[str, type[Matrix] | type[Output]] = {"matrix": Matrix, "output": Output}
    if pattern and colon and name in kinds and re.fullmatch(r"-?\d+(,-?\d+)*", dimension):
        dims = tuple(map(int, dimension.split(",")))
        return pattern, kinds[name](fan_in=dims if len(dims) > 1 else dims[0])
    if pattern and not colon:
        for known in ROLES:
            if name == known:
                return pattern, known
    raise ValueError(
        f"argument --role: {text!r} is not pattern=role, like '*.A_log=vector' or '*.experts.w1=matrix:-1'. Roles are "
        f"{', '.join(ROLES)}."
    )
