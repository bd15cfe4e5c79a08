"""The results of `transfer.analyse` as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from lwadamw.monitor.text import aligned

from .outcomes import Outcomes
from .paired import Difference, RegretDifference
from .ridge import Ridge
from .transfer import Arm, Optimum, Regret, Transfer
from .transfer_next import Next


def table(found: Transfer, outcomes: Outcomes, plan: bool = False) -> str:
    """Return the results as tables of text.

    Each arm has a table with a line per width. Then follow a table with drift and regret of all arms, the differences of
    drifts, the ridges, the best arm at every width, and notes that explain the numbers.

    Args:
        found: the results.
        outcomes: the runs behind the results.
        plan: whether to say what to run next.
    """
    rows = outcomes.rows
    diverged = sum(math.isinf(row.loss) for row in rows)
    count = f"{len(rows)} runs, {diverged} of them diverged; losses are column {outcomes.loss!r}"
    axis, swept = outcomes.width, outcomes.swept
    header = (axis, f"best {swept}", "95 %", "of the runs", "loss", f"at {swept}", "loss", "regret", "")
    blocks = ["\n".join([f"{outcomes.source}: {count}; proxy {axis} {found.proxy}", *outcomes.notes])]
    labels = _labels(found.arms)
    for arm in found.arms:
        noise = f"noise of a run {arm.noise:.2g}, {'from its seeds' if arm.noise_from == 'seeds' else 'as given'}"
        blocks.append(
            "\n".join([f"{labels[arm]}   ({noise})", *aligned([header, *_lines(arm)], range(1, len(header) - 1))])
        )
    if any(arm.drift for arm in found.arms):
        blocks.append(
            "\n".join(
                aligned(
                    [_summary_header(axis, swept), *(_summary(arm, labels[arm]) for arm in found.arms)], range(1, 5)
                )
            )
        )
    if found.differences:
        several = len({d.weight_decay for d in found.differences}) > 1
        blocks.append(
            "\n".join(
                aligned([_pairs_header(axis, swept), *(_pair(d, several) for d in found.differences)], range(1, 3))
            )
        )
    blocks += ["\n".join(map(_ridge, found.ridges))] if found.ridges else []
    best = [(str(w), labels[arm], f"{o.best_lr:g}", _loss(o.best_loss)) for w, (arm, o) in found.best().items()]
    blocks.append("\n".join(aligned([(axis, "arm with the lowest loss", f"at {swept}", "loss"), *best], right=(0, 2))))
    if plan:
        lines = aligned([("arm", axis, "weight decay", "lr", ""), *map(_next, found.next)], range(1, 4))
        blocks.append("\n".join(["next runs", *lines]))
    return "\n\n".join([*blocks, _notes(found)])


def _summary_header(axis: str, swept: str) -> Sequence[str]:
    drift = f"drift, octaves of {swept} per octave of {axis}"
    return ("arm", f"{axis}s" if axis == "width" else axis, drift, "in all, octaves", "regret at the widest", "")


def _pairs_header(axis: str, swept: str) -> Sequence[str]:
    drift = f"drift, octaves of {swept} per octave of {axis}"
    return ("difference of two arms", drift, "regret at the widest", f"runs in common at {axis}")


def _lines(arm: Arm) -> Sequence[Sequence[str]]:
    lines = []
    for i, optimum in enumerate(arm.optima):
        regret = arm.regrets[i] if arm.regrets else None
        lines.append((*_of_optimum(optimum), *_of_regret(regret), _remark(optimum, regret)))
    return lines


def _of_optimum(o: Optimum) -> tuple[str, ...]:
    if not math.isfinite(o.best_loss):
        return (str(o.width), "-", "-", "-", "-")
    return (str(o.width), f"{o.lr:.3g}", span(o.low, o.high), f"{o.best_lr:g}", _loss(o.best_loss))


def _of_regret(r: Regret | None) -> tuple[str, ...]:
    if r is None:
        return ("-", "-", "-")
    return (f"{r.lr:g}", _loss(r.loss), regret_of(r) if math.isfinite(r.regret) else "-")


def _remark(optimum: Optimum, regret: Regret | None) -> str:
    parts = [f"best lr: {optimum.edge}"] if optimum.edge else []
    parts += [optimum.shape] if optimum.shape else []
    parts += [f"regret: {regret.reached}"] if regret and regret.reached != "run" else []
    parts += [f"{optimum.diverged} of {optimum.runs} diverged"] if optimum.diverged else []
    return "; ".join(parts)


def _summary(arm: Arm, label: str) -> Sequence[str]:
    widths = [o.width for o in arm.optima]
    regret = _of_regret(arm.regrets[-1])[2] if arm.regrets else "-"
    reach = f"{widths[0]} to {widths[-1]}" if len(widths) > 1 else str(widths[0])
    drift = arm.drift
    if drift is None:
        return (label, reach, "-", "-", regret, "")
    slope = f"{drift.slope:+.2f} ({signed_span(drift.slope_low, drift.slope_high, 2)})"
    total = f"{drift.total:+.1f} ({signed_span(drift.total_low, drift.total_high, 1)})"
    edge = (
        f"not resolved: best lr not inside the grid at width {', '.join(map(str, drift.at_edge))}"
        if drift.at_edge
        else ""
    )
    return (label, reach, slope, total, regret, edge)


def _pair(d: Difference, several: bool) -> Sequence[str]:
    decay = f", wd {d.weight_decay:g}" if several else ""
    slope = f"{d.slope:+.2f} ({signed_span(d.slope_low, d.slope_high, 2)})"
    regret = regret_difference(d.regrets[-1]) if d.regrets else "-"
    return (f"{d.arm} - {d.other}{decay}", slope, regret, ", ".join(map(str, d.shared)) or "-")


def _next(n: Next) -> Sequence[str]:
    decays = ", ".join("-" if wd is None else f"{wd:.3g}" for wd in dict.fromkeys(n.weight_decay)) or "-"
    lr = ", ".join(f"{x:.3g}" for x in n.lr) or "none"
    return (n.arm, str(n.width), decays, lr, f"{'another seed each: ' if n.seeds else ''}{n.why}")


def _ridge(r: Ridge) -> str:
    axis = "" if r.axis is None else f"; flattest direction of a quadratic form {r.axis:+.2f}"
    edge = f"; left out, best lr at the edge: wd {', '.join(f'{wd:g}' for wd in r.at_edge)}" if r.at_edge else ""
    return (
        f"ridge of {r.arm} at width {r.width}: best lr ∝ wd^{r.slope:+.2f} ({r.slope_low:+.2f} to {r.slope_high:+.2f}), "
        f"from {len(r.lr)} weight decays{axis}{edge}"
    )


def _notes(found: Transfer) -> str:
    from_where = "the given lr" if found.given_lr else "the lr of the arm's best run at the proxy"
    notes = [
        "best lr: the lowest point of a parabola in log2 lr through the best run and its neighbours. Losses are means over "
        "seeds.",
        f"regret: the loss at {from_where}, minus the best loss of the arm at this width. It cannot be negative: chance alone "
        "makes it about as large as the noise.",
        "95 %: the interval holds 95 % of refits in which the losses are moved by the noise of a run. The noise is estimated "
        "from the seeds of the arm, else it is --noise. The interval does not include how far the loss is from a parabola.",
    ]
    if found.ridges:
        notes.append("ridge: the exponent is -1 where lr·wd decides the loss, and +1 where lr/wd does.")
    if found.differences:
        notes.append(
            "difference of two arms: runs that both have in common do not count as noise, so the interval is narrower than the "
            "intervals of the two arms suggest. Where it does not contain 0, the arms differ."
        )
    single = [arm for arm in found.arms if arm.drift is None and arm.weight_decay is not None]
    if single and len({o.width for arm in found.arms for o in arm.optima}) > 1:
        where = f"{single[0].name} has one width at weight decay {single[0].weight_decay:g}, so no drift"
        notes.append(f"{where}. Weight decays have to be base values, equal at every width.")
    return "\n".join(textwrap.fill(note, 118, subsequent_indent="  ") for note in notes)


def _labels(arms: Sequence[Arm]) -> dict[Arm, str]:
    several = len({arm.weight_decay for arm in arms}) > 1
    return {arm: f"{arm.name}, wd {arm.weight_decay:g}" if several else arm.name for arm in arms}


def span(low: float, high: float) -> str:
    """Return the interval of a learning rate as text. An end that is not known is 0 or infinite."""
    if low == 0 and math.isinf(high):
        return "anything"
    if low == 0 or math.isinf(high):
        return f"below {high:.2g}" if low == 0 else f"above {low:.2g}"
    return f"{low:.2g} to {high:.2g}"


def signed_span(low: float, high: float, digits: int) -> str:
    """Return an interval as text. An end that is not known is infinite.

    Args:
        low: lower end.
        high: upper end.
        digits: digits behind the point.

    Examples:
        >>> signed_span(-0.5, 0.25, 2), signed_span(float("-inf"), 0.25, 1)
        ('-0.50 to +0.25', 'at most +0.2')
    """
    if math.isinf(low) or math.isinf(high):
        known = f"at least {low:+.{digits}f}" if math.isfinite(low) else f"at most {high:+.{digits}f}"
        return known if math.isfinite(low) or math.isfinite(high) else "not bounded"
    return f"{low:+.{digits}f} to {high:+.{digits}f}"


def regret_of(regret: Regret) -> str:
    """Return a regret with its interval as text."""
    if math.isnan(regret.low):
        return "diverged" if math.isinf(regret.regret) else "-"
    return f"{regret.regret:.3f} ({regret.low:.3f} to {regret.high:.3f})"


def regret_difference(difference: RegretDifference) -> str:
    """Return the difference of two regrets with its interval as text."""
    if math.isnan(difference.value):
        return "-"
    return f"{difference.value:+.3f} ({signed_span(difference.low, difference.high, 3)})"


def _loss(loss: float) -> str:
    return "-" if math.isnan(loss) else "diverged" if math.isinf(loss) else f"{loss:.4f}"
