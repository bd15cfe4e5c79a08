"""One run of the transfer study: the laboratory's language model under one arm, at one width, lr, weight decay and seed."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from lwadamw import Monitor

from .arms import arm_rule
from .data import Corpus, from_file, standard_library, windows
from .model import FFN_RATIO
from .pool import Alive
from .training import Run, Settings

STANDARD_LIBRARY: Final = "standard library"
# Columns with the result of a run.
RESULT: Final = (
    "status",  # "diverged" if the training loss was not finite or the final loss is worse than a uniform guess, else "done"
    "loss",  # validation loss in nats per byte; NaN if the run diverged
    "train_loss",  # mean over the last tenth of the records
    "steps_done",
    "effective_lr",  # effective lr of the matrices
    "effective_wd",  # effective weight decay of the matrices
    "taus",  # sum of lr wd of the matrices over the steps
    # The next five columns are medians over the matrices at the step at which the learning rate begins to fall.
    "rms_ratio",  # weight RMS over sqrt(lr/2wd)
    "relative_update",
    "top",
    "second",
    "median_singular",
    "parameters",
    "tokens",
)

# Columns of a run that is watched: each line is the median of one statistic over the matrices at one step.
SERIES: Final = ("step", "name", "statistic", "value")
WATCHED: Final = ("gain", "alignment_ratio", "weight_alignment", "relative_update", "rms_ratio", "top")
READINGS: Final = 30
# Fields that `Training` and `Settings` share.
SHARED: Final = ("base_width", "depth", "context", "batch", "steps", "cooldown", "lr", "weight_decay", "seed")


@dataclass(frozen=True, slots=True)
class Training:
    """The full setting of one run. The fields are the columns that identify the run in a CSV file.

    Args:
        arm: a rule or exponents; see `arm_rule`.
        lr_exponent: exponent of the lr of matrices.
        wd_exponent: exponent of the weight decay of matrices.
        width: width of the model.
        lr: base value of the learning rate.
        weight_decay: base value of the weight decay.
        seed: seed of the initial weights and of the batches.
        base_width: width of the proxy.
        depth: number of blocks.
        context: bytes per window.
        batch: windows per step.
        steps: length of the run.
        cooldown: share of the steps, at the end, in which the learning rate falls to 0.
        data: STANDARD_LIBRARY, or the path of a file.
    """

    arm: str
    lr_exponent: float
    wd_exponent: float
    width: int
    lr: float
    weight_decay: float
    seed: int
    base_width: int
    depth: int
    context: int
    batch: int
    steps: int
    cooldown: float
    data: str = STANDARD_LIBRARY

    @classmethod
    def of(cls, arm: str, width: int, settings: Settings, data: str = STANDARD_LIBRARY) -> Training:
        """Build the setting of a run under an arm.

        Args:
            arm: a rule or exponents; see `arm_rule`.
            width: width of the model.
            settings: what all widths have in common. Its rule is replaced by the rule of the arm.
            data: STANDARD_LIBRARY, or the path of a file.

        Raises:
            ValueError: the arm is neither a rule nor exponents.
        """
        scale = arm_rule(arm).matrix
        given = {name: getattr(settings, name) for name in SHARED}
        return cls(arm, scale.lr, scale.wd or 0.0, width, data=data, **given)

    def shared(self) -> Training:
        """Return a setting that is equal for all arms at the proxy's width, where all rules give the same values."""
        return replace(self, arm="", lr_exponent=0.0, wd_exponent=0.0) if self.width == self.base_width else self

    @property
    def settings(self) -> Settings:
        """The settings for `Run`, with the rule of the arm."""
        return Settings(rule=arm_rule(self.arm), **{name: getattr(self, name) for name in SHARED})

    @property
    def _matrix_elements(self) -> int:
        return self.depth * (4 + 3 * FFN_RATIO) * self.width**2

    @property
    def cost(self) -> float:
        """A number proportional to the time of the run."""
        # The second term stands for everything but matrix products. It was fitted to runs on a CPU at widths 64 to 256.
        return self.steps * self.batch * self.context * (self._matrix_elements + 2000.0 * self.depth * self.width)

    @property
    def memory(self) -> int:
        """Memory of a GPU that the run needs, in bytes."""
        activations = self.batch * self.context * (self.depth * (12 + 4 * FFN_RATIO) * self.width + 4 * 256)
        return 20 * (self._matrix_elements + 512 * self.width) + 4 * activations


def train(task: Training, device: torch.device, alive: Alive) -> dict[str, Any]:
    """Run one training.

    Args:
        task: the setting of the run.
        device: where to train.
        alive: called at every record; see `pool.run_all`.

    Returns:
        The columns in `RESULT`, and "seconds".
    """
    start = time.perf_counter()
    run = Run(task.settings, task.width, _corpus(task.data), device)
    seen: dict[str, float] = {}
    losses: list[float] = []
    for record in run.train():
        alive(record.step, task.steps, record.loss)
        losses.append(record.loss)
        if not math.isfinite(record.loss):
            break
        if not seen and record.step >= run.settings.steady_steps:
            seen = _spectra(run)
            seen["rms_ratio"] = float(np.median(record.ratio))
            seen["relative_update"] = float(np.median(record.update_ratio)) * run.steady.relative_update
    loss = math.nan
    if math.isfinite(losses[-1]):
        run.evaluate(spectra=False)
        loss = run.validation
    diverged = not loss < math.log(run.model.config.vocab)
    last = max(1, round(0.1 * len(losses)))
    s = run.settings
    return {
        "status": "diverged" if diverged else "done",
        "loss": math.nan if diverged else loss,
        "train_loss": float(np.mean(losses[-last:])),
        "steps_done": run.steps_done,
        "effective_lr": run.steady.lr,
        "effective_wd": run.steady.weight_decay,
        "taus": sum(map(s.factor, range(run.steps_done))) / run.steady.tau,
        **seen,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "tokens": run.steps_done * s.batch * s.context,
        "seconds": round(time.perf_counter() - start, 2),
    }


def watch(task: Training, device: torch.device, alive: Alive) -> list[dict[str, Any]]:
    """Run one training with a `Monitor` on it.

    Args:
        task: the setting of the run.
        device: where to train.
        alive: called at every record; see `pool.run_all`.

    Returns:
        Lines with the columns in `SERIES`.
    """
    run = Run(task.settings, task.width, _corpus(task.data), device)
    probe = windows(run.corpus.validation, 8, task.context)[:, :-1].to(device)
    every = max(1, task.steps // READINGS)
    monitor = Monitor(run.optimizer, run.model, every=every, spectrum_every=every, probe=probe, history=task.steps)
    for record in run.train():
        alive(record.step, task.steps, record.loss)
    rows = []
    for reading in monitor.readings:
        matrices = np.array([role == "matrix" for role in reading.roles])
        for statistic in WATCHED:
            values = reading.columns[statistic][matrices]
            if np.isfinite(values).any():
                rows.append({"step": reading.step, "statistic": statistic, "value": float(np.nanmedian(values))})
    return [{"name": "median of the matrices", **row} for row in rows]


def _spectra(run: Run) -> dict[str, float]:
    values = [torch.linalg.svdvals(p.detach().float()).cpu().double().numpy() for p in run.matrices.values()]
    middle = {"top": [v[0] for v in values], "second": [v[1] for v in values]}
    middle["median_singular"] = [np.median(v) for v in values]
    return {name: float(np.median(v)) for name, v in middle.items()}


@lru_cache(maxsize=1)
def _corpus(data: str) -> Corpus:
    return standard_library() if data == STANDARD_LIBRARY else from_file(data)
