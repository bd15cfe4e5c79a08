"""Training: one run of the laboratory's model, with a record of its norms every few steps."""

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
    """What all widths of a comparison have in common.

    Args:
        rule: width rule.
        base_width: width of the proxy.
        depth: number of blocks.
        context: bytes per window.
        batch: windows per step.
        steps: length of the run.
        lr: base value of the learning rate. It is reached after the warm-up and then stays constant, because a steady
            state needs a constant learning rate.
        cooldown: share of the steps, at the end, in which the learning rate falls linearly to 0.
        weight_decay: base value of the weight decay.
        betas: as for AdamW.
        max_grad_norm: the gradient is clipped to this norm.
        seed: seed of the initial weights and of the batches.
        base_depth: number of blocks of the proxy. None: the rule does not scale the depth, and nothing else does.
    """

    rule: str | Rule = "fan2025"
    base_width: int = 64
    depth: int = 4
    context: int = 128
    batch: int = 8
    steps: int = 300
    lr: float = 1e-2
    cooldown: float = 0.0
    weight_decay: float = 2.5
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 0
    base_depth: int | None = None

    @property
    def warmup(self) -> int:
        """Number of steps of the linear warm-up."""
        return max(1, self.steps // 25)

    @property
    def steady_steps(self) -> int:
        """Number of steps before the learning rate falls."""
        return self.steps - round(self.cooldown * self.steps)

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at a step.

        Args:
            step: number of the step, counted from 0.
        """
        rise = min(1.0, (step + 1) / self.warmup)
        left = self.steps - step
        return rise * min(1.0, left / (self.steps - self.steady_steps + 1))

    @property
    def every(self) -> int:
        """Number of steps from one record to the next."""
        return max(1, self.steps // 50)


@dataclass(frozen=True, slots=True)
class Record:
    """Measurements at one step.

    Args:
        step: number of the step, counted from 1.
        seconds: time since the start of the run.
        loss: mean training loss since the last record, in nats per byte.
        grad_norm: norm of the gradient before clipping.
        ratio: weight RMS of each matrix over the weight RMS of the steady state, float64[matrices].
        update_ratio: relative update of each matrix over that of the steady state, float64[matrices].
    """

    step: int
    seconds: float
    loss: float
    grad_norm: float
    ratio: Array
    update_ratio: Array


@dataclass
class Run:
    """The training of one width. First iterate over `train()`, then call `evaluate()`.

    Args:
        settings: what all widths have in common.
        width: width of the model.
        corpus: text to train on.
        device: where to train.
        records: the records so far. `train()` appends to them, so an interrupted run keeps its records.
        validation: validation loss in nats per byte, set by `evaluate()`.
        top: top singular value of each matrix, float64[matrices], set by `evaluate()`.

    Attributes:
        model: the `Transformer`.
        rule: the width rule.
        optimizer: the `lwadamw.AdamW`.
        steady: steady state of the matrices at the peak learning rate.
        m: width ratio of the matrices.
        matrices: the matrices by name.
    """

    settings: Settings
    width: int
    corpus: Corpus
    device: torch.device
    records: list[Record] = field(default_factory=list)
    validation: float = math.nan
    top: Array = field(default_factory=lambda: np.empty(0))

    def __post_init__(self) -> None:
        s = self.settings
        self.rule = get_rule(s.rule)
        branch, base_depth = 1.0, None
        if self.rule.depth is not None:
            base_depth = s.base_depth or s.depth
            branch = self.rule.depth.factor(s.depth / base_depth)
        # A rule that leaves the lr of the head alone relies on logits that are divided by m.
        divided = self.rule.output.lr == 0 and self.rule.matrix.lr != 0
        logits = s.base_width / self.width if divided else 1.0
        config = ModelConfig(width=self.width, depth=s.depth, context=s.context, branch=branch, logits=logits)
        self.model = Transformer(config, s.seed).to(self.device)
        groups = lwadamw.param_groups(self.model, base_width=s.base_width, rule=self.rule, base_depth=base_depth)
        self.optimizer = lwadamw.AdamW(
            groups, lr=s.lr, weight_decay=s.weight_decay, betas=s.betas, max_grad_norm=s.max_grad_norm
        )
        effective = self.optimizer.effective()
        # Every fan_in of the model is a fixed multiple of its width, so all matrices have the same m and are in one group.
        ((index, matrices),) = [(i, g) for i, g in enumerate(self.optimizer.param_groups) if g["role"] == "matrix"]
        lr, weight_decay = (float(effective[index][key]) for key in ("lr", "weight_decay"))
        self.steady = SteadyState(lr, weight_decay, s.betas[0])
        self.m = self.width / s.base_width
        self.matrices: dict[str, Tensor] = dict(zip(matrices["param_names"], matrices["params"], strict=True))
        self._root_numel = np.sqrt([p.numel() for p in self.matrices.values()])

    @property
    def steady_step(self) -> float:
        """The step after which the sum of lr wd, including the steps of the warm-up, reaches STEADY_TAUS."""
        return STEADY_TAUS * self.steady.tau + (self.settings.warmup - 1) / 2

    @property
    def steps_done(self) -> int:
        """Number of steps up to the last record."""
        return self.records[-1].step if self.records else 0

    def train(self) -> Iterator[Record]:
        """Train all steps.

        Yields:
            A record after every `settings.every` steps, and one after the last step.
        """
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
        """Set `validation` and `top` from the current weights.

        Args:
            spectra: whether to compute `top`, the top singular values.
        """
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
        assert grad_norm is not None  # because max_grad_norm is set
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
