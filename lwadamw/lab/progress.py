"""Progress of a sweep: which runs are going on, how far they are, and how much time is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from .pool import Step

FIRST: Final = 60.0  # seconds without a line, after which a line says how far the runs are
LONGEST: Final = 600.0  # the pause doubles from line to line up to this one
MOST_LINES: Final = 3  # runs that such a message names


class Progress:
    """Shows how far a sweep is. On a terminal with rich, the running runs have a line each that changes in place.

    Elsewhere a run has a line when it ends. While no run ends, a few lines say how far the running runs are: the first after a
    minute, the others after pauses that become longer.

    The progress is a context manager. Lines go through `line`, so that they do not mix with what changes in place.

    Args:
        show: called with every line of text.
        costs: a number proportional to the time of each run that is to be made, by run.
        label: returns the text that names a run.
        live: whether to change lines in place.
        clock: returns the time in seconds.
    """

    def __init__(
        self,
        show: Callable[[str], None],
        costs: dict[Any, float],
        label: Callable[[Any], str],
        live: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._costs, self._label, self._clock = costs, label, clock
        self._running: dict[Any, Step] = {}
        self._ended, self._spent = 0, 0.0
        self._start = self._last = clock()
        self._pause = FIRST
        self._live = _rich_live() if live else None
        self._show = show

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update("")
            self._live.stop()

    def line(self, text: str) -> None:
        """Show a line of text.

        Args:
            text: the line.
        """
        if self._live is None:
            self._show(text)
        else:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._last = self._clock()

    def step(self, run: Any, step: Step) -> None:
        """Note how far a run is, and show it if it is time.

        Args:
            run: the run.
            step: its last step.
        """
        self._running[run] = step
        now = self._clock()
        if self._live is not None:
            self._live.update(_text("\n".join([self.rate(), *map(self._one, self._running)])), refresh=True)
        elif now - self._last >= self._pause:
            for text in self._lines():
                self.line(text)
            self._pause = min(LONGEST, 2 * self._pause)

    def ended(self, run: Any) -> None:
        """Note that a run has ended.

        Args:
            run: the run.
        """
        self._running.pop(run, None)
        self._ended += 1
        self._spent += self._costs[run]
        self._pause = FIRST

    def rate(self) -> str:
        """Return how many runs have ended, and how much time is left."""
        partly = sum(self._costs[run] * step.step / step.steps for run, step in self._running.items())
        spent, total = self._spent + partly, sum(self._costs.values())
        left = (self._clock() - self._start) * (total - spent) / spent if spent else 0.0
        return f"{self._ended}/{len(self._costs)}  {duration(left)} left"

    def _lines(self) -> Sequence[str]:
        shown = [f"{self.rate()}  {self._one(run)}" for run in list(self._running)[:MOST_LINES]]
        more = len(self._running) - len(shown)
        return [*shown, f"and {more} more are running"] if more else shown

    def _one(self, run: Any) -> str:
        step = self._running[run]
        loss = f"  loss {step.loss:.4f}" if not math.isnan(step.loss) else ""
        return f"running  {self._label(run)}  step {step.step}/{step.steps}{loss}"


def duration(seconds: float) -> str:
    """Return a time in seconds or minutes as text."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _text(lines: str) -> Any:
    from rich.text import Text

    return Text(lines, no_wrap=True, overflow="ellipsis")


def _rich_live() -> Any:
    """Return rich's display, which respects NO_COLOR and the size of the terminal. None without rich or on a dumb terminal."""
    try:
        from rich.live import Live
    except ImportError:
        return None
    live = Live(auto_refresh=False, transient=True)
    return None if live.console.is_dumb_terminal else live
