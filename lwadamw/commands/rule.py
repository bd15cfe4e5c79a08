"""`python -m lwadamw rule`: the values to use at another width, in any framework, and the values of the other rules."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import TYPE_CHECKING, Final

from ..monitor.text import aligned
from ..width.rules import RECIPES, ROLES, RULES, Rule, Scale, get_rule, with_output
from . import plan as planning
from .arguments import RULE_NAMES, positive, rule_name, whole

if TYPE_CHECKING:
    from ..width.targets import Horizon, Target

_ALONE: Final = "What follows is about the width alone, with the base values of the proxy."
OWN: Final = "own"  # The name of a rule that is given by its exponents.


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "rule",
        help="the values to use at another width, and the values of the other rules",
        description="Take an lr and a weight decay that were tuned at one width to another width, under a width rule. Print "
        "the values of every role in both conventions for weight decay, as lwadamw's and as plain parameter groups; tau "
        "compared with the length of the run; what the rule predicts about the weights; and the same for every other rule.",
    )
    option = parser.add_argument
    option(
        "rule",
        nargs="?",
        type=rule_name,
        metavar="RULE",
        help=f"{RULE_NAMES} (default: fan2025)",
    )
    option("--from", dest="base_width", type=whole, required=True, metavar="N", help="width or fan_in of the proxy")
    option("--to", dest="width", type=whole, required=True, metavar="N", help="width or same fan_in of the target")
    option("--lr", type=positive, required=True, metavar="X", help="peak learning rate tuned at the proxy")
    option(
        "--wd",
        type=positive,
        required=True,
        metavar="X",
        help="weight decay tuned at the proxy, as torch's AdamW defines it",
    )
    option(
        "--betas",
        type=float,
        nargs=2,
        default=(0.9, 0.95),
        metavar="X",
        help="betas of the optimizer (default: 0.9 0.95)",
    )
    option("--eps", type=positive, default=1e-8, metavar="X", help="eps of the optimizer (default: 1e-8)")
    option("--steps", type=whole, metavar="N", help="length of the target's run, to compare tau with it")
    option("--batch-tokens", type=whole, metavar="N", help="tokens per step, to print tau in tokens too; needs --steps")
    option(
        "--exponents",
        type=exponents,
        metavar="lr=A,wd=B",
        help="exponents of matrices instead of a rule, like lr=-0.75,wd=0.75; eps=C is possible too",
    )
    option(
        "--output", choices=("output", "vector"), default="output", help="'vector' if the model divides its logits by m"
    )
    planning.add(parser)
    option("--all", action="store_true", help="print the full page of every rule, and not only of one")
    option("--json", action="store_true", help="print all numbers of all rules as JSON")
    parser.set_defaults(command=lambda args: run(parser, args))


def exponents(text: str) -> Scale:
    """Convert the text of --exponents."""
    try:
        return Scale.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    from ..width.targets import Base, Horizon, Target

    if args.exponents is not None and args.rule is not None:
        parser.error(f"argument --exponents: they are in place of a rule. Leave out {args.rule!r}, or --exponents.")
    if args.batch_tokens is not None and args.steps is None:
        parser.error("argument --batch-tokens: it needs --steps, the length of the run.")
    named = [with_output(rule, args.output) for rule in RULES.values()]
    if args.exponents is None:
        chosen = with_output(get_rule(args.rule or "fan2025"), args.output)
        rules = [*named, chosen] if chosen.name in RECIPES else named
    else:
        chosen = with_output(Rule(OWN, matrix=args.exponents, holds="your exponents"), args.output)
        rules = [chosen, *named]
    try:
        base = Base(args.base_width, args.lr, args.wd, (args.betas[0], args.betas[1]), args.eps)
        targets = {rule.name: Target(rule, base, args.width) for rule in rules}
    except ValueError as error:
        parser.error(str(error))
    plan = planning.plan_of(parser, args, chosen, base)
    horizon = Horizon(args.steps, args.batch_tokens) if args.steps is not None else None
    if args.json:
        document = _document(targets[chosen.name], targets, horizon)
        print(json.dumps(document | ({"plan": plan.as_dict()} if plan is not None else {}), indent=1))
        return 0
    if plan is not None:
        print(planning.page(plan, args.output) + "\n\n" + textwrap.fill(_ALONE, 120) + "\n")
    shown = [t for t in targets.values() if t.rule.depth is None and (args.all or (plan is None and t.rule == chosen))]
    pages = [_page(t, horizon, args.output) for t in shown]
    remarks = _remarks(targets[chosen.name], horizon, plan is None)
    print("\n\n".join([*pages, _others(targets, chosen.name, horizon), remarks]))
    return 0


def _document(chosen: Target, targets: dict[str, Target], horizon: Horizon | None) -> dict[str, object]:
    base = chosen.base
    document: dict[str, object] = {
        "rule": chosen.rule.name,
        "m": chosen.m,
        "width": chosen.width,
        "base": {"width": base.width, "lr": base.lr, "weight_decay": base.weight_decay, "betas": base.betas}
        | {"eps": base.eps, "tau": base.steady.tau, "weight_rms": base.steady.weight_rms}
        | {"relative_update": base.steady.relative_update},
        "rules": {name: target.as_dict(horizon) for name, target in targets.items()},
    }
    if horizon is not None:
        document["run"] = {"steps": horizon.steps, "batch_tokens": horizon.batch_tokens}
    return document


def _page(target: Target, horizon: Horizon | None, output: str) -> str:
    base = target.base
    title = (
        f"rule {target.rule.name}   width {base.width} to {target.width}, m = {target.m:g}   base lr {base.lr:g}, "
        f"weight decay {base.weight_decay:g}, betas {base.betas[0]:g} {base.betas[1]:g}"
    )
    return "\n\n".join([title, _typed(target), _groups(target, output), _predictions(target, horizon)])


def _typed(target: Target) -> str:
    scales_eps = any(target.rule[role].eps for role in ROLES)
    header = [
        "role",
        "lr",
        "weight decay, times lr (1)",
        "weight decay, independent (2)",
        *(["eps"] if scales_eps else []),
    ]
    rows = [header]
    for role in ROLES:
        values, scale = target.values(role), target.rule[role]
        row = [role, _scaled(values.lr, scale.lr)]
        if scale.wd is None:
            row += ["0", "0"]
        else:
            row += [_scaled(values.weight_decay, scale.wd), _scaled(values.decay_per_step, scale.lr + scale.wd)]
        rows.append([*row, *([_scaled(values.eps, scale.eps)] if scales_eps else [])])
    notes = [
        "(1) PyTorch, Megatron, optax: a step shrinks a weight by the share lr * weight decay.",
        "(2) fully decoupled: a step at peak lr shrinks a weight by this share. lr is not a factor; the schedule may be one.",
    ]
    return "\n".join([*aligned(rows), *notes])


def _scaled(value: float, exponent: float) -> str:
    return f"{value:.6g}" + (f" = base * m^{exponent:g}" if exponent else "")


def _groups(target: Target, output: str) -> str:
    base, rule = target.base, target.rule
    called = f'"{rule.name}"'
    if rule.name == OWN:
        scale = ", ".join(f"{k}={v:g}" for k in ("lr", "wd", "eps") if (v := getattr(rule.matrix, k)))
        called = f'lwadamw.Rule("{OWN}", matrix=lwadamw.Scale({scale}))'
    more = ', output="vector"' if output == "vector" else ""
    betas = f"betas=({base.betas[0]:g}, {base.betas[1]:g})"
    eps = f", eps={base.eps:g}" if base.eps != 1e-8 else ""
    lines = [
        "lwadamw, with base values:",
        f"  groups = lwadamw.param_groups(model, base_width={base.width}, rule={called}{more})",
        f"  optimizer = lwadamw.AdamW(groups, lr={base.lr:g}, weight_decay={base.weight_decay:g}, {betas}{eps})",
        f"any AdamW of kind (1), {betas}{eps}:",
    ]
    for role in ROLES:
        values = target.values(role)
        own = f', "eps": {values.eps:.6g}' if rule[role].eps else ""
        lines.append(f'  {{"params": {role}, "lr": {values.lr:.6g}, "weight_decay": {values.weight_decay:.6g}{own}}},')
    return "\n".join(lines)


def _predictions(target: Target, horizon: Horizon | None) -> str:
    base, there = target.base.steady, target.steady
    taus = (base.tau, there.tau)
    rows = [
        ["matrices", f"width {target.base.width}", f"width {target.width}", "ratio"],
        ["tau = 1/(lr wd), steps", *map(_count, taus), f"{target.tau_ratio:.3g}"],
    ]
    if horizon is not None:
        rows.append(
            [f"  of a run of {_count(horizon.steps)} steps", *(f"{horizon.share(tau):.2g}" for tau in taus), ""]
        )
        if horizon.batch_tokens is not None:
            rows.append(["  in tokens", *(_count(tau * horizon.batch_tokens) for tau in taus), ""])
    rows += [
        ["steady after 3 tau, steps (3)", *(_steady(tau, horizon) for tau in taus), ""],
        ["weight RMS sqrt(lr/2wd)", f"{base.weight_rms:.3g}", f"{there.weight_rms:.3g}", f"{target.rms_ratio:.3g}"],
        [
            "relative update per step sqrt(2 lr wd (1-b1)/(1+b1))",
            *(f"{s.relative_update:.3g}" for s in (base, there)),
            f"{target.update_ratio:.3g}",
        ],
        ["top singular value, ~ weight RMS * width^0.75 (4)", "", "", f"{target.top_ratio:.3g}"],
    ]
    notes = [
        "(3) at constant lr; warm-up and a falling lr make it later. Predictions hold where gradients are mostly noise.",
        "(4) Fan et al. 2510.15262 observed it in LLaMA-style models; it is not derived, and other models differ: measure it.",
    ]
    return "\n".join([*aligned(rows), *notes])


def _steady(tau: float, horizon: Horizon | None) -> str:
    from ..width.steady_state import STEADY_TAUS

    late = horizon is not None and not horizon.reaches(tau)
    return _count(STEADY_TAUS * tau) + (": not in this run" if late else "")


def _others(targets: dict[str, Target], chosen: str, horizon: Horizon | None) -> str:
    of_run = ["tau/run"] if horizon is not None else []
    rows = [["rule", "lr", "wd", "lr*wd", "tau", *of_run, "RMS", "update", "top"]]
    for name, target in targets.items():
        values, tau = target.values("matrix"), target.steady.tau
        share = [f"{horizon.share(tau):.2g}"] if horizon is not None else []
        ratios = (target.rms_ratio, target.update_ratio, target.top_ratio)
        row = [f"{name} *" if name == chosen else name, f"{values.lr:.4g}", f"{values.weight_decay:.4g}"]
        rows.append([*row, f"{values.decay_per_step:.4g}", _count(tau), *share, *(f"{ratio:.3g}" for ratio in ratios)])
    quantities = {
        "lr": [t.values("matrix").lr for t in targets.values()],
        "weight decay": [t.values("matrix").weight_decay for t in targets.values()],
        "tau": [t.steady.tau for t in targets.values()],
        "relative update": [t.update_ratio for t in targets.values()],
        "top singular value": [t.top_ratio for t in targets.values()],
    }
    spread = ", ".join(f"{name} x{max(values) / min(values):.3g}" for name, values in quantities.items())
    width = max(len(name) for name in targets)
    holds = [
        f"  {name.ljust(width)}  {t.rule.holds}" + (f" ({t.rule.source})" if t.rule.source else "")
        for name, t in targets.items()
    ]
    return "\n".join(
        [
            "The rules for matrices (RMS, update and top are ratios of target over proxy):",
            *aligned(rows),
            f"From one rule to another: {spread}.",
            "What each rule holds constant across widths:",
            *holds,
        ]
    )


def _remarks(target: Target, horizon: Horizon | None, alone: bool) -> str:
    first = "Only the width is scaled here: depth, batch size and tokens stay the same. If they change too, give them. "
    remarks = [
        (first if alone else "") + "Which rule transfers best is an open question.",
        "Remark: Qiu et al. 2512.05620 find that lr*wd ~ 1/width is nearly optimal for compute-optimal runs, in which the "
        "tokens grow with the model. Of the rules above, `mup` has this lr*wd.",
    ]
    if horizon is not None:
        remarks.append(
            "Remark: Bergsma et al. 2505.13738 find that the best tau/run falls as a power of tokens per parameter. Their "
            "setup is muP, SlimPajama, and an lr that falls linearly to 0. At second hand: the power is about -0.52, and a "
            "tau/run of 0.21 is best at 20 tokens per parameter. We do not know whether this tau has the base lr or the "
            f"effective lr. tau/run of these matrices, effective: {horizon.share(target.steady.tau):.2g}."
        )
    return "\n".join(textwrap.fill(remark, 120) for remark in remarks)


def _count(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
