"""Whoever obeys the errors of param_groups ends with the right table of an architecture, or with another error."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from torch import nn

from lwadamw import param_groups
from lwadamw.width.patterns import matches

from .skeleton import build
from .table import Table, names, read

TO_FILL = "<its fan_in at the proxy>"
each_architecture = pytest.mark.parametrize("table", [pytest.param(read(name), id=name) for name in names()])


def fan_ins(table: Table, which: int) -> dict[str, int]:
    """Return the fan_in of every matrix and output by each of its names."""
    return {p.name: p.fan_in[which] for p in table.parameters if p.fan_in is not None}


def truth(table: Table) -> dict[str, float]:
    """Return the width ratio of every distinct matrix and output."""
    return {p.name: p.m for p in table.parameters if p.m is not None and p.tied is None}


def found(model: nn.Module, **arguments: Any) -> dict[str, float]:
    """Return the width ratios that param_groups finds."""
    return {
        name: e.m
        for name, e in param_groups(model, include_frozen=True, **arguments).evidence.items()
        if e.m is not None
    }


def filled(text: str, values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the mapping that an error prints, each open place filled with what is true for all that its pattern matches."""

    def value(entry: re.Match[str]) -> str:
        matched = {repr(v) for name, v in values.items() if matches(json.loads(entry.group(1)), name)}
        assert len(matched) == 1, f"{entry.group(1)} matches parameters that need different values: {matched}"
        return f"{entry.group(1)}: {matched.pop()}"

    if place in text:
        with pytest.raises(SyntaxError):
            ast.parse(text)
    return ast.literal_eval(re.sub(rf'("(?:[^"\\]|\\.)*"): {re.escape(place)}', value, text))


def obey(message: str, arguments: dict[str, Any], table: Table) -> dict[str, Any]:
    """Return the arguments that an error tells the user to give, with every open place filled in."""
    mapping = re.search(r"\{\n.*\n\}", message, re.DOTALL)
    assert mapping is not None, message
    if "cannot decide a role" in message:
        roles = {p.name: "vector" if p.role == "undecided" else p.role for p in table.parameters}
        text = mapping.group(0).partition("\n}")[0] + "\n}"
        return arguments | {"roles": filled(text, roles, "<role>") | arguments.get("roles", {})}
    given = filled(mapping.group(0).partition("\n}")[0] + "\n}", fan_ins(table, 0), TO_FILL)
    if "Put these before it" in message:
        return arguments | {"base_width": given | arguments["base_width"]}
    if "Add these to the end" in message:
        return arguments | {"base_width": arguments["base_width"] | given}
    return arguments | {"base_width": given}


def obeyed(model: nn.Module, table: Table, **arguments: Any) -> dict[str, float]:
    """Return the width ratios after all errors have been obeyed."""
    for _ in range(4):
        try:
            return found(model, **arguments)
        except ValueError as error:
            arguments = obey(str(error), arguments, table)
    return found(model, **arguments)


@each_architecture
def test_an_int_base_width_gives_the_true_ratios_in_the_end(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    """Only where a message says that the inputs of a matrix are assumed to follow the width, its ratio may be another one."""
    with caplog.at_level("WARNING", logger="lwadamw"):
        ratios = obeyed(build(table, 1), table, base_width=table.widths[0], width=table.widths[1])
    assumed = re.search(r"assumes that the inputs of these matrices follow the width: (.*?)\. If one", caplog.text)
    patterns = assumed.group(1).split(", ") if assumed else []
    right = truth(table)
    wrong = {name for name in ratios.keys() | right.keys() if ratios.get(name) != right.get(name)}
    assert {name for name in wrong if not any(matches(pattern, name) for pattern in patterns)} == set()
    assert not wrong or table.source.startswith("torchvision"), (
        "the width of these convolutional networks is not their channels"
    )


@each_architecture
def test_one_number_for_all_patterns_gives_the_true_ratios_in_the_end(table: Table) -> None:
    model = build(table, 1)
    assert obeyed(model, table, base_width={"*": table.widths[0]}) == truth(table)


@each_architecture
def test_an_incomplete_mapping_gives_the_true_ratios_in_the_end(table: Table) -> None:
    model = build(table, 1)
    name, fan_in = next((p.name, p.fan_in[0]) for p in table.parameters if p.role == "matrix" and p.fan_in)
    assert obeyed(model, table, base_width={name: fan_in}) == truth(table)
