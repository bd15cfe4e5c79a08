"""What the project wants of a GPU: each goal, what a run of bench.gpu_bench measured, and whether the goal is met."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from bench import peers

OURS, OFF, CLIPPED, USUAL = "lwadamw", "lwadamw, norms off", "lwadamw, clipping, norms read", peers.PEERS["usual"][0]
LARGE = ("llama_1b", "one_huge")
REGROUPED = ("llama_1b", "vit_465")  # of these, every number of groups is compared with the smallest one
CODED = ("fp32, 8-bit moments", "bf16, remainder, 8-bit moments", "bf16, stochastic, 8-bit moments")


class Goal(NamedTuple):
    """A goal.

    Attributes:
        text: the goal in words.
        measured: what was measured, by what it was measured on. Empty if nothing was.
        met: whether a value meets the goal.
        show: how a value is printed.
    """

    text: str
    measured: dict[str, float]
    met: Callable[[float], bool]
    show: str = "{:.2f}x"

    def line(self) -> str:
        """The goal, what was measured and whether it is met, as one line."""
        values = ", ".join(f"{name} {self.show.format(value)}" for name, value in self.measured.items())
        verdict = "met" if all(map(self.met, self.measured.values())) else "MISSED"
        return f"{verdict if self.measured else 'not measured'}: {self.text}{': ' if values else ''}{values}"


def _ms(row: Mapping[str, Any]) -> float:
    return float(row["ms"]["p50"])


def goals(record: Mapping[str, Any]) -> list[Goal]:
    """All goals, with what a record of bench.gpu_bench says about them.

    Args:
        record: the record, complete or not.
    """
    steps = {(r["workload"], r["groups"]): r["rows"] for r in record.get("step") or ()}
    fewest = {w: min(n for name, n in steps if name == w) for w, _ in steps}
    large = {w: steps[w, fewest[w]] for w in LARGE if w in fewest}
    regrouped = {
        f"{w} in {n}": _ms(rows[OURS]) / _ms(steps[w, fewest[w]][OURS]) - 1
        for (w, n), rows in steps.items()
        if w in REGROUPED and n != fewest[w]
    }
    norms = {
        f"{w} in {n}": _ms(rows[OURS]) / _ms(rows[OFF]) - 1
        for (w, n), rows in steps.items()
        if w in (*LARGE, *REGROUPED) and OFF in rows
    }
    usual = {w: _ms(rows[USUAL]) / _ms(rows[CLIPPED]) for w, rows in large.items() if USUAL in rows and CLIPPED in rows}
    stored = {r["storage"]: _ms(r["rows"][OURS]) for r in record.get("storage") or () if r["storage"] in CODED}
    fp32 = _ms(large["llama_1b"][OURS]) if "llama_1b" in large else None
    coded = {name: fp32 / ms for name, ms in stored.items()} if fp32 else {}
    share, fused = ({w: rows[OURS][key] for w, rows in large.items()} for key in ("of_copy", "vs_fused"))
    return [
        Goal("at least 92 % of a copy", share, lambda x: x >= 0.92, "{:.1%}"),
        Goal("at least 1.10x torch fused", fused, lambda x: x >= 1.10),
        Goal("regrouping changes the time by at most 3 %", regrouped, lambda x: abs(x) <= 0.03, "{:+.1%}"),
        Goal("norms cost at most 2 %", norms, lambda x: x <= 0.02, "{:+.1%}"),
        Goal("clip, step and norms at least 1.8x the usual way", usual, lambda x: x >= 1.8),
        Goal("8-bit moments at least 1.5x the speed of fp32", coded, lambda x: x >= 1.5),
    ]
