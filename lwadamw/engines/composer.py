"""Composer: readings of a monitor go to the Trainer's loggers, and the monitor is part of its checkpoints.

Composer is imported when a function is called. Run with mosaicml 0.32.1, which asks for torch < 2.7.1, next to torch 2.13.0.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from ..monitor.arguments import optimizer_behind
from ..monitor.monitor import Monitor


def callback(every: int = 50, prefix: str = "", *, roles_only: bool = False, **options: Any) -> Any:
    """Return a callback for `Trainer(callbacks=[...])` of Composer that attaches a `Monitor` and logs its readings.

    Readings go to all loggers of the Trainer, at the end of the batch of their step. The monitor is part of
    Composer's checkpoints. It stays attached until the Trainer is closed, over several calls of `fit()`.

    Args:
        every: steps from one reading to the next.
        prefix: text in front of every logged name.
        roles_only: log the totals and medians of every role, and nothing of single parameters: see `Monitor.as_dict`.
        **options: further arguments of `lwadamw.Monitor`.

    Returns:
        A `composer.Callback`. Its attribute `monitor` is the `Monitor`, None before the fit.

    Raises:
        ModuleNotFoundError: Composer is not installed.
        TypeError: when a fit starts: the Trainer's optimizer is no `lwadamw.AdamW`.
    """
    return _callback_class()({"every": every, **options}, prefix, roles_only)


@functools.cache
def _callback_class() -> type[Any]:
    composer: Any = importlib.import_module("composer")

    class WidthCallback(composer.Callback):  # type: ignore[misc]
        """Logs readings. `lwadamw.engines.composer.callback` makes it."""

        def __init__(self, options: dict[str, Any], prefix: str, roles_only: bool) -> None:
            super().__init__()
            self.monitor: Monitor | None = None
            self._roles_only = roles_only
            self._options, self._prefix, self._logged = options, prefix, -1
            self._loaded: dict[str, Any] | None = None

        def fit_start(self, state: Any, logger: Any) -> None:
            if self.monitor is None:
                self.monitor = Monitor(optimizer_behind(state.optimizers[0]), **self._options)
                if self._loaded is not None:
                    self.monitor.load_state_dict(self._loaded)

        def batch_end(self, state: Any, logger: Any) -> None:
            # The reading was made inside the step. Composer counts the batch only now, and W&B drops steps that go back.
            latest = None if self.monitor is None else self.monitor.latest
            if self.monitor is not None and latest is not None and latest.step != self._logged:
                self._logged = latest.step
                logger.log_metrics(self.monitor.as_dict(self._prefix, self._roles_only))

        def close(self, state: Any, logger: Any) -> None:
            if self.monitor is not None:
                self.monitor.remove()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.monitor is None else self.monitor.state_dict()

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._loaded = state_dict or None

    return WidthCallback


__all__ = ["callback"]
