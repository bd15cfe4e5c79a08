"""Monitor: what the weights of a run do against what noise would make of them, read now and then from the step's norms."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from torch import Tensor, nn

from ..state.arrays import Array
from ..state.checks import capturing
from ..state.groups import effective
from ..state.members import is_sharded
from ..step.norms import Norms
from ..step.optimizer import AdamW
from ..width.steady_state import Elapsed
from .reading import Reading
from .report import as_dict, medians_by_role, table
from .rows import Rows
from .spectrum import Spectrum

if TYPE_CHECKING:
    from .probe import Probe

SPECTRUM_SHARE: Final = 10  # readings from one spectrum to the next


class Monitor:
    r"""Compares every parameter with the steady state of its learning rate and weight decay, from norms the step measures.

    Attached to the optimizer as step hooks. A step costs host arithmetic per group; every `every` steps one copy of the norms
    to the host becomes a `Reading`, the first after the first step. Its columns, float64 per segment; with w the weight after
    the step, d its change, eta and lambda effective learning rate and weight decay:

        weight_rms        |w| / sqrt(numel)
        steady_rms        sqrt(eta/2lambda), where it would end if eta stayed and gradients were noise
        expected_rms      the same noise through the steps as they were, from the first reading on: under any schedule
        rms_ratio         weight_rms / steady_rms
        relative_update   |d| / |w|
        steady_update     sqrt(2 eta lambda (1 - beta1)/(1 + beta1))      Kosson et al. 2305.17212
        update_ratio      relative_update / steady_update
        rotation          radians the weight turned by
        rotation_ratio    rotation / steady_update
        taus              sum of eta lambda since the monitor was attached
        top, second       the two largest singular values of a matrix     `spectrum`
        bulk              where the others end if they are noise          `spectrum.bulk_edge`
        calibrated_at     the step at which these three were measured; since then they follow |w|

    and at steps with a spectrum those of the probe. NaN: a ratio without a decay, an update of a step that was skipped or of a
    parameter without a gradient, a spectrum of vectors, embeddings, and tensors that are not a matrix.

    Args:
        optimizer: an `lwadamw.AdamW` with norms.
        model: for a probe that is given as a batch.
        every: steps from one reading to the next.
        spectrum_every: steps from one measurement of singular values, and by the probe, to the next; 0: never. By default
            every tenth reading.
        probe: a `Probe`, or the batch for one of `model`.
        steps: length of the run, for verdicts.
        history: readings that are kept.

    Hyperparameters in tensors are read with the norms and count as constant until the next reading. Steps that were
    skipped for a non-finite gradient are found out at the reading, and count as spread evenly since the last one. Replays of
    a CUDA graph call no hooks: call `after_step()` after each. Copies of the optimizer, and pickles, have no monitor.

    Raises:
        TypeError: another optimizer.
        ValueError: a cadence is not a whole number, a batch without a model, or a probe that would never be asked.
        RuntimeError: the optimizer was built with norms=False, or holds only shards of some parameter.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        >>> with Monitor(optimizer, every=10) as monitor:
        ...     model(torch.ones(2, 4)).sum().backward()
        ...     optimizer.step()
        >>> monitor.latest.columns["weight_rms"].shape
        (2,)
    """

    def __init__(
        self,
        optimizer: AdamW,
        model: nn.Module | None = None,
        every: int = 50,
        spectrum_every: int | None = None,
        probe: Probe | Any = None,
        steps: int | None = None,
        *,
        history: int = 256,
    ) -> None:
        spectrum_every = every * SPECTRUM_SHARE if spectrum_every is None else spectrum_every
        whole = (
            ("every", every, 1),
            ("spectrum_every", spectrum_every, 0),
            ("steps", steps, 1),
            ("history", history, 1),
        )
        for name, value, least in whole:
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ValueError(f"Monitor: {name}={value!r} is not a whole number >= {least}.")
        _check(optimizer)
        if probe is not None and not spectrum_every:
            raise ValueError(
                "Monitor: a probe with spectrum_every=0 is never asked. Give spectrum_every, 500 for instance."
            )
        if probe is not None and not (hasattr(probe, "before_step") and hasattr(probe, "after_step")):
            if model is None:
                raise ValueError("Monitor: a probe batch needs the model it is for. Give model=..., or a Probe.")
            from .probe import Probe

            probe = Probe(optimizer, model, probe)
        self.optimizer = optimizer
        self.every, self.spectrum_every, self.steps, self.probe = every, spectrum_every, steps, probe
        self.readings: deque[Reading] = deque(maxlen=history)
        self.on_reading: list[Callable[[Reading], None]] = []  # called with each reading
        self.step = optimizer.steps_taken()  # that the optimizer has taken
        self._first = self.step + 1
        self._elapsed: list[Elapsed] = []
        self._used: list[tuple[float, float, float] | None] = []  # lr, weight decay, beta1 of each group's last step
        self._at_reading: list[Elapsed] = []
        self._step_at_reading = self.step
        self._skipped = int(optimizer.skipped_steps)
        self._rows = Rows((), optimizer)
        self._spectrum = Spectrum()
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
        ]

    @property
    def latest(self) -> Reading | None:
        return self.readings[-1] if self.readings else None

    @property
    def verdicts(self) -> dict[str, str]:
        """Of every parameter at the latest reading, whether its initial weights are forgotten, so that it can be judged.

        steady from step N           so many: 3 tau have passed since the monitor was attached
        steady from step N to step M the noise prediction was off by 10 % since: the learning rate falls faster than
                                     weights follow, and expected_rms is what to compare with
        not before step N            if eta lambda stays, or while it rises keeps rising; a lower bound under any warm-up
                                     that does not get steeper
        never in this run            N is beyond `steps`, or eta lambda is 0 and does not rise
        no decay                     there is no steady state
        """
        return dict(zip(self._rows.names, self._rows.verdicts(self.steps), strict=True))

    def by_role(self) -> dict[str, dict[str, float]]:
        """Medians of the latest reading: role -> statistic -> value; those that are not known are left out."""
        return {} if self.latest is None else medians_by_role(self.latest)

    def as_dict(self, prefix: str = "") -> dict[str, float]:
        """The latest reading as flat floats for a logger: `{prefix}{statistic}/{name}` and, medians,
        `{prefix}role/{role}/{statistic}`; values that are not known are left out.
        """
        return {} if self.latest is None else as_dict(self.latest, prefix)

    def report(self) -> str:
        """The latest reading as a table, a line per role and one per kind of layer."""
        if self.latest is None:
            return f"no reading yet: the first is after step {self._first}"
        return table(self.latest, list(self.verdicts.values()), self.steps)

    def save(self, path: str | Path, **meta: Any) -> None:
        """Write a profile of the run for `python -m lwadamw compare`; `meta` is kept in it."""
        from .profile import save

        save(self, path, meta)

    def state_dict(self) -> dict[str, Any]:
        """What a monitor of a resumed run goes on from, as plain numbers: tau passed, and where every parameter started."""
        elapsed = [astuple(e) for e in self._elapsed]
        return {"step": self.step, "first": self._first, "elapsed": elapsed, "rows": self._rows.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the monitor of an earlier part of the run; its parameters are found by name.

        Raises:
            ValueError: the state is of another step than the optimizer has taken.
        """
        if state["step"] != self.step:
            raise ValueError(
                f"Monitor: the state is of step {state['step']}, and the optimizer has taken {self.step}. Load the optimizer's "
                "checkpoint first, and the monitor's of the same step."
            )
        self._first = state["first"]
        self._elapsed = [Elapsed(*values) for values in state["elapsed"]]
        self._at_reading = [replace(e) for e in self._elapsed]
        self._used = [None] * len(self._elapsed)
        self._rows = Rows.from_state(state["rows"])

    def remove(self) -> None:
        """Detach from the optimizer; readings stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _before_step(self) -> None:
        if self.probe is not None and self._has_spectrum(self.step + 1) and not capturing():
            self.probe.before_step()

    def after_step(self) -> None:
        """What the hook does after every step."""
        if capturing():
            return
        self.step += 1
        groups = self.optimizer.param_groups
        for _ in range(len(self._elapsed), len(groups)):
            self._elapsed.append(Elapsed())
            self._at_reading.append(Elapsed())
            self._used.append(None)
        due = self._is_due(self.step)
        for i, group in enumerate(groups):
            known = self._used[i]
            if known is None or due or not _has_tensors(group):
                known = self._used[i] = _read(group)
            if known[1]:
                self._elapsed[i].advance(*known)
        if due:
            self._take_reading()

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 or self._has_spectrum(step) or step == self._first

    def _has_spectrum(self, step: int) -> bool:
        if not self.spectrum_every:
            return False
        # At the start spectra take a shape that they did not have: also after 1, 2, 4, ... readings.
        readings, rest = divmod(step - self._first + 1, self.every)
        early = rest == 0 and step - self._first < self.spectrum_every and readings & (readings - 1) == 0
        return step % self.spectrum_every == 0 or step == self._first or early

    def _take_reading(self) -> None:
        norms = self.optimizer.norms()
        if norms.names != self._rows.names or self._rows.is_stale(self.optimizer):
            self._rows = Rows(norms.names, self.optimizer, self._rows)
        self._take_back_skipped()
        rows = self._rows
        hyper = np.array(self._used, dtype=np.float64).reshape(-1, 3)[rows.group]
        columns = rows.columns(norms, self.step, hyper, self._elapsed)
        if self.spectrum_every:
            if self._has_spectrum(self.step) or not self._spectrum.known:
                self._measure_spectrum(norms)
            columns |= self._spectrum.columns(norms.names, norms.weight)
        if self.probe is not None and self._has_spectrum(self.step):
            columns |= _aligned(self.probe.after_step(), len(norms))
        reading = Reading(self.step, norms.names, rows.roles, rows.m, hyper[:, 0], hyper[:, 1], columns)
        self._step_at_reading = self.step
        self._at_reading = [replace(elapsed) for elapsed in self._elapsed]
        self.readings.append(reading)
        for call in self.on_reading:
            call(reading)

    def _take_back_skipped(self) -> None:
        skipped = int(self.optimizer.skipped_steps)
        # The counter starts anew in an optimizer that has been moved or loaded.
        share = max(skipped - self._skipped, 0) / (self.step - self._step_at_reading)
        self._skipped = skipped
        if share:
            for now, then in zip(self._elapsed, self._at_reading, strict=True):
                now.back_to(then, min(share, 1.0))

    def _measure_spectrum(self, norms: Norms) -> None:
        matrices = self._rows.matrices(self.optimizer)
        frobenius = dict(zip(norms.names, norms.weight.tolist(), strict=True))
        self._spectrum.measure(matrices, frobenius, self.step)


def _check(optimizer: object) -> None:
    if not isinstance(optimizer, AdamW):
        raise TypeError(
            f"Monitor: a {type(optimizer).__module__}.{type(optimizer).__qualname__} does not measure its steps. Use "
            "lwadamw.AdamW, which takes the arguments of torch.optim.AdamW; of an optimizer that wraps one, give that one."
        )
    if not optimizer.options.norms:
        raise RuntimeError("Monitor: this AdamW was built with norms=False. Build it with norms=True.")
    for group in optimizer.param_groups:
        for p in group["params"]:
            if is_sharded(p):
                raise RuntimeError(
                    f"Monitor: a parameter {tuple(p.shape)} is sharded over processes, and the norm of a shard is not the norm "
                    "of the matrix. Add optimizer.norm_sums() up over the processes, then Norms.from_sums(names, sums)."
                )


def _has_tensors(group: Mapping[str, Any]) -> bool:
    """Whether reading its hyperparameters may wait for a device."""
    return (
        isinstance(group["lr"], Tensor)
        or isinstance(group["weight_decay"], Tensor)
        or isinstance(group["betas"][0], Tensor)
    )


def _read(group: Mapping[str, Any]) -> tuple[float, float, float]:
    lr, weight_decay, _ = effective(group)
    return float(lr), float(weight_decay), float(group["betas"][0])


def _aligned(columns: Mapping[str, Array], count: int) -> dict[str, Array]:
    for name, values in columns.items():
        if np.shape(values) != (count,):
            raise ValueError(
                f"Monitor: the probe's {name!r} has shape {np.shape(values)}, {count} segments need ({count},)."
            )
    return dict(columns)
