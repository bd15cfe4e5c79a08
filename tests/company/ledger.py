"""Ledger: a parameter in float64 with bounds on the error of the optimizer's own numbers. Nothing is ever read back.

A `Twin` takes every step in float64 (`lwadamw/reference.py`) and hears of every act that others do. Beside each number it
keeps how far the optimizer's number may be from it: what was rounded so far, as every later step passes it on. So the bounds
grow with the number of steps, and they are narrow where storage is exact.
"""

import copy
from itertools import product

import numpy as np
import torch

from lwadamw import reference
from lwadamw.state.storage import CODES

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_LARGEST_CODE = {torch.int8: 127.0, torch.uint8: 255.0}
# Operations of one step, each of which may round: a generous count of what any implementation does.
_ROUNDINGS = 16


def half_ulp(values, dtype):
    """Return the largest error of rounding float64 values to nearest in a dtype."""
    info = torch.finfo(dtype)
    return info.eps / 2 * np.abs(values) + (values != 0) * (info.tiny * info.eps / 2)


def one_code(values, error, dtype):
    """Return the largest error of encoding a moment in 8 bits, in addition to `error`. Codes are steps of the fourth root."""
    size = np.abs(values) + error
    size = np.sqrt(size) if dtype == torch.uint8 else size
    root, step = size**0.25, size.max(initial=0.0) ** 0.25 / _LARGEST_CODE[dtype]
    next_code = (root + 1.01 * step) ** 4
    grown = next_code**2 - size**2 if dtype == torch.uint8 else next_code - size
    return np.where((values == 0) & (error == 0) & (dtype != torch.uint8), 0.0, grown)


