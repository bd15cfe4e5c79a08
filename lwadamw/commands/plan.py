"""The part of `python -m lwadamw rule` that plans depth, batch size, tokens and parameters together with the width."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..monitor.text import aligned
from .arguments import whole

if TYPE_CHECKING:
    from ..width.plans import Place, Plan
    from ..width.rules import Rule
    from ..width.targets import Base

_PLACES: Final[dict[str, str]] = {
    "matrix": "matrices",
    "block_vector": "norms and biases in blocks",
    "vector": "embedding, last norm",
    "output": "untied head",
}
# Arguments that belong together.
_DEPTHS: Final = ("base_depth", "depth")
_PARAMETERS: Final = ("base_parameters", "parameters")
_RUNS: Final = ("base_steps", "base_batch_tokens", "steps", "batch_tokens")


def add(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the plan."""
    from ..width.laws import LAWS

    option = parser.add_argument_group("if more than the width changes").add_argument
    option("--base-depth", type=whole, metavar="N", help="residual blocks of the proxy")
    option("--depth", type=whole, metavar="N", help="residual blocks of the target")
    option("--base-steps", type=whole, metavar="N", help="length of the proxy's run")
    option("--base-batch-tokens", type=whole, metavar="N", help="tokens per step of the proxy")
    option("--base-parameters", type=whole, metavar="N", help="parameters of the proxy")
    option("--parameters", type=whole, metavar="N", help="parameters of the target")
    option("--law", choices=tuple(LAWS), help="how base values follow batch size and tokens (default: they do not)")


def plan_of(parser: argparse.ArgumentParser, args: argparse.Namespace, rule: Rule, base: Base) -> Plan | None:
    """Return the plan that the arguments ask for; None where only the width changes.

    Arguments that give no plan end the program with exit code 2.

    Args:
        parser: the parser of the command.
        args: its arguments.
        rule: the chosen rule.
        base: base values and the width of the proxy.
    """
    from ..width.laws import LAWS, Length
    from ..width.plans import Plan

    asked = ("base_depth", "depth", "base_steps", "base_batch_tokens", "base_parameters", "parameters", "law")
    if rule.depth is None and all(getattr(args, name) is None for name in asked):
        return None
    _complete(parser, args, _DEPTHS)
    _complete(parser, args, _PARAMETERS)
    if rule.depth is not None and args.depth is None:
        parser.error(f"argument rule: {rule.name} scales the depth. Give --base-depth and --depth; they may be equal.")
    if any(getattr(args, name) is not None for name in ("base_steps", "base_batch_tokens", *_PARAMETERS, "law")):
        _complete(parser, args, _RUNS)
    base_length = length = None
    if args.base_steps is not None:
        base_length = Length(args.base_steps, args.base_batch_tokens, args.base_parameters)
        length = Length(args.steps, args.batch_tokens, args.parameters)
    try:
        return Plan(
            rule,
            base,
            args.width,
            args.base_depth,
            args.depth,
            base_length,
            length,
            None if args.law is None else LAWS[args.law],
        )
    except ValueError as error:
        parser.error(str(error))


