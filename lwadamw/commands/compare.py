"""`python -m lwadamw compare`: what grew or shrank from a proxy to a target, and whether the width rule predicts it."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..monitor.text import aligned
from .arguments import refuse

if TYPE_CHECKING:
    from ..monitor.comparison import Comparison, Finding
    from ..monitor.profile import Profile

_HEADER = ("role", "layers", "statistic", "proxy", "target", "ratio", "predicted", "off by", "")
_RIGHT = range(3, 8)  # The columns with numbers are aligned right.
TOLERANCE = 1.35  # the COMPARE_TOLERANCE of the monitor, which needs numpy, and --help does not
MOST_NAMED = 5  # at most so many layers are named in the line about weights that are not finite


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the arguments of the command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="compare the profiles of two runs with the prediction from their learning rates and weight decays",
        description="Say in one line whether a run held what its width rule claims to hold equal at every width. Then print, "
        "for each role and type of layer, what grew and what shrank from one run to another, and whether the effective "
        "learning rates and weight decays predict the change. Monitor.save() writes the profiles. The exit code is 1 if "
        "weights are not finite, if the rule did not hold what it claims, or if a statistic is outside the tolerance. "
        "Otherwise it is 0. A statistic that is too early to be judged does not count.",
    )
    option = parser.add_argument
    option(
        "profiles",
        nargs="+",
        type=Path,
        metavar="profile.json",
        help="the profile of the proxy, then that of the target. With several proxies, for instance two seeds, the spread "
        "between them calibrates the tolerance; the target is the last one",
    )
    option(
        "--tolerance",
        type=float,
        metavar="X",
        default=TOLERANCE,
        help="factor by which the median of the ratios may be off, either way (default: %(default)s, or more if the proxies "
        "differ by more)",
    )
    option(
        "--statistic",
        action="append",
        metavar="NAME",
        help="compare only this statistic, also if it has no prediction; may be given several times",
    )
    option("--full", action="store_true", help="judge and print every layer, and statistics without a prediction")
    parser.set_defaults(command=lambda args: run(parser, args))


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run the command. Bad arguments end the program with exit code 2."""
    from ..monitor.comparison import compare
    from ..monitor.profile_file import load

    if len(args.profiles) < 2:
        parser.error(f"one profile, {str(args.profiles[0])!r}, has nothing to be compared with. Give the target's too.")
    try:
        *proxies, target = map(load, args.profiles)
        found = compare(
            proxies,
            target,
            args.tolerance,
            statistics=args.statistic,
            by_layer=args.full,
        )
    except (OSError, ValueError) as error:
        refuse(parser, error)
    keep_all = args.full or args.statistic
    rows = [row for row in found.findings if keep_all or row.verdict != "no prediction"]
    first = _broken(found.broken) if found.broken else found.claim.sentence
    print("\n".join([first, *_titles(proxies, target), *_table(rows), *_summary(found)]))
    if found.unmatched:
        print(f"only in one of the runs: {', '.join(found.unmatched)}", file=sys.stderr)
    return 1 if found.failed else 0


def _broken(findings: Sequence[Finding]) -> str:
    names = [row.layers for row in findings]
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"not finite: some weights are NaN or infinite in {', '.join(names[:MOST_NAMED])}{more}"


def _titles(proxies: Sequence[Profile], target: Profile) -> list[str]:
    return [
        f"{name:<6}  rule {p.rule}   base {', '.join(f'{k} {_base_value(k, v)}' for k, v in p.base.items())}   "
        f"steps {p.window[0]} to {p.window[1]} of {p.steps}" + "".join(f"   {k} {v}" for k, v in p.meta.items())
        for name, p in [*(("proxy", proxy) for proxy in proxies), ("target", target)]
    ]


def _base_value(key: str, value: object) -> str:
    """Return a base value as text. Older profiles hold the lr at the end of the run, which may be 0."""
    return "decayed to 0" if key == "lr" and value == 0 else str(value)


def _summary(found: Comparison) -> list[str]:
    counts: dict[str, int] = {}
    for row in found.findings:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
    judged = sum(n for verdict, n in counts.items() if verdict not in ("too early", "no prediction"))
    text = ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) or "no statistic is in both runs"
    return [f"{found.calibration}: {text}" + ("" if judged else "; nothing could be judged")]


def _table(rows: Sequence[Finding]) -> list[str]:
    cells = [_HEADER, *(_cells(row) for row in rows)]
    return aligned(cells, _RIGHT)


def _cells(row: Finding) -> tuple[str, ...]:
    numbers = (row.proxy, row.target, row.ratio, row.predicted, row.off)
    shown = tuple("-" if math.isnan(x) else f"{x:.3g}" for x in numbers)
    return (row.role, row.layers, row.statistic, *shown, row.verdict)