class Twin:
    """A parameter in float64.

    Attributes:
        reference: weight, moments and steps in float64.
        error: bounds on the error of the optimizer's weight ("value") and moments, element by element.
        compensation: bounds on the size of `kahan_comp`, which stays when others write to the parameter.
    """

    def __init__(self, p, group):
        self.reference = reference.Parameter(p.detach().double().numpy().copy(), group)
        self.error = {"value": np.zeros(p.shape)}
        self.compensation = np.zeros(p.shape)

    def step(self, gradient, relative, storage, unit):
        """Widen the bounds by what one step may round. `reference.step` has been taken already.

        Args:
            gradient: the gradient that the step used, float64, clipped and unscaled.
            relative: relative error of this gradient.
            storage: `Storage` of the parameter.
            unit: the largest relative error of one operation.
        """
        before, after, group = self.before, self.reference, self.reference.group
        beta1, beta2 = group.betas
        g, zeros = np.abs(gradient), np.zeros(after.value.shape)
        for key, beta, new, size in (("exp_avg", beta1, g, 1), ("exp_avg_sq", beta2, g**2, 2)):
            old = zeros if getattr(before, key) is None else np.abs(getattr(before, key))
            error = beta * self.error.get(key, zeros) + (1 - beta) * new * relative * size
            error = error + _ROUNDINGS * unit * (beta * old + (1 - beta) * new)
            self.error[key] = _stored(getattr(after, key), error, getattr(storage, key))
        key = "exp_avg_sq"
        if group.amsgrad:
            key = "max_exp_avg_sq"
            error = np.maximum(self.error.get(key, zeros), self.error["exp_avg_sq"])
            self.error[key] = _stored(after.max_exp_avg_sq, error, storage.exp_avg_sq)
        lr = group.lr * group.width_lr_mult
        update, error = _update_error(after, key, self.error["exp_avg"], self.error[key], unit)
        decay = lr * group.weight_decay * group.width_wd_mult
        error = abs(1 - decay) * self.error["value"] + lr * error
        error = error + _ROUNDINGS * unit * (np.abs(before.value) + lr * np.abs(update))
        self._keep(storage, error)

    def remember(self):
        """Keep the numbers before a step, from which the step's rounding errors follow."""
        self.before = copy.copy(self.reference)

    def _keep(self, storage, error):
        """Store a weight that is off by `error`."""
        size = np.abs(self.reference.value) + error
        rounding = half_ulp(size, storage.param)
        self.compensation = 1.01 * rounding if storage.weight == "kahan" else np.zeros(size.shape)
        if storage.weight in ("master", "remainder"):
            rounding = half_ulp(size, torch.float32)
        elif storage.weight == "kahan":
            rounding = half_ulp(self.compensation * 2, storage.param)
        elif storage.weight == "stochastic":
            rounding = 2 * rounding
        self.error["value"] = error + rounding

    def write(self, values, where, storage):
        """Others have written values to some elements of the parameter.

        The weight may keep a companion that belongs to the value before, or to an equal value.

        Args:
            values: float64, exact in the dtype of the parameter.
            where: which elements have been written, bool of the shape of the parameter.
            storage: `Storage` of the parameter at this time.
        """
        values = np.broadcast_to(values, where.shape)
        rest = self.compensation
        if storage.weight in ("master", "remainder"):
            rest = 1.01 * half_ulp(values, storage.param) + torch.finfo(storage.param).tiny
        self.reference.value = np.where(where, values, self.reference.value)
        self.error["value"] = np.where(where, rest, self.error["value"])

    def scale(self, factor, storage):
        """Others have multiplied the parameter by a power of two. The companion, if there is one, has not been scaled."""
        rest = half_ulp(np.abs(self.reference.value) + self.error["value"], storage.param)
        self.reference.value = self.reference.value * factor
        self.error["value"] = self.error["value"] * factor + rest + self.compensation

    def round_to(self, dtype):
        """The parameter has been cast to a dtype. Its weight is what is left of it."""
        self.error["value"] = self.error["value"] + half_ulp(np.abs(self.reference.value) + self.error["value"], dtype)

    def forget(self, storage):
        """Others have deleted the state. The weight has become the parameter, its rounded copy."""
        if storage.companion:
            size = np.abs(self.reference.value) + self.error["value"]
            self.error["value"] = self.error["value"] + half_ulp(size, storage.param) + self.compensation
        self.compensation = np.zeros(self.compensation.shape)
        self.error = {"value": self.error["value"]}
        self.reference.step = 0
        for key in MOMENTS:
            setattr(self.reference, key, None)

    def set_moment(self, key, values):
        """Others have given a moment new values, float64, which its dtype can store exactly."""
        setattr(self.reference, key, np.broadcast_to(values, self.reference.value.shape).copy())
        self.error[key] = np.zeros(self.reference.value.shape)

    def convert(self, storage, old):
        """All moments have been rounded to nearest in new types, and the weight is kept in another way."""
        for key in MOMENTS:
            if getattr(self.reference, key) is not None:
                self.error[key] = _stored(
                    getattr(self.reference, key),
                    self.error[key],
                    storage.exp_avg if key == "exp_avg" else storage.exp_avg_sq,
                )
        if storage.weight != old.weight:
            self._keep(storage, self.error["value"])


def _stored(values, error, dtype):
    """Return the error of a moment that is off by `error` before it is stored."""
    if dtype in CODES:
        return error + one_code(values, error, dtype)
    return error + half_ulp(np.abs(values) + error, dtype)


def _update_error(after, key, error_m, error_v, unit):
    """Return the update m / (sqrt(v) + eps) and how far it may be off, from the four corners of the possible moments."""
    group, t = after.group, after.step
    corrections = 1 - group.betas[0] ** t, np.sqrt(1 - group.betas[1] ** t)
    m, v, eps = after.exp_avg, getattr(after, key), group.eps * group.width_eps_mult

    def quotient(m, v):
        return (m / corrections[0]) / (np.sqrt(np.maximum(v, 0.0)) / corrections[1] + eps)

    update = quotient(m, v)
    corners = [quotient(m + a * error_m, v + b * error_v) for a, b in product((-1, 1), repeat=2)]
    off = np.max([np.abs(corner - update) for corner in corners], axis=0)
    return update, off + _ROUNDINGS * unit * (np.abs(update) + off)
