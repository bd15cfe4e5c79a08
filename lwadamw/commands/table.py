"""`python -m lwadamw table`: the role of every parameter of a model. The model is built without memory on the meta device."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..state.names import layer_type
from .arguments import RULE_NAMES, positive, rule_name, whole
from .factory import EXAMPLE, build, literal
from .hf import build_pair
from .pair import Pair
from .table_values import base_depth_of, base_width, number, role, setting

if TYPE_CHECKING:
    from torch import nn

    from ..width.groups import Groups
    from ..width.specs import RoleSpec
    from .paste import Paste


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "table",
        help="the role, width ratio and effective values of every parameter of a model",
        description="Build a model on the meta device, which takes no memory, and print the role of every parameter under a "
        "width rule, and the reason. If the role of a parameter cannot be told, list every such parameter and exit with 1.",
    )
    option = parser.add_argument
    option(
        "factory",
        nargs="?",
        metavar="module:factory",
        help=f"class or function that returns the model, like {EXAMPLE}",
    )
    option(
        "--hf",
        metavar="CONFIG",
        help="instead of a factory: the config.json of a model of transformers, a folder that has one, or the id of a model in "
        "the cache of transformers. Nothing is downloaded. The proxy is built from the same config at --base-width, and the "
        "call of param_groups for this proxy is printed below the table",
    )
    option(
        "--args",
        nargs="+",
        default=[],
        metavar="k=v",
        help="arguments of the factory, with Python literals as values, like depth=4",
    )
    option(
        "--base-width",
        nargs="+",
        metavar="N",
        help="width of the proxy; or fan_in of the proxy by name pattern, like '*.down.weight=1024' '*=256'. Without "
        "--base-width and --base the model is its own proxy, so every m is 1",
    )
    option(
        "--base", metavar="module:factory", help="class or function that returns the proxy; called without arguments"
    )
    option("--width", type=whole, metavar="N", help="width of this model (default: from its config or its embedding)")
    option("--depth", type=whole, metavar="N", help="with --hf: the most layers of the proxy (default: as this model)")
    option(
        "--set",
        action="append",
        default=[],
        metavar="field=value",
        help="with --hf: value of a field of the config at the proxy, as a Python literal, like num_key_value_heads=2 or "
        "text_config.head_dim=64",
    )
    option("--rule", type=rule_name, default="fan2025", metavar="RULE", help=f"{RULE_NAMES} (default: %(default)s)")
    option(
        "--base-depth",
        nargs="+",
        metavar="N",
        help="for a rule that scales the depth: number of residual blocks of the proxy, or numbers by name pattern, like "
        "'layers.*=4' (default: those of the proxy of --hf or --base; without a proxy those of this model)",
    )
    option(
        "--output", choices=("output", "vector"), default="output", help="'vector' if the model divides its logits by m"
    )
    option(
        "--role",
        action="append",
        default=[],
        metavar="pattern=role",
        help="role of the parameters whose name matches a pattern; repeat the option for others. A role is matrix, vector or "
        "output; matrix:-1 if dimension -1 is the fan_in, matrix:1,2,3 if several dimensions are",
    )
    option("--lr", type=positive, metavar="X", help="base learning rate; without it the table shows multipliers")
    option("--wd", type=positive, metavar="X", help="base weight decay; needs --lr")
    option(
        "--steps", type=whole, metavar="N", help="length of the run, to print tau as a share of it; needs --lr and --wd"
    )
    option("--full", action="store_true", help="print one line for every parameter")
    option("--json", action="store_true", help="print JSON with one object per parameter")
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    from ..monitor.summary import summary
    from ..width.groups import param_groups
    from .paste import paste

    if (args.lr is None) != (args.wd is None):
        parser.error("arguments --lr and --wd go together: give both base values, or neither to see multipliers.")
    if args.steps is not None and args.lr is None:
        parser.error("argument --steps: tau needs --lr and --wd. Give them too, or leave out --steps.")
    if args.base is not None and args.base_width is not None:
        parser.error("argument --base: --base-width says the same. Give only one of them.")
    if (args.factory is None) == (args.hf is None):
        parser.error("give either module:factory or --hf CONFIG: the model comes from one of them.")
    try:
        roles = dict(role(text) for text in args.role)
        found = _from_config(args) if args.hf is not None else None
        if found is None and (args.depth is not None or args.set):
            raise ValueError("arguments --depth and --set: they change a config, so they need --hf CONFIG.")
        model = found.model if found else build("module:factory", args.factory, dict(map(literal, args.args)))
        proxy = found.proxy if found else build("--base", args.base, {}) if args.base is not None else None
        base_depth = base_depth_of(
            args.base_depth, args.rule, model if proxy is None else proxy, args.base_width is not None and found is None
        )
        undecided, patterns = _undecided(model, roles)
        if undecided:
            print(_complaint(undecided, patterns, args.full), file=sys.stderr)
            if found is not None and proxy is not None and proxy is not model:
                # The rest needs no choice. What takes the place of a choice here is left out of what is printed.
                instead: dict[str, RoleSpec] = {f"re:^{re.escape(name)}$": "vector" for name, _, _ in undecided}
                given = {**roles, **instead}
                groups = param_groups(model, proxy, args.rule, given, output=args.output, base_depth=base_depth)
                _write(args, found, paste(found, groups.evidence, roles, undecided), [], [], base_depth)
            return 1
        base: Any = model if proxy is None else proxy
        if proxy is None and args.base_width is not None:
            base = base_width(args.base_width)
        width = None if found else args.width
        groups = param_groups(model, base, args.rule, roles, width=width, output=args.output, base_depth=base_depth)
    except (ValueError, TypeError, RuntimeError) as error:
        shallow = (
            ""
            if args.depth is None
            else f" --depth {args.depth} limits the layers of the proxy: a higher one may help."
        )
        parser.error(str(error) + shallow)
    if args.lr is not None:
        for group in groups:
            group |= {"lr": args.lr, "weight_decay": args.wd}
    rows = _rows(groups, args.steps) if args.json else []
    table = "" if args.json else summary(groups, steps=args.steps, full=args.full)
    if found is not None:
        made = None if found.proxy is model else paste(found, groups.evidence, roles)
        _write(args, found, made, rows, [table, found.unlike(groups.evidence)], base_depth)
    else:
        print(json.dumps(rows, indent=1) if args.json else table)
    return 0


def _from_config(args: argparse.Namespace) -> Pair:
    """Build the model and the proxy of --hf."""
    if args.args or args.base is not None:
        raise ValueError(
            "arguments --args and --base: with --hf the config says it all. Leave them out, or leave out --hf."
        )
    texts = args.base_width
    if texts is None and (args.depth is not None or args.set):
        raise ValueError("arguments --depth and --set: they change the proxy, so they need --base-width N.")
    if texts is not None and (len(texts) > 1 or "=" in texts[0]):
        raise ValueError("argument --base-width: with --hf it is one number, the width of the proxy, like 256.")
    proxy_width = None if texts is None else number("--base-width", texts[0], texts[0])
    return build_pair(args.hf, args.width, proxy_width, args.depth, dict(map(setting, args.set)))


def _write(
    args: argparse.Namespace,
    found: Pair,
    made: Paste | None,
    rows: Sequence[Mapping[str, Any]],
    parts: Sequence[str],
    base_depth: int | Mapping[str, int] | None,
) -> None:
    """Print the output of --hf: as JSON the rows, or else what was done to the config, the parts, and the code."""
    values = None if args.lr is None else (args.lr, args.wd)
    code = made.code(args.rule, args.output, values, base_depth) if made is not None else None
    if args.json:
        more = {**made.as_dict(), "code": code} if made is not None else {}
        print(json.dumps({**found.as_dict(), **more, "parameters": rows}, indent=1))
        return
    if code is None:
        last = "Give --base-width N, the width of the proxy, for the width ratios and for the code that makes them."
    else:
        last = f"The call that makes these ratios in a program, for the names of {found.name}:\n\n{code}"
    print("\n\n".join(part for part in (found.report(), *parts, last) if part))


Undecided = list[tuple[str, tuple[int, ...], str]]


def _undecided(model: nn.Module, roles: Mapping[str, RoleSpec]) -> tuple[Undecided, list[str]]:
    """Return name, shape and reason of every parameter without a role, and patterns that match these parameters only."""
    from ..width.patterns import separating
    from ..width.roles import decide

    found = [d for d in decide(model, roles) if d.param.requires_grad]
    undecided = [(d.name, tuple(d.param.shape), d.decision.why) for d in found if d.decision.role is None]
    return undecided, [*separating({d.names: d.decision.role is None for d in found}, unlisted=[False])]


def _complaint(undecided: Undecided, patterns: Sequence[str], full: bool) -> str:
    alike: dict[tuple[str, tuple[int, ...], str], list[str]] = {}
    for name, shape, why in undecided:
        alike.setdefault((name if full else layer_type(name), shape, why), []).append(name)
    lines = [
        f"  {names[0] if len(names) == 1 else f'{pattern} x{len(names)}'}  {shape}  {why}"
        for (pattern, shape, why), names in alike.items()
    ]
    return "\n".join(
        [
            f"The role of {len(undecided)} parameter(s) cannot be told:",
            *lines,
            "Decide the roles with",
            *(f"    --role '{pattern}=<role>'" for pattern in patterns),
            "where a <role> is one of",
            "    matrix:-1   a matrix, with weight decay: fan_in is the last dimension. Packed experts: (experts, out, in)",
            "    matrix:-2   a matrix, with weight decay: fan_in is the last but one. Packed experts: (experts, in, out)",
            "    output:-1   a head or a router: the lr follows the width, no weight decay; -1 or -2 as for matrices",
            "    vector      an embedding, a position, a gain: constant lr, no weight decay",
            "In a program use param_groups(roles={...}), or lwadamw.register_role for the module class.",
        ]
    )


def _rows(groups: Groups, steps: int | None) -> list[dict[str, Any]]:
    from ..state.groups import effective
    from ..width.steady_state import tau_of

    rows: dict[str, dict[str, Any]] = {}
    for group in groups:
        values = effective({"lr": 1.0, "weight_decay": 1.0, "eps": 0.0, **group})
        lr, wd = float(values.lr), float(values.weight_decay)
        tau = float(tau_of(lr, wd)) if "lr" in group and lr * wd > 0 else None
        for name, p in group["params"]:
            rows[name] = {"shape": list(p.shape), "lr": lr, "weight_decay": wd, "tau": tau}
            if steps is not None:
                rows[name]["tau_of_run"] = None if tau is None else tau / steps
    out = []
    for name, found in groups.evidence.items():
        row = {"name": name, "role": found.role, "fan_in": found.fan_in, "m": found.m, "why": found.why}
        out.append(row | {"frozen": found.frozen} | rows.get(name, {}))
    return out
