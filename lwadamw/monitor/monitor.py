"""The monitor: it compares the weights of a run with what noise would make of them."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.optim import Optimizer

from ..state.checks import capturing
from ..step.norms import Norms
from ..step.optimizer import AdamW
from ..width.steady_state import Elapsed
from .arguments import (
    check_model,
    check_number,
    check_optimizer,
    optimizer_behind,
    probe_columns,
    probe_of,
    steps_of,
    writes,
)
from .group_tracker import GroupTracker
from .growth import growths
from .measured import Joined, Measured
from .reading import Reading
from .report import as_dict, medians_by_role, table
from .segment_tracker import SegmentTracker
from .spectra import Spectrum
from .standing import rules_of
from .text import terminal_width
from .together import Together

if TYPE_CHECKING:
    from .probe import Probe

SPECTRUM_SHARE: Final = 10  # by default, singular values are measured at every tenth reading


class Monitor:
    r"""Compares every parameter with the steady state of its learning rate and weight decay.

    The monitor attaches itself to the optimizer as step hooks and uses the norms that the step measures. After each step it
    does a little arithmetic per group on the host. Every `every` steps it copies the norms to the host once and makes a
    `Reading`. The first reading comes after the first step.

    A reading has these columns, float64 with one value per segment. w is the weight after the step, d is the change of the
    weight in the step, eta and lambda are the effective learning rate and weight decay:

        weight_rms        |w| / sqrt(numel)
        steady_rms        sqrt(eta / (2 lambda)): where weight_rms ends if eta stays and gradients are noise
        expected_rms      where noise has taken weight_rms by now, from the first reading on, under the schedule as it was
        rms_ratio         weight_rms / steady_rms
        relative_update   |d| / |w|
        steady_update     sqrt(2 eta lambda (1 - beta1) / (1 + beta1))      source: Kosson et al. 2305.17212
        update_ratio      relative_update / steady_update
        rotation          the angle in radians by which the weight turned
        rotation_ratio    rotation / steady_update
        taus              the sum of eta lambda since the segment's first reading
        top, second       the two largest singular values of a matrix, see `lwadamw.monitor.spectrum`
        bulk              where the other singular values end if they are noise, see `spectrum.bulk_edge`
        calibrated_at     the step at which top, second and bulk were measured; since then they follow |w|
        top_of            of a parameter that packs matrices: the number of the matrix whose top, second and bulk these are,
                          the one with the largest top. Only readings with such a parameter have this column

    At steps with a spectrum, a reading also has the columns of the probe. NaN means that there is no value: a column that
    needs weight decay where there is none, an update of a step that was skipped or of a parameter without a gradient, a
    spectrum of a vector, an embedding or another tensor that is not a matrix.

    Hyperparameters that are tensors are read together with the norms. Until the next reading they count as constant. Steps
    that were skipped because of a non-finite gradient are found at the reading. They count as spread evenly since the last
    reading. If a parameter has no gradient at a reading, the steps since the last reading do not count for it. If
    parameters are split over processes, a reading is collective: attach a monitor with the same arguments on every process.
    All get the same values, and one of them writes: see `Reading.writes`. Singular values of a DTensor that is split both
    by rows and by columns are NaN, and so are those of plain tensors that are parts (`shard_group`) whose place
    `place_flat_shard` has not told.

    Replays of a CUDA graph call no hooks: call `after_step()` after each replay. Copies and pickles of the optimizer have no
    monitor.

    Args:
        optimizer: an `lwadamw.AdamW` that was built with norms=True, or an object of a framework that wraps one. For Megatron,
            `watch.monitor()` makes the monitor.
        model: the model of the probe. It is needed only if `probe` is a batch. It may have frozen parameters, parameters of
            `others`, and be a part of what the optimizer trains.
        every: steps from one reading to the next.
        spectrum_every: steps from one measurement of singular values to the next. The probe is asked at the same steps. 0
            means never. The default is ten times `every`.
        probe: a `Probe`, or the batch for a probe of `model`.
        steps: length of the run in steps, for the verdicts.
        history: number of latest readings that are kept.
        others: other optimizers of the model, of any class, for instance a Muon for the matrices. A reading then has the
            parameters of all. At every reading their weights are copied before the step and compared after it, which costs
            a copy of their weights and a pass over them; steps without a reading cost nothing. Columns that follow from
            Adam's update (steady_rms, expected_rms, rms_ratio, steady_update, update_ratio, rotation_ratio) are NaN for
            another optimizer than torch.optim.AdamW. Each of them has to step once per step of `optimizer`. Their parameters
            are DTensors or whole: `shard_group` of `optimizer` does not tell how plain ones are split.

    Attributes:
        readings: the latest readings, oldest first.
        on_reading: functions that are called with each new reading.
        step: the number of steps that the optimizer has taken. Steps that were skipped while the monitor was attached count
            too.

    Raises:
        TypeError: the optimizer is not an `lwadamw.AdamW`, or one of `others` is no `torch.optim.Optimizer`.
        ValueError: `every`, `spectrum_every`, `steps` or `history` is not a whole number in its range; the probe is a batch
            and there is no model; the model has trainable parameters, and none of its parameters belongs to the optimizer or to
            one of `others`; or there is a probe, but spectrum_every=0; or optimizers share a parameter or a name.
        RuntimeError: the optimizer was built with norms=False, or a probe is given and parameters are split over processes.

    Examples:
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
        optimizer: AdamW | Joined,
        model: nn.Module | None = None,
        every: int = 50,
        spectrum_every: int | None = None,
        probe: Probe | Any = None,
        steps: int | None = None,
        *,
        history: int = 256,
        others: Sequence[Optimizer] = (),
    ) -> None:
        spectrum_every = every * SPECTRUM_SHARE if spectrum_every is None else spectrum_every
        check_number("every", every, 1)
        check_number("spectrum_every", spectrum_every, 0)
        if steps is not None:
            check_number("steps", steps, 1)
        check_number("history", history, 1)
        measured: Any = optimizer_behind(optimizer)
        check_optimizer(measured)
        if others:
            behind = [optimizer_behind(other) for other in others]
            measured = Together(measured, behind, lambda: self._is_due(self.step + 1))
        check_model(model, measured)
        self.optimizer: Measured = measured
        optimizer = measured
        self.every, self.spectrum_every, self.steps = every, spectrum_every, steps
        self.probe = None if probe is None else probe_of(probe, optimizer, model, spectrum_every)
        self.readings: deque[Reading] = deque(maxlen=history)
        self.on_reading: list[Callable[[Reading], None]] = []
        self.step = steps_of(optimizer)
        self._first = self.step + 1
        self._groups = GroupTracker(self.step, int(optimizer.skipped_steps))
        self._segments = SegmentTracker((), optimizer)
        self._spectrum = Spectrum()
        self._loaded = False
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self.after_step()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._note_load()),
        ]

    @property
    def latest(self) -> Reading | None:
        """The latest reading. None before the first one."""
        return self.readings[-1] if self.readings else None

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on every segment at the latest reading: whether it has forgotten its initial weights.

        steady from step N           3 tau had passed at step N, counted from the segment's first reading
        steady from step N to step M after step M expected_rms differs from steady_rms by more than 10 %: the learning rate
                                     falls faster than the weights follow. Compare weight_rms with expected_rms instead
        not before step N            N assumes that eta lambda stays, or keeps rising if it rises now. So N is a lower bound
                                     under every schedule that does not rise more steeply later
        never in this run            N is larger than `steps`, or eta lambda is 0 and does not rise
        no decay                     there is no steady state
        not known: REASON            nothing can be predicted: amsgrad or decay="huber"
        not finite from step N       at the reading of step N, and since then, some weight is NaN or infinite
        """
        return dict(zip(self._segments.names, self._segments.verdicts(self.steps), strict=True))

    def by_role(self) -> dict[str, dict[str, float]]:
        """Return the medians of the latest reading: role -> statistic -> value. Values that are not known are left out."""
        return {} if self.latest is None else medians_by_role(self.latest)

    def as_dict(self, prefix: str = "", roles_only: bool = False) -> dict[str, float]:
        """Return the latest reading as flat floats for a logger. Values that are not known are left out.

        Args:
            prefix: text in front of every key.
            roles_only: leave the values of segments out: about 20 values per role, however many parameters there are.

        Returns:
            The values of segments under `{prefix}{statistic}/{name}`. Under `{prefix}role/{role}/{statistic}`: medians over the
            segments of a role, and `weight_norm`, `update_norm` and `grad_norm` of all of them together, which are roots of
            sums of squares. Empty before the first reading.
        """
        return {} if self.latest is None else as_dict(self.latest, prefix, roles_only)

    def report(self, width: int | None = None) -> str:
        """Return the latest reading as a table: one line per role, then one line per type of layer.

        Below the table stands what has no weight decay and two or more dimensions, such as heads and embeddings: how much it
        has grown, and how far it grows if the learning rate stays. See `lwadamw.monitor.growth`.

        Args:
            width: the largest length of a line in characters. By default, that of the terminal (COLUMNS if it is set), and 120
                where there is no terminal. A table that is too wide leaves out rotation/steady, then the smallest and the
                largest values, then rms/expected, role, update/steady and taus. Then it shortens names.
        """
        if self.latest is None:
            return f"no reading yet: the first is after step {self._first}"
        width = terminal_width() if width is None else width
        grown = growths(self.readings, self.steps)
        return table(self.latest, list(self.verdicts.values()), self.steps, grown, width)

    def save(self, path: str | Path, **meta: Any) -> None:
        """Write a profile of the run for `python -m lwadamw compare`.

        If parameters are split over processes, all of them may call this, and the first one writes the file.

        Args:
            path: path of the file. An existing file is replaced.
            **meta: anything else to keep in the file, for instance batch size or commit. JSON must be able to hold it.

        Raises:
            RuntimeError: there is no reading yet.
            TypeError: `meta` holds something that JSON cannot hold.
        """
        from .profile_file import save

        save(self, path, meta)

    def state_dict(self) -> dict[str, Any]:
        """Return what a monitor of the resumed run needs, as plain numbers: tau passed and where every segment started."""
        # A copy: one process may save alone, and its next readings have to stay those of the others.
        groups = copy.deepcopy(self._groups)
        groups.take_back_skipped(self.step, int(self.optimizer.skipped_steps))
        return {
            "step": self.step,
            "first": self._first,
            "elapsed": groups.state(),
            "rows": self._segments.state_dict(),
            "skipped": groups.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the monitor of an earlier part of the run. Segments are matched by name.

        Args:
            state: what `state_dict` returned. Load the optimizer's checkpoint of the same step before.

        Raises:
            ValueError: the state was saved at another step than the optimizer is at.
        """
        self._start_anew()
        counter, skipped = int(self.optimizer.skipped_steps), state.get("skipped", 0)
        self._groups.take_back_skipped(self.step, counter)
        # The optimizer's checkpoint holds the steps that were not skipped.
        then, now = state["step"] - skipped, self.step - self._groups.skipped
        if then != now:
            raise ValueError(
                f"Monitor: the state is of step {then}, and the optimizer has taken {now}. Load the optimizer's checkpoint "
                "first, then the monitor's state of the same step."
            )
        self.step, self._first = state["step"], state["first"]
        elapsed = [Elapsed(*values) for values in state["elapsed"]]
        self._groups = GroupTracker(self.step, counter, elapsed, skipped)
        self._segments = SegmentTracker.from_state(state["rows"])

    def forget_spectrum(self) -> None:
        """Forget all measured singular values and vectors. The next reading measures them again, from random vectors."""
        self._spectrum = Spectrum()

    def remove(self) -> None:
        """Detach the monitor from the optimizer. The readings stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _note_load(self) -> None:
        self._loaded = True

    def _start_anew(self) -> None:
        """Count from the step of the checkpoint that the optimizer has loaded, if it has loaded one."""
        if not self._loaded:
            return
        self._loaded = False
        self.step = steps_of(self.optimizer)
        self._first = self.step + 1
        self._groups = GroupTracker(self.step, int(self.optimizer.skipped_steps))
        self._segments = SegmentTracker((), self.optimizer)
        self.forget_spectrum()
        while self.readings and self.readings[-1].step > self.step:
            self.readings.pop()

    def _before_step(self) -> None:
        self._start_anew()
        if self.probe is not None and self._has_spectrum(self.step + 1) and not capturing():
            self.probe.before_step()

    def after_step(self) -> None:
        """Count one step, and make a reading if one is due. The hook calls this after every step."""
        if capturing():
            return
        self.step += 1
        due = self._is_due(self.step)
        self._groups.advance(self.optimizer.param_groups, read_tensors=due)
        if due:
            self._take_reading()

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 or self._has_spectrum(step) or step == self._first

    def _has_spectrum(self, step: int) -> bool:
        """Return whether singular values are measured, and the probe is asked, at this step."""
        if not self.spectrum_every:
            return False
        # At the start of a run the spectra change their shape. So they are also measured after 1, 2, 4, ... readings.
        readings = step // self.every - (self._first - 1) // self.every
        early = step % self.every == 0 and step - self._first < self.spectrum_every and readings & (readings - 1) == 0
        return step % self.spectrum_every == 0 or step == self._first or early

    def _take_reading(self) -> None:
        norms = self.optimizer.norms()
        if norms.names != self._segments.names or self._segments.is_stale(self.optimizer):
            self._segments = SegmentTracker(norms.names, self.optimizer, self._segments)
        self._groups.take_back_skipped(self.step, int(self.optimizer.skipped_steps))
        segments = self._segments
        hyper = self._groups.hyperparameters()[segments.group]
        if self.step == 1 and len(norms) and not hyper[:, 0].any() and not norms.grad.any():
            return  # torch takes such a step on an empty state before it loads a checkpoint
        columns = segments.columns(norms, self.step, hyper, self._groups.elapsed)
        if self.spectrum_every:
            if self._has_spectrum(self.step) or not self._spectrum.known:
                self._measure_spectrum(norms)
            columns |= self._spectrum.columns(norms.names, norms.weight)
        if self.probe is not None and self._has_spectrum(self.step):
            columns |= probe_columns(self.probe.after_step(), len(norms))
        reading = Reading(
            self.step,
            norms.names,
            segments.roles,
            segments.m,
            hyper[:, 0],
            hyper[:, 1],
            columns,
            writes(self.optimizer),
            shapes=segments.shapes,
            fan_in=segments.fan_in,
            rule=rules_of(self.optimizer.param_groups),
            unbounded=segments.unbounded(),
            norms=norms,
        )
        self.readings.append(reading)
        for call in self.on_reading:
            call(reading)

    def _measure_spectrum(self, norms: Norms) -> None:
        matrices = self._segments.matrices(self.optimizer)
        frobenius = dict(zip(norms.names, norms.weight.tolist(), strict=True))
        self._spectrum.measure(matrices, frobenius, self.step)
