"""The report of a comparison of widths: a table, a sentence about the rule, and a figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from lwadamw.monitor.text import aligned
from lwadamw.state.arrays import Array
from lwadamw.width.steady_state import STEADY_TAUS

from .training import Run

LAB_HINT: Final = 'pip install "lwadamw[lab]"'


def _late(run: Run, name: str) -> Array:
    """Return the mean of a field of the records over the last tenth of the steps taken."""
    since = 0.9 * run.steps_done
    mean: Array = np.mean([getattr(r, name) for r in run.records if r.step > since], axis=0)
    return mean


def _loss(nats: float) -> str:
    return f"{nats:.3f} ({nats / math.log(2):.3f})"


def _spread(values: Array) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


def _steady_word(run: Run) -> str:
    step = math.ceil(run.steady_step)
    if step > run.settings.steps:
        return f"never in this run: needs {step} steps"
    return f"steady from step {step}" if run.steps_done >= step else f"not before step {step}"


def closing(runs: Sequence[Run]) -> str:
    """Return the closing table, with one column per width, and the sentence from `across` if there are two widths.

    Args:
        runs: one run per width, each with at least one record and evaluated.
    """
    if not runs:
        return "no step was recorded, so there is nothing to compare"
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("", lambda r: f"width {r.width}, m = {r.m:g}"),
        ("effective lr, weight decay of matrices", lambda r: f"{r.steady.lr:.3g}, {r.steady.weight_decay:.3g}"),
        ("training loss, nats (bits/byte) *", lambda r: _loss(float(_late(r, "loss")))),
        ("validation loss, nats (bits/byte)", lambda r: _loss(r.validation)),
        ("weight RMS / sqrt(lr/2wd) *", lambda r: _spread(_late(r, "ratio"))),
        ("relative update / sqrt(2 lr wd (1-b1)/(1+b1)) *", lambda r: _spread(_late(r, "update_ratio"))),
        ("top singular value", lambda r: _spread(r.top)),
        ("tau = 1/(lr wd)", lambda r: f"{r.steady.tau:.0f} steps = {r.steady.tau / r.settings.steps:.2g} run"),
        (f"steady, after {STEADY_TAUS} tau and the warm-up", _steady_word),
        ("steps taken", lambda r: f"{r.steps_done} of {r.settings.steps} in {r.records[-1].seconds:.0f} s"),
    ]
    cells = [[label, *(cell(r) for r in runs)] for label, cell in rows]
    notes = [
        "* mean over the last tenth of the steps. Over the matrices: median (smallest to largest). Both ratios are 1",
        f"  where gradients are noise. After {STEADY_TAUS} tau a matrix keeps 5 % of its initial weights.",
    ]
    return "\n".join([*aligned(cells), *notes, *([across(runs)] if len(runs) > 1 else [])])


def across(runs: Sequence[Run]) -> str:
    """Return a sentence on the change from the first to the last width: what the rule predicts, and what was seen.

    Args:
        runs: at least two runs, the proxy first.
    """
    proxy, target = runs[0], runs[-1]
    scale = target.rule.matrix
    a, b, m = scale.lr, scale.wd or 0.0, target.width / proxy.width
    # Fan et al. 2510.15262 observed that the top singular value grows as sqrt(lr/wd) width^(3/4). The relative update is
    # proportional to sqrt(lr wd) where gradients are noise.
    quantities = (
        ("the top singular value", (a - b) / 2 + 0.75, target.top / proxy.top),
        ("the relative update", (a + b) / 2, _relative_update(target) / _relative_update(proxy)),
    )
    parts = [
        f"{name} to {'be equal' if exponent == 0 else f'change by x{m**exponent:.2f}'}, seen x{_spread(seen)}"
        for name, exponent, seen in quantities
    ]
    late = [f"width {r.width}" for r in runs if r.steps_done < r.steady_step]
    doubt = f" It says little: {' and '.join(late)} not steady yet." if late else ""
    sentence = (
        f"From width {proxy.width} to {target.width} the rule {target.rule.name} predicts {'; '.join(parts)}.{doubt}"
    )
    return textwrap.fill(sentence, 118)


def _relative_update(run: Run) -> Array:
    return _late(run, "update_ratio") * run.steady.relative_update


def draw(runs: Sequence[Run], out: Path) -> str:
    """Draw the loss and the weights against the step, and write the figure as PNG.

    Args:
        runs: one run per width, each with at least one record.
        out: path of the file.

    Returns:
        One line that says where the figure is, or that matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator
    except ImportError:
        return f"no figure without matplotlib: {LAB_HINT}"
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        color, name = f"C{i}", f"width {run.width}"
        steps = [r.step for r in run.records]
        ratio = np.array([r.ratio for r in run.records])
        values = f"lr {run.steady.lr:.3g}, weight decay {run.steady.weight_decay:.3g}"
        left.plot(steps, [r.loss for r in run.records], color=color, label=f"{name}: {values}")
        right.plot(steps, np.median(ratio, axis=1), color=color, label=f"{name}: median and range of its matrices")
        right.fill_between(steps, ratio.min(axis=1), ratio.max(axis=1), color=color, alpha=0.15, linewidth=0)
        right.axvline(run.steady.tau, color=color, linestyle=":", label=f"{name}: tau = {run.steady.tau:.0f} steps")
    right.axhline(1, color="black", linewidth=0.8, label="steady state of noise gradients")
    title = f"Same base values, rule {runs[0].rule.name}"
    left.set(title=title, xlabel="step", ylabel="training loss, nats per byte")
    right.set(title="Weights against their steady state", xlabel="step", ylabel="weight RMS / sqrt(lr/2wd)")
    right.set_yscale("log")
    right.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_locator(NullLocator())
    for axes in (left, right):
        axes.set_xlim(0, max(r.steps_done for r in runs))
        axes.legend(loc="upper right", edgecolor="none", framealpha=0.8, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, format="png", dpi=150)
    return f"figure: {out}"
