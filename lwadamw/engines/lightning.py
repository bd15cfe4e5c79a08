"""Lightning and Fabric: gradients are clipped inside the step, and norms are logged with the module's other values.

Lightning is imported when a function is called. Run with lightning 2.6.6.

Lightning refuses `gradient_clip_val` in mixed precision for an optimizer that leaves unscaling to its step, as torch's
fused AdamW and this one on a GPU. The callback moves the clipping into the step: same result, one pass over the gradients less.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

from ..monitor.arguments import optimizer_behind
from ..step.optimizer import AdamW
from .callbacks import Watching


def callback(every: int = 50, prefix: str = "", *, roles_only: bool = False, **options: Any) -> Any:
    """Return a callback for `Trainer(callbacks=[...])` of Lightning.

    When a fit starts, it does two things for the `lwadamw.AdamW` of the module. It takes `gradient_clip_val` of the trainer as
    `max_grad_norm` of the optimizer, if the algorithm is "norm" and this is the only optimizer. And it attaches a `Monitor`,
    whose readings go to the trainer's loggers. The monitor is part of Lightning's checkpoints.

    Args:
        every: steps from one reading to the next.
        prefix: text in front of every logged name.
        roles_only: log the totals and medians of every role, and nothing of single parameters: see `Monitor.as_dict`.
        **options: further arguments of `lwadamw.Monitor`. Other optimizers of the module are watched too.

    Returns:
        A `lightning.pytorch.Callback`, or one of pytorch_lightning if lightning is not installed. Its attribute `monitor` is
        the `Monitor`, None before the fit.

    Raises:
        ModuleNotFoundError: neither lightning nor pytorch_lightning is installed.
        TypeError: when a fit starts: the module has no `lwadamw.AdamW`, or two.
    """
    return _callback_class()({"every": every, **options}, prefix, roles_only)


def clip_gradients(optimizer: Any, max_norm: float) -> Any:
    """Clip the gradients of the next step, in place of `fabric.clip_gradients(model, optimizer, max_norm=...)`.

    Args:
        optimizer: what `fabric.setup` returned.
        max_norm: the largest norm, positive.

    Returns:
        The global norm of the gradients, float32[] on the device. In true fp16 it is the norm of scaled gradients: set
        `optimizer.max_grad_norm` there, which works on unscaled ones.
    """
    return optimizer_behind(optimizer).clip_grad_norm_(max_norm)


@functools.cache
def _callback_class() -> type[Any]:
    try:
        lightning: Any = importlib.import_module("lightning.pytorch")
    except ModuleNotFoundError:
        lightning = importlib.import_module("pytorch_lightning")

    class WidthCallback(Watching, lightning.Callback):  # type: ignore[misc]
        """Clips inside the step and logs readings. `lwadamw.engines.lightning.callback` makes it."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            ours, others = _split(trainer.optimizers)
            if (
                trainer.gradient_clip_val
                and str(trainer.gradient_clip_algorithm or "norm").endswith("norm")
                and not others
            ):
                ours.max_grad_norm, trainer.gradient_clip_val = float(trainer.gradient_clip_val), None
            self.attach(ours, others=others).on_reading.append(lambda _: self._log(trainer))

        def _log(self, trainer: Any) -> None:
            if self.monitor is not None and (values := self.unlogged()):
                for logger in trainer.loggers:
                    logger.log_metrics(values, step=self.monitor.step)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.detach()

    return WidthCallback


def _split(optimizers: Iterable[Any]) -> tuple[AdamW, list[Any]]:
    """Return our optimizer and the others."""
    behind = [optimizer_behind(optimizer) for optimizer in optimizers]
    ours = [optimizer for optimizer in behind if isinstance(optimizer, AdamW)]
    if len(ours) != 1:
        raise TypeError(
            f"lightning.callback: the module has {len(ours)} optimizers that are an lwadamw.AdamW, and {len(behind)} in all. "
            "Let configure_optimizers return exactly one, with all groups of lwadamw.param_groups."
        )
    return ours[0], [optimizer for optimizer in behind if optimizer is not ours[0]]
