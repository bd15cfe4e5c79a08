r"""Coefficients kernel: from hyperparameters and steps to the fp32 numbers the update multiplies with.

For every parameter, in fp64 and rounded once to fp32 (t = step + 1; eta, lambda, epsilon are base value times
width multiplier, lambda of the law that decays it, see lwadamw/decay.py; c the clip factor, s the loss scale):

    1 - beta1      1 - beta2      eta lambda      eta sqrt(1 - beta2^t) / (1 - beta1^t)
    epsilon sqrt(1 - beta2^t)     +-c / s         active

so that the update  eta (m/(1-beta1^t)) / (sqrt(v)/sqrt(1-beta2^t) + epsilon)  is  a4 m / (sqrt(v) + a5).

A parameter is inactive, and its step does not advance, when it has no gradient, when found_inf is set, or when
the global norm to clip by is not finite and the step is not to happen then. All of that is decided here, on the device,
without the host knowing; steps that do not happen for anybody are counted.

The clip factor is that of torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), NaN if the norm is.
"""

import triton
import triton.language as tl

from .layout import (
    K_COEFFICIENTS,
    K_CORRECTED,
    K_GROUP,
    K_GROUP_ADDRESSES,
    K_GROUP_KINDS,
    K_GROUP_MULTIPLIERS,
    K_GROUP_SIGN,
    K_HEADER,
    K_ROWS,
)


@triton.jit
def hyperparameter(group, INDEX: tl.constexpr, mask):
    """Value INDEX of each row's group, fp64[ROWS]: from the table, or through its address where it lives on the device."""
    value = tl.load(group + INDEX, mask=mask, other=0).to(tl.float64, bitcast=True)
    address = tl.load(group + K_GROUP_ADDRESSES + INDEX, mask=mask, other=0)
    kinds = tl.load(group + K_GROUP_KINDS, mask=mask, other=0)
    wide = (kinds & (1 << INDEX)) != 0
    there = address != 0
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=there & (wide == 0), other=0.0).to(tl.float64)
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=there & wide, other=0.0)
    return tl.where(there, single + double, value)


@triton.jit
def one_minus_power(beta, step):
    """1 - beta^step, fp64; beta = 0 gives 1."""
    return 1.0 - tl.exp(step * tl.log(tl.maximum(beta, 1e-300)))


@triton.jit
def scalar_at(address, DEFAULT: tl.constexpr):
    """The float32 at an address, or DEFAULT where the address is 0."""
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=DEFAULT)


@triton.jit(do_not_specialize=["first_row", "last_row"])
def coefficients_kernel(
    words,  # int64[HEADER + n_rows + n_groups*GROUP]  dynamic table, see layout.py
    row_group,  # int32[n_rows]  the group of each parameter
    steps,  # float32[n_rows]  steps taken so far; advanced here
    totals,  # float64[n_totals]  sums of squares that make up that of every gradient, before unscaling; read if CLIP
    coefficients,  # float32[n_rows, COEFFICIENTS]  out
    grad_norm,  # float32[]  out if CLIP: global norm before clipping, unscaled
    skipped,  # int64[]  one more if no parameter takes this step
    n_rows,
    n_totals,
    first_row,  # the rows this launch is for
    last_row,
    CLIP: tl.constexpr,
):
    rows = first_row + tl.program_id(0) * K_ROWS + tl.arange(0, K_ROWS)
    mask = rows < last_row

    loss_scale = scalar_at(tl.load(words + 1), 1.0).to(tl.float64)
    found_inf = scalar_at(tl.load(words + 2), 0.0)
    factor = 1.0 / loss_scale
    proceed = tl.where(found_inf == 0.0, 1, 0)
    if CLIP:
        max_norm = tl.load(words).to(tl.float64, bitcast=True)
        total = tl.load(totals)
        for i in range(1, n_totals):
            total += tl.load(totals + i)
        norm = tl.sqrt(total) / loss_scale
        regardless = (tl.load(words + 3) & 1) != 0
        proceed = tl.where((norm < float("inf")) | regardless, proceed, 0)
        factor *= tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
        if tl.program_id(0) == 0:
            tl.store(grad_norm, norm.to(tl.float32))
    if tl.program_id(0) == 0:
        tl.store(skipped, tl.load(skipped) + tl.where(proceed == 0, 1, 0))

    gradient = tl.load(words + K_HEADER + rows, mask=mask, other=0)
    active = gradient * proceed != 0
    step = tl.load(steps + rows, mask=mask, other=0.0) + 1.0
    tl.store(steps + rows, step, mask=mask & active)

    i_group = tl.load(row_group + rows, mask=mask, other=0).to(tl.int64)
    group = words + K_HEADER + n_rows + i_group * K_GROUP
    lr_mult = tl.load(group + K_GROUP_MULTIPLIERS, mask=mask, other=0).to(tl.float64, bitcast=True)
    wd_mult = tl.load(group + K_GROUP_MULTIPLIERS + 1, mask=mask, other=0).to(tl.float64, bitcast=True)
    eps_mult = tl.load(group + K_GROUP_MULTIPLIERS + 2, mask=mask, other=0).to(tl.float64, bitcast=True)
    sign = tl.load(group + K_GROUP_SIGN, mask=mask, other=0).to(tl.float64, bitcast=True)
    base_lr = hyperparameter(group, 0, mask)
    lr = base_lr * lr_mult
    beta1 = hyperparameter(group, 1, mask)
    beta2 = hyperparameter(group, 2, mask)
    eps = hyperparameter(group, 3, mask) * eps_mult
    corrected = (tl.load(group + K_GROUP_KINDS, mask=mask, other=0) >> K_CORRECTED & 1) != 0
    weight_decay = hyperparameter(group, 4, mask) * wd_mult * tl.where(corrected, base_lr, 1.0)

    t = step.to(tl.float64)
    root = tl.sqrt(one_minus_power(beta2, t))
    out = coefficients + rows * K_COEFFICIENTS
    tl.store(out, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(out + 1, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(out + 2, (lr * weight_decay).to(tl.float32), mask=mask)
    tl.store(out + 3, (lr * root / one_minus_power(beta1, t)).to(tl.float32), mask=mask)
    tl.store(out + 4, (eps * root).to(tl.float32), mask=mask)
    tl.store(out + 5, (sign * factor).to(tl.float32), mask=mask)
    tl.store(out + 6, active.to(tl.float32), mask=mask)
