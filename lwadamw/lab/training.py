"""Training one configuration of the laboratory's model, with a record of its norms now and then."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import lwadamw
from lwadamw.state.arrays import Array
from lwadamw.width.rules import Rule, get_rule
from lwadamw.width.steady_state import STEADY_TAUS, SteadyState

from .data import Corpus, batches, windows
from .model import ModelConfig, Transformer

VALIDATION_WINDOWS: Final = 128


@dataclass(frozen=True, slots=True)
class Settings:
    """What all widths of a comparison have in common."""

    rule: str | Rule = "fan2025"
    base_width: int = 64
    depth: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 300
    lr: float = 1e-2  # base value, reached after the warm-up and then constant, so that there is a steady state
    cooldown: float = 0.0  # share of the steps, at the end, in which the learning rate falls linearly to zero
    weight_decay: float = 2.5  # base value
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def warmup(self) -> int:
        """Steps of linear warm-up."""
        return max(1, self.steps // 25)

    @property
    def steady_steps(self) -> int:
        """Steps before the learning rate falls."""
        return self.steps - round(self.cooldown * self.steps)

    def factor(self, step: int) -> float:
        """What the schedule multiplies the learning rate of a step by; steps count from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        left = self.steps - step
        return rise * min(1.0, left / (self.steps - self.steady_steps + 1))

    @property
    def every(self) -> int:
        """Steps from one record to the next."""
        return max(1, self.steps // 50)


@dataclass(frozen=True, slots=True)
class Record:
    """What was seen up to one step; arrays are float64[number of matrices]."""

    step: int
    seconds: float  # since the start
    loss: float  # training, nats per byte, mean since the last record
    grad_norm: float
    ratio: Array  # weight RMS over the steady state's
    update_ratio: Array  # relative update over the steady state's


@dataclass
class Run:
    """One width, trained: iterate over `train()`, then `evaluate()`. `records` hold what there is at any time."""

    settings: Settings
    width: int
    corpus: Corpus
    device: torch.device
    records: list[Record] = field(default_factory=list)
    validation: float = math.nan  # nats per byte
    top: Array = field(default_factory=lambda: np.empty(0))  # top singular value of each matrix, float64

    def __post_init__(self) -> None:
        s = self.settings
        config = ModelConfig(width=self.width, depth=s.depth, context=s.context)
        self.model = Transformer(config, s.seed).to(self.device)
        self.rule = get_rule(s.rule)
        groups = lwadamw.param_groups(self.model, base_width=s.base_width, rule=self.rule)
        self.optimizer = lwadamw.AdamW(
            groups, lr=s.lr, weight_decay=s.weight_decay, betas=s.betas, max_grad_norm=s.max_grad_norm
        )
        effective = self.optimizer.effective()
        # Every fan_in of the model is a fixed multiple of its width, so all matrices share one m and one group.
        ((index, matrices),) = [(i, g) for i, g in enumerate(self.optimizer.param_groups) if g["role"] == "matrix"]
        lr, weight_decay = (float(effective[index][key]) for key in ("lr", "weight_decay"))
        self.steady = SteadyState(lr, weight_decay, s.betas[0])
        self.m = self.width / s.base_width
        self.matrices: dict[str, Tensor] = dict(zip(matrices["param_names"], matrices["params"], strict=True))
        self._root_numel = np.sqrt([p.numel() for p in self.matrices.values()])

    @property
    def steady_step(self) -> float:
        """The step after which the sum of lr wd reaches STEADY_TAUS, warm-up included."""
        return STEADY_TAUS * self.steady.tau + (self.settings.warmup - 1) / 2

    @property
    def steps_done(self) -> int:
        return self.records[-1].step if self.records else 0

    def train(self) -> Iterator[Record]:
        """Train all steps, yielding a record every `settings.every` of them and after the last."""
        s = self.settings
        schedule = LambdaLR(self.optimizer, s.factor)
        source = batches(self.corpus.train, s.batch, s.context, s.seed)
        losses: list[Tensor] = []
        start = time.perf_counter()
        for step in range(1, s.steps + 1):
            loss = self._loss(next(source))
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            losses.append(loss.detach())
            if step % s.every == 0 or step == s.steps:
                self.records.append(self._measure(step, losses, start))
                losses = []
                yield self.records[-1]
            self.optimizer.zero_grad()
            schedule.step()

    @torch.no_grad()
    def evaluate(self, spectra: bool = True) -> None:
        """Set `validation`, and with `spectra` also `top`, from the weights as they are."""
        held_out = windows(self.corpus.validation, VALIDATION_WINDOWS, self.settings.context)
        parts = torch.split(held_out, self.settings.batch)
        self.validation = sum(float(self._loss(part)) * len(part) for part in parts) / len(held_out)
        if spectra:
            self.top = np.array([float(torch.linalg.matrix_norm(p, ord=2)) for p in self.matrices.values()])

    def _loss(self, batch: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model.loss(batch.to(self.device, non_blocking=True))

    def _measure(self, step: int, losses: Sequence[Tensor], start: float) -> Record:
        norms, grad_norm = self.optimizer.norms(), self.optimizer.grad_norm
        assert grad_norm is not None  # max_grad_norm is set
        row = {name: i for i, name in enumerate(norms.names)}
        index = [row[name] for name in self.matrices]
        weight, update = norms.weight[index], norms.update[index]
        return Record(
            step,
            time.perf_counter() - start,
            float(torch.stack(list(losses)).mean()),
            float(grad_norm),
            ratio=weight / self._root_numel / self.steady.weight_rms,
            update_ratio=update / weight / self.steady.relative_update,
        )
