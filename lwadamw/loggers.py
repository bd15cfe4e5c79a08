"""Loggers: they pass a monitor's readings on to experiment trackers, under the names and by the calls that each expects.

No tracker is imported here. For a tracker without a logger, use the dict of `Monitor.as_dict()`.

A value has the name `{prefix}{statistic}/{parameter}`, and the median over a role has `{prefix}role/{role}/{statistic}`. W&B
shows names with the same text before the '/' in one section, and TensorBoard in one group. So one statistic of all layers is
seen together.

If parameters are split over processes, all of them have the same readings. `TensorBoardLogger` and `WandbLogger` then write on
one process only, the one with `reading.writes`. A function of your own can ask the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from .monitor.reading import Reading
from .monitor.report import as_dict
from .state.members import members_of

if TYPE_CHECKING:
    from .monitor.monitor import Monitor
    from .step.optimizer import AdamW


class ScalarWriter(Protocol):
    """A writer with the method `add_scalar`, for example `torch.utils.tensorboard.SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one value."""


class DictLogger(Protocol):
    """A run with the method `log`, for example the run that `wandb.init()` returns."""

    def log(self, data: dict[str, Any], step: int) -> Any:
        """Log the values of one step."""


class TensorBoardLogger:
    """Writes every reading with `writer.add_scalar(tag, value, step)`, where step is the step of the optimizer.

    Args:
        writer: a `SummaryWriter`, or another object with `add_scalar`.
        prefix: text in front of every name.
        roles_only: log totals and medians of roles, and nothing of single parameters: see `Monitor.as_dict`.

    Examples:
        ```python
        monitor.on_reading.append(TensorBoardLogger(SummaryWriter()))
        ```
    """

    def __init__(self, writer: ScalarWriter, prefix: str = "", *, roles_only: bool = False) -> None:
        self.writer = writer
        self.prefix = prefix
        self.roles_only = roles_only

    def __call__(self, reading: Reading) -> None:
        """Write one reading."""
        if not reading.writes:
            return
        for tag, value in as_dict(reading, self.prefix, self.roles_only).items():
            self.writer.add_scalar(tag, value, reading.step)


class WandbLogger:
    """Logs every reading with `run.log(values, step=step)`, where step is the step of the optimizer.

    W&B drops values whose step is smaller than a step that it has already seen. So log the loss with the step of the optimizer
    too, or give the loss a step metric of its own with `run.define_metric`.

    Args:
        run: what `wandb.init()` returns, or another object with `log`.
        prefix: text in front of every name.
        roles_only: log totals and medians of roles, and nothing of single parameters: see `Monitor.as_dict`.

    Examples:
        ```python
        monitor.on_reading.append(WandbLogger(wandb.init()))
        ```
    """

    def __init__(self, run: DictLogger, prefix: str = "", *, roles_only: bool = False) -> None:
        self.run = run
        self.prefix = prefix
        self.roles_only = roles_only

    def __call__(self, reading: Reading) -> None:
        """Log one reading."""
        if reading.writes:
            self.run.log(as_dict(reading, self.prefix, self.roles_only), step=reading.step)


class LightningHooks:
    """A mix-in that makes a Lightning callback log every reading once, with `pl_module.log_dict`.

    A reading is made inside the step of the optimizer, but `log_dict` works only inside Lightning's hooks. So a reading is
    logged when its batch has ended. The names have the form of Lightning's own `grad_norm`: `{statistic}/{parameter}`.

    Lightning accepts only callbacks of its own class, and this module does not import Lightning. So derive your callback from
    both classes.

    Args:
        monitor: the monitor whose readings are logged.
        prefix: text in front of every name.
        roles_only: log totals and medians of roles, and nothing of single parameters: see `Monitor.as_dict`.

    Examples:
        ```python
        class LogReadings(lwadamw.loggers.LightningHooks, lightning.pytorch.Callback): ...
        trainer = Trainer(callbacks=[LogReadings(monitor)])
        ```
    """

    def __init__(self, monitor: Monitor, prefix: str = "", *, roles_only: bool = False) -> None:
        super().__init__()
        self.monitor = monitor
        self.prefix = prefix
        self.roles_only = roles_only
        self._logged: Reading | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the latest reading if it has not been logged yet. Lightning calls this hook."""
        reading = self.monitor.latest
        if reading is not None and reading is not self._logged:
            self._logged = reading
            pl_module.log_dict(as_dict(reading, self.prefix, self.roles_only), on_step=True, on_epoch=False)


def report_to_composer(optimizer: AdamW) -> Callable[[], None]:
    """Give the optimizer the method `report_per_parameter_metrics` that Composer's `OptimizerMonitor` looks for.

    At the end of a batch, OptimizerMonitor calls `report_per_parameter_metrics(p, name, metrics)` of `state.optimizers[0]` for
    every parameter with a gradient. If `l2_norm/grad/{name}` is still missing then, OptimizerMonitor computes it itself.

    The metrics have the names that Composer's DecoupledAdamW uses:

        l2_norm/param/{name}                  norm of the weight after the step
        l2_norm/update/{name}                 norm of the update, with the weight decay
        l2_norm/grad/{name}                   norm of the clipped gradient
        l2_norm_ratio/update_param/{name}     the second divided by the first

    A metric that is not known (NaN) is left out. The norms of all parameters are read together, once per batch. They
    are norms of whole parameters, also under fully_shard. Then the call is collective: every process has to log.

    Args:
        optimizer: the optimizer that gets the method.

    Returns:
        A function that removes the method again.
    """
    of: dict[int, dict[str, float]] = {}  # id of a parameter -> metric -> value

    def read() -> None:
        norms = optimizer.norms()
        rows = {name: i for i, name in enumerate(norms.names)}
        of.clear()
        for member in members_of(optimizer.param_groups):
            # The squares of the norms of segments add up to the square of the norm of the whole parameter.
            index = [rows[name] for name in dict.fromkeys((member.name, *member.segment_names())) if name in rows]
            columns = {"param": norms.weight, "update": norms.update, "grad": norms.grad}
            values = {f"l2_norm/{kind}": float(np.linalg.norm(column[index])) for kind, column in columns.items()}
            if values["l2_norm/param"] > 0:
                values["l2_norm_ratio/update_param"] = values["l2_norm/update"] / values["l2_norm/param"]
            of[id(member.param)] = {key: value for key, value in values.items() if index and not math.isnan(value)}

    def report_per_parameter_metrics(p: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        if not optimizer_metrics:  # OptimizerMonitor starts every batch with an empty dict.
            read()
        optimizer_metrics.update({f"{metric}/{name}": value for metric, value in of.get(id(p), {}).items()})
        return optimizer_metrics

    optimizer.report_per_parameter_metrics = report_per_parameter_metrics  # type: ignore[attr-defined]

    def remove() -> None:
        del optimizer.report_per_parameter_metrics  # type: ignore[attr-defined]

    return remove
