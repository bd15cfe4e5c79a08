"""Composer: readings of a monitor go to the Trainer's loggers, and the monitor is part of its checkpoints.

Composer is imported when a function is called. Run with mosaicml 0.32.1, which asks for torch < 2.7.1, next to torch 2.13.0.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from .callbacks import Watching


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

    class WidthCallback(Watching, composer.Callback):  # type: ignore[misc]
        """Logs readings. `lwadamw.engines.composer.callback` makes it."""

        def fit_start(self, state: Any, logger: Any) -> None:
            if self.monitor is None:
                self.attach(state.optimizers[0])

        def batch_end(self, state: Any, logger: Any) -> None:
            # The reading was made inside the step. Composer counts the batch only now, and W&B drops steps that go back.
            if values := self.unlogged():
                logger.log_metrics(values)

        def close(self, state: Any, logger: Any) -> None:
            self.detach()

    return WidthCallback


__all__ = ["callback"]
