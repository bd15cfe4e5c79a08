"""World: an optimizer on guarded memory, beside the float64 twins of its parameters, and the comparison of the two."""

import contextlib
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lwadamw import AdamW, reference
from lwadamw.state import keys
from lwadamw.state.names import names_of
from lwadamw.state.packing import read_moment
from lwadamw.state.storage import STATE, storage_of
from tests.company.canaries import Guards
from tests.company.ledger import MOMENTS, Twin, half_ulp
from tests.company.storages import strides_of

# The keys of a group that `reference.Group` has too.
_TWIN_KEYS = (
    "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "width_lr_mult", "width_wd_mult", "width_eps_mult",
)  # fmt: skip
_CLIP_ERROR = 2.0**-17  # promise 5: norms are right to 1e-5


@dataclass
class Held:
    """A parameter of the world.

    Attributes:
        name: its name.
        p: the parameter itself. A copy of the optimizer has another one.
        twin: its float64 twin.
        place: the index of its group in the optimizer. None: others have taken it out.
    """

    name: str
    p: torch.nn.Parameter
    twin: Twin
    place: int | None


class World:
    """One optimizer and everything that it works on.

    Args:
        backend: "torch" or "triton".
        arguments: arguments of AdamW that no group holds.

    Attributes:
        guard_state: move all state into guarded memory after every step.
        around: returns a context in which the optimizer takes its steps.
    """

    def __init__(self, backend, **arguments):
        self.backend, self.arguments = backend, {"backend": backend, **arguments}
        self.guards, self.groups, self.held = Guards(), [], []
        self.optimizer, self.max_grad_norm = None, arguments.get("max_grad_norm")
        self.guard_state, self.around = False, contextlib.nullcontext

    def parameter(self, values, layout="rows", shift=0):
        """Return a guarded parameter with these values. "flat" and "shifted" begin at an odd address."""
        shift = shift or (1 if layout in ("shifted", "flat") else 0)
        return torch.nn.Parameter(self.guards.copy(values, strides_of(values.shape, layout), shift))

    def add_group(self, params, **options):
        """Add a group of parameters or of (name, parameter) pairs. The first call makes the optimizer."""
        group = {"params": list(params), **options}
        if self.optimizer is None:
            self.optimizer = AdamW([group], **self.arguments)
        else:
            self.optimizer.add_param_group(group)
        made = self.optimizer.param_groups[-1]
        self.groups.append(reference.Group(**{k: made[k] for k in _TWIN_KEYS if k in made}))
        place = len(self.groups) - 1
        for name, p in zip(names_of(made, place), made["params"], strict=True):
            self.held.append(Held(name, p, Twin(p, self.groups[-1]), place))

    def set(self, place, **values):
        """Tell the twins of a group its new values. The optimizer is told by the act."""
        for key, value in values.items():
            setattr(self.groups[place], key, value)

    def place(self, held, place):
        """Tell the twin that its parameter is in another group now, or in none."""
        held.place = place
        if place is not None:
            held.twin.reference.group = self.groups[place]

    def storage(self, held, grad=None):
        """Return how a parameter is stored."""
        group = self.optimizer.param_groups[held.place or 0]
        return storage_of(held.p, grad, group, self.optimizer.state.get(held.p, {}))

    def give(self, held, grad):
        """Give a parameter its gradient in guarded memory, in the attribute that its group names."""
        if grad is not None and not self.guards.holds(grad):
            grad = self.guards.copy(grad, grad.stride())
        setattr(held.p, self.attribute(held), grad)

    def gradient(self, held):
        """Return the gradient of a parameter, None if it has none or is in no group."""
        if held.place is None:
            return None
        return getattr(held.p, self.attribute(held), None)

    def attribute(self, held):
        """Return the attribute that holds the gradient of a parameter."""
        return keys.GRAD_ATTRIBUTE.of(self.optimizer.param_groups[held.place or 0])

    def step(self, scale=1.0, found_inf=False, norms=False):
        """Take a step with the gradients that are there, in the optimizer and in float64, and compare.

        Args:
            scale: loss scale; the gradients are scaled already.
            found_inf: a GradScaler has found an inf.
            norms: read the norms of the step, and compare them too.
        """
        active = [h for h in self.held if self.gradient(h) is not None]
        grads = [self.gradient(h) for h in active]
        kept = [g.clone() for g in grads]
        wide = [g.detach().double().numpy() for g in grads]
        before = self.bits()
        for name, value in (("grad_scale", scale if scale != 1 else None), ("found_inf", found_inf or None)):
            if value is not None:
                setattr(self.optimizer, name, torch.full((), float(value)))
        with self.around():
            self.optimizer.step()
        for name in ("grad_scale", "found_inf"):
            self.optimizer.__dict__.pop(name, None)
        for grad, old in zip(grads, kept, strict=True):
            assert torch.equal(_raw(grad), _raw(old)), "a gradient was written"
        for h in active:
            h.twin.remember()
        norm = reference.global_norm(wide) / scale
        stop = found_inf or (self.max_grad_norm is not None and not math.isfinite(norm))
        reference.step(
            [h.twin.reference for h in active], wide, max_grad_norm=self.max_grad_norm, grad_scale=scale, found_inf=stop
        )
        if stop:
            self.assert_unwritten(before, "a skipped step")
        else:
            self._bound(active, grads, wide, norm, scale)
        self.check()
        if norms:
            self.check_norms({h.name for h in active} if not stop else set())
        if self.guard_state and not stop:
            self.move_state()

    def _bound(self, active, grads, wide, norm, scale):
        factor = 1 / scale
        if self.max_grad_norm is not None:
            factor *= min(1.0, self.max_grad_norm / (norm + 1e-6))
        for h, grad, g in zip(active, grads, wide, strict=True):
            storage = self.storage(h, grad)
            unit = torch.finfo(torch.float32).eps / 2
            if h.p.dtype == torch.float64 or (self.backend == "torch" and storage.plain):
                unit = torch.finfo(h.p.dtype).eps / 2  # torch's own implementation computes in the parameter's dtype
            relative = 0.0 if factor == 1 else unit * 4 + (_CLIP_ERROR if self.max_grad_norm is not None else 0)
            h.twin.step(factor * g, relative, storage, unit)

    def check(self):
        """Assert that no canary was touched, and that every number is as close to its twin as its storage promises."""
        self.guards.check()
        for h in self.held:
            state, twin = self.optimizer.state.get(h.p, {}), h.twin.reference
            storage = self.storage(h)
            assert float(state.get("step", 0)) == twin.step, f"{h.name}: step"
            near = h.twin.error["value"]
            seen = near + half_ulp(np.abs(twin.value) + near, h.p.dtype) if storage.companion else near
            self._close(h, "parameter", h.p, twin.value, seen)
            if h.place is not None and h.p.dtype != torch.float64:
                self._close(h, "weight", self.optimizer.master_weight(h.p), twin.value, near)
            for key in MOMENTS:
                if getattr(twin, key) is not None:
                    self._close(h, key, read_moment(state, key), getattr(twin, key), h.twin.error[key])

    def _close(self, held, what, actual, expected, bound):
        actual = actual.detach().double().numpy()
        excess = np.abs(actual - expected) - bound * 1.001
        if not (excess <= 0).all():
            i = np.unravel_index(int(np.argmax(np.nan_to_num(excess, nan=np.inf))), excess.shape)
            raise AssertionError(
                f"{what} of {held.name!r} {tuple(held.p.shape)} {self.storage(held)} at {tuple(map(int, i))}: "
                f"{actual[i]!r}, in float64 {expected[i]!r}, bound {bound[i]!r}"
            )

    def check_norms(self, stepped):
        """Compare the norms of the last step. `stepped` has the names of the parameters that it has updated."""
        norms = self.optimizer.norms()
        values = dict(zip(norms.names, zip(norms.weight, norms.update, norms.grad, strict=True), strict=True))
        for h in self.held:
            if h.place is None or h.twin.reference.step == 0:
                continue
            weight, update, grad = values[self._name_now(h)]
            off = 1e-5 + 1e-5 * np.linalg.norm(h.twin.reference.value) + np.linalg.norm(h.twin.error["value"])
            size = np.linalg.norm(h.twin.reference.value)
            resting = h.name not in stepped
            # The kernels know the weight after its own last step, and NaN if the tables are newer.
            known = not (resting and self.backend == "triton")
            assert abs(weight - size) <= off or not known, (
                f"{h.name} {self.storage(h)}: norm of the weight {weight}, not {size} ± {off}"
            )
            if resting:
                assert (update, grad) == (0, 0) or math.isnan(grad), f"{h.name}: a norm of a step that did not happen"
                continue
            change = np.linalg.norm(h.twin.reference.value - h.twin.before.value)
            assert abs(update - change) <= 2 * off, f"{h.name}: norm of the update"

    def _name_now(self, held):
        """Return the name of a parameter; of one without a name, its place."""
        group = self.optimizer.param_groups[held.place]
        at = next(i for i, p in enumerate(group["params"]) if p is held.p)
        return held.name if "param_names" in group else f"{held.place}.{at}"

    def tensors(self):
        """Return every tensor that a refused step must not write, by a name for messages."""
        found = {f"parameter {h.name!r}": h.p for h in self.held}
        found |= {f"gradient of {h.name!r}": g for h in self.held if (g := self.gradient(h)) is not None}
        for i, h in enumerate(self.held):
            found |= {f"{key} of {i} {h.name!r}": t for key, t in self.optimizer.state.get(h.p, {}).items()}
        return found

    def bits(self):
        """Return copies of all tensors."""
        readable = {w: t for w, t in self.tensors().items() if t.device.type == "cpu" and t.layout == torch.strided}
        return {what: _raw(t).clone() for what, t in readable.items()}

    def assert_unwritten(self, before, by):
        """Assert that every tensor of `before` is the same bits now."""
        now = self.tensors()
        for what, old in before.items():
            assert what in now, f"{by} dropped {what}"
            assert torch.equal(_raw(now[what]), old), f"{by} wrote {what}"
        self.guards.check()

    def assert_refused(self, match, error=RuntimeError, act=None):
        """Assert that a step, or another act, raises an error with this message and writes nothing."""
        before = self.bits()
        with pytest.raises(error, match=match):
            (act or self.optimizer.step)()
        self.assert_unwritten(before, "a refused step")

    def move_state(self):
        """Move all state into guarded memory. The old memory may not be written any more."""
        for h in self.held:
            state = self.optimizer.state.get(h.p, {})
            for key in [key for key in STATE if key in state]:
                if not self.guards.holds(state[key]):
                    state[key] = self.guards.copy(state[key], state[key].stride(), shift=h.p.storage_offset() % 2)


def _raw(tensor):
    """Return the bits of a tensor as integers, so that NaN equals NaN."""
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return dense.view(kinds[dense.element_size()]) if dense.ndim else dense.reshape(1).view(kinds[dense.element_size()])