def _complete(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str]) -> None:
    """End the program with exit code 2 if arguments that belong together were given in part, or are needed and missing."""
    given = [name for name in names if getattr(args, name) is not None]
    missing = [_flag(name) for name in names if getattr(args, name) is None]
    if missing and (given or names is _RUNS):
        because = _flag(given[0]) if given else "--law" if args.law is not None else "--parameters"
        parser.error(f"argument {because}: it needs {' and '.join(missing)} too.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def page(plan: Plan, output: str) -> str:
    """Return the page of a plan.

    Args:
        plan: the plan.
        output: the value of --output.
    """
    parts = [_changes(plan), _typed(plan), _model(plan, output), _snippet(plan, output)]
    if plan.length is not None:
        parts += [_laws(plan), _batch(plan)]
    if plan.rule.depth is not None:
        depth = plan.rule.depth
        parts.append(_filled(f"Depth exponents {depth.name}: {depth.source}. Known: {depth.known}."))
    return "\n\n".join([*parts, *(_filled(f"Note: {note}") for note in plan.warnings())])


def _filled(text: str) -> str:
    return textwrap.fill(text, 120)


def _changes(plan: Plan) -> str:
    rows = [["", "proxy", "target", "ratio"], _ratio("width", plan.base.width, plan.width)]
    if plan.base_depth is not None and plan.depth is not None:
        rows.append(_ratio("blocks", plan.base_depth, plan.depth))
    if plan.base_length is not None and plan.length is not None:
        one, two = plan.base_length, plan.length
        rows.append(_ratio("steps", one.steps, two.steps))
        rows.append(_ratio("tokens per step", one.batch_tokens, two.batch_tokens))
        rows.append(_ratio("tokens", one.tokens, two.tokens))
        if one.parameters is not None and two.parameters is not None:
            rows.append(_ratio("parameters", one.parameters, two.parameters))
            rows.append(_ratio("tokens per parameter", one.tokens / one.parameters, two.tokens / two.parameters))
        if plan.tau_shares is not None:
            rows.append(_ratio("tau of matrices / run", *plan.tau_shares))
        if plan.tau_share_by_tokens is not None and plan.tau_shares is not None:
            share = plan.tau_share_by_tokens
            rows.append(["  by tokens per parameter (5)", "", f"{share:.3g}", f"{share / plan.tau_shares[0]:.3g}"])
    law = "no law for batch and tokens" if plan.law is None else f"law {plan.law.name}"
    lines = [f"Plan: rule {plan.rule.name}, {law}", *aligned(rows)]
    if plan.tau_share_by_tokens is not None:
        lines.append(
            "(5) Bergsma et al. 2505.13738: the best share falls as (tokens per parameter)^-0.52, if the proxy's is the best."
        )
    return "\n".join(lines)


def _ratio(name: str, base: float, there: float) -> list[str]:
    return [name, _number(base), _number(there), f"{there / base:.4g}"]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _typed(plan: Plan) -> str:
    rows = [["what to type", "lr", "weight decay", "eps", "lr * weight decay"]]
    places: list[Place] = ["matrix", "block_vector", "vector", "output"]
    for place in places:
        lr, decay, eps = plan.typed(place)
        if place == "block_vector" and plan.multipliers(place) == plan.multipliers("vector"):
            continue
        rows.append([_PLACES[place], f"{lr:.6g}", f"{decay:.6g}", f"{eps:.3g}", f"{lr * decay:.4g}"])
    return "\n".join([*aligned(rows), f"betas {plan.betas[0]:.6g} {plan.betas[1]:.6g}"])


def _model(plan: Plan, output: str) -> str:
    lines = []
    if plan.rule.depth is not None:
        lines.append(
            f"multiply the output of every residual branch by {plan.branch:.6g}, times the factor that the proxy has: "
            f"x = x + {plan.branch:.6g} * f(norm(x))"
        )
    constant = plan.rule.output.lr == 0 and plan.rule.matrix.lr != 0
    if constant or output == "vector":
        lines.append(f"multiply the logits by {1 / plan.m:.6g}, times the factor that the proxy has")
    elif plan.rule.output.lr:
        lines.append("leave the logits of an untied head as they are; divide those of a tied head by m")
    return "The model itself has to:\n" + "\n".join(f"  {line}" for line in lines or ["do nothing"])


def _snippet(plan: Plan, output: str) -> str:
    lr, decay, eps = plan.values
    named = f"{plan.rule.name!r}".replace("'", '"')
    depth = "" if plan.base_depth is None else f", base_depth={plan.base_depth}"
    more = ', output="vector"' if output == "vector" else ""
    betas = f"betas=({plan.betas[0]:.6g}, {plan.betas[1]:.6g})"
    lines = [
        f"groups = lwadamw.param_groups(model, base_width={plan.base.width}, rule={named}{depth}{more})",
        f"optimizer = lwadamw.AdamW(groups, lr={lr:.6g}, weight_decay={decay:.6g}, {betas}, eps={eps:.6g})",
    ]
    return "In Python:\n" + "\n".join(f"  {line}" for line in lines)


def _laws(plan: Plan) -> str:
    from ..width.laws import LAWS
    from ..width.plans import by_law

    rows = [["law", "base lr", "base wd", "eps", "betas", "tau/run"]]
    for name, other in by_law(plan).items():
        if other is None:
            rows.append([name, "-", "-", "-", "-", "-"])
            continue
        lr, decay, eps = other.values
        shares = other.tau_shares
        betas = f"{other.betas[0]:.4g} {other.betas[1]:.5g}"
        tau = "-" if shares is None else f"{shares[1]:.3g}"
        rows.append(
            [f"{name} *" if other.law == plan.law else name, f"{lr:.4g}", f"{decay:.4g}", f"{eps:.3g}", betas, tau]
        )
    lines = ["How base values follow batch size and tokens, by each law:", *aligned(rows)]
    if any(row[1] == "-" for row in rows[1:]):
        lines.append("- : the law needs --base-parameters and --parameters, or gives 1 - beta > 1.")
    for law in LAWS.values():
        lines.append(_filled(f"{law.name}: holds {law.holds}. Source: {law.source}. Known: {law.known}."))
    return "\n".join(lines)


def _batch(plan: Plan) -> str:
    from ..width.laws import BATCH_BEST, BATCH_CRITICAL

    assert plan.base_length is not None
    assert plan.length is not None
    tokens = plan.length.tokens / plan.base_length.tokens
    best, critical = (plan.base_length.batch_tokens * tokens**power for power in (BATCH_BEST, BATCH_CRITICAL))
    return _filled(
        f"Batch size: Bergsma et al. 2505.13738 find the best one to follow tokens^{BATCH_BEST}, and the critical one, from "
        f"which on a larger batch saves few steps, tokens^{BATCH_CRITICAL}, at any number of parameters (second hand). If the "
        f"proxy's batch is the best, {best:,.0f} tokens per step are the best here; if it is the critical one, {critical:,.0f} "
        "are critical here. Where the proxy stands between them is not known to this command."
    )
