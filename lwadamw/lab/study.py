"""One run of the transfer study: the laboratory's language model under one arm, at one width, lr, decay and seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch

from lwadamw import Monitor
from lwadamw.width.rules import RULES, Rule, Scale, get_rule

from .data import Corpus, from_file, standard_library, windows
from .model import FFN_RATIO
from .training import Run, Settings

STANDARD_LIBRARY: Final = "standard library"
RESULT: Final = (
    "status",  # "done", or "diverged": the training loss was not finite, or the end worse than a uniform guess
    "loss",  # validation, nats per byte; NaN if diverged
    "train_loss",  # mean over the last records that make up a tenth of the run
    "steps_done",
    "effective_lr",  # of matrices
    "effective_wd",
    "taus",  # sum of lr wd over the steps, of matrices
    # Medians over the matrices when the learning rate begins to fall; the rms over sqrt(lr/2wd).
    "rms_ratio",
    "relative_update",
    "top",
    "second",
    "median_singular",
    "parameters",
    "tokens",
)

# Against step, medians over the matrices.
SERIES: Final = ("step", "name", "statistic", "value")
WATCHED: Final = ("gain", "alignment_ratio", "weight_alignment", "relative_update", "rms_ratio", "top")
READINGS: Final = 30


@dataclass(frozen=True, slots=True)
class Training:
    """The setting of one run; see `Settings`. `lr` and `weight_decay` are base values, exponents those of matrices."""

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
    data: str = STANDARD_LIBRARY  # or the path of a file

    @classmethod
    def of(cls, arm: str, width: int, settings: Settings, data: str = STANDARD_LIBRARY) -> Training:
        scale = arm_rule(arm).matrix
        s = settings
        return cls(
            arm, scale.lr, scale.wd or 0.0, width, s.lr, s.weight_decay, s.seed, s.base_width, s.depth, s.context,
            s.batch, s.steps, s.cooldown, data,
        )  # fmt: skip

    def shared(self) -> Training:
        # At the proxy's own width all rules are the same.
        return replace(self, arm="", lr_exponent=0.0, wd_exponent=0.0) if self.width == self.base_width else self

    @property
    def settings(self) -> Settings:
        return Settings(
            rule=arm_rule(self.arm),
            base_width=self.base_width,
            depth=self.depth,
            context=self.context,
            batch=self.batch,
            steps=self.steps,
            cooldown=self.cooldown,
            lr=self.lr,
            weight_decay=self.weight_decay,
            seed=self.seed,
        )

    @property
    def _matrix_elements(self) -> int:
        return self.depth * (4 + 3 * FFN_RATIO) * self.width**2

    @property
    def cost(self) -> float:
        # The second term is what is not matrix products, from runs on a CPU at widths 64 to 256.
        return self.steps * self.batch * self.context * (self._matrix_elements + 2000.0 * self.depth * self.width)

    @property
    def memory(self) -> int:
        activations = self.batch * self.context * (self.depth * (12 + 4 * FFN_RATIO) * self.width + 4 * 256)
        return 20 * (self._matrix_elements + 512 * self.width) + 4 * activations


def arm_rule(arm: str) -> Rule:
    """The rule of an arm: a name from `lwadamw.RULES`, or exponents of matrices like `lr=-0.5,wd=0.25`.

    Raises:
        ValueError: neither.
    """
    if "=" not in arm:
        return get_rule(arm)
    try:
        scale = Scale.parse(arm)
    except ValueError as error:
        raise ValueError(f"arm {error}; nor is it one of {', '.join(RULES)}.") from None
    return Rule(arm, matrix=scale, source="given")


def train(task: Training, device: torch.device, alive: Callable[[], None]) -> dict[str, Any]:
    """Make the run; its columns of `RESULT`."""
    start = time.perf_counter()
    run = Run(task.settings, task.width, _corpus(task.data), device)
    seen: dict[str, float] = {}
    losses: list[float] = []
    for record in run.train():
        alive()
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


def watch(task: Training, device: torch.device, alive: Callable[[], None]) -> list[dict[str, Any]]:
    """Make the run under a monitor; rows of `SERIES`."""
    run = Run(task.settings, task.width, _corpus(task.data), device)
    probe = windows(run.corpus.validation, 8, task.context)[:, :-1].to(device)
    every = max(1, task.steps // READINGS)
    monitor = Monitor(run.optimizer, run.model, every=every, spectrum_every=every, probe=probe, history=task.steps)
    for _ in run.train():
        alive()
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
