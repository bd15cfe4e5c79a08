"""Readings in the names and by the calls of experiment trackers. None of them is imported here.

Names are those of `Monitor.as_dict()`, which is for anything else: `{prefix}{statistic}/{parameter}`, and for medians
`{prefix}role/{role}/{statistic}`. W&B makes a section of panels, TensorBoard a group of charts, of what stands before a '/', so
that one statistic of all layers is seen together.
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
    """What `torch.utils.tensorboard.SummaryWriter` and its like have."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...


class DictLogger(Protocol):
    """What the run that `wandb.init()` returns has."""

    def log(self, data: dict[str, Any], step: int) -> Any: ...


class TensorBoardLogger:
    """Writes every reading with `add_scalar`: `monitor.on_reading.append(TensorBoardLogger(SummaryWriter()))`."""

    def __init__(self, writer: ScalarWriter, prefix: str = "") -> None:
        self.writer = writer
        self.prefix = prefix

    def __call__(self, reading: Reading) -> None:
        for tag, value in as_dict(reading, self.prefix).items():
            self.writer.add_scalar(tag, value, reading.step)


class WandbLogger:
    """Logs every reading with `run.log(dict, step=)`: `monitor.on_reading.append(WandbLogger(wandb.init()))`.

    The step is the optimizer's. W&B drops what comes with a step smaller than its present one, so log the loss with the
    optimizer's step too, or under a metric of its own (`run.define_metric`).
    """

    def __init__(self, run: DictLogger, prefix: str = "") -> None:
        self.run = run
        self.prefix = prefix

    def __call__(self, reading: Reading) -> None:
        self.run.log(as_dict(reading, self.prefix), step=reading.step)


class LightningHooks:
    """The hook with which a Lightning callback logs readings, each once, by `pl_module.log_dict`.

    `log_dict` works within Lightning's hooks only, and a reading is made inside the optimizer's step, so it is logged when the
    batch has ended. Names are those of Lightning's own `grad_norm`: `{statistic}/{parameter}`. Lightning asks for a callback
    of its class, so mix the two:

        class LogReadings(lwadamw.loggers.LightningHooks, lightning.pytorch.Callback): ...
        trainer = Trainer(callbacks=[LogReadings(monitor)])
    """

    def __init__(self, monitor: Monitor, prefix: str = "") -> None:
        super().__init__()
        self.monitor = monitor
        self.prefix = prefix
        self._logged: Reading | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        reading = self.monitor.latest
        if reading is not None and reading is not self._logged:
            self._logged = reading
            pl_module.log_dict(as_dict(reading, self.prefix), on_step=True, on_epoch=False)


def report_to_composer(optimizer: AdamW) -> Callable[[], None]:
    """Give the optimizer the `report_per_parameter_metrics` that Composer's `OptimizerMonitor` looks for.

    OptimizerMonitor calls report_per_parameter_metrics(p, name, metrics) of `state.optimizers[0]` at the end of a batch, for
    every parameter with a gradient, and itself computes `l2_norm/grad/{name}` where it is missing after that. It gets, under
    the names that Composer's DecoupledAdamW uses, `l2_norm/param`, `l2_norm/update`, `l2_norm/grad` and
    `l2_norm_ratio/update_param`: the update with its weight decay, the gradient clipped. Norms are read once for all
    parameters. They are whole under DDP; under FSDP, where `norms()` refuses shards, so does this.

    Returns:
        A function that takes it off again.
    """
    of: dict[int, dict[str, float]] = {}  # parameter -> metric -> value

    def read() -> None:
        norms = optimizer.norms()
        rows = {name: i for i, name in enumerate(norms.names)}
        of.clear()
        for member in members_of(optimizer.param_groups):
            # The norm of a weight is that of its parts' norms.
            index = [rows[name] for name in dict.fromkeys((member.name, *member.segment_names())) if name in rows]
            columns = {"param": norms.weight, "update": norms.update, "grad": norms.grad}
            values = {f"l2_norm/{kind}": float(np.linalg.norm(column[index])) for kind, column in columns.items()}
            if values["l2_norm/param"] > 0:
                values["l2_norm_ratio/update_param"] = values["l2_norm/update"] / values["l2_norm/param"]
            of[id(member.param)] = {key: value for key, value in values.items() if index and not math.isnan(value)}

    def report_per_parameter_metrics(p: Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        if not optimizer_metrics:  # the first parameter of a batch
            read()
        optimizer_metrics.update({f"{metric}/{name}": value for metric, value in of.get(id(p), {}).items()})
        return optimizer_metrics

    optimizer.report_per_parameter_metrics = report_per_parameter_metrics  # type: ignore[attr-defined]

    def remove() -> None:
        del optimizer.report_per_parameter_metrics  # type: ignore[attr-defined]

    return remove
