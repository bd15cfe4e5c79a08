r"""Coefficients kernel: from hyperparameters and steps to the fp32 numbers that the update multiplies with.

The kernel computes in fp64 and rounds each coefficient once to fp32. With t = step + 1, and eta, lambda and epsilon the
base values times their width multipliers (lambda also takes the factor of the decay law, see lwadamw/state/decay.py),
the columns are:

    ONE_MINUS_BETA1    1 - beta1
    ONE_MINUS_BETA2    1 - beta2
    DECAY_PER_STEP     eta lambda
    STEP_SIZE          eta sqrt(1 - beta2^t) / (1 - beta1^t)
    SCALED_EPS         epsilon sqrt(1 - beta2^t)
    GRAD_FACTOR        +-clip / loss_scale
    ACTIVE             1 or 0

So eta (m/(1-beta1^t)) / (sqrt(v)/sqrt(1-beta2^t) + epsilon), the update of AdamW, is STEP_SIZE m / (sqrt(v) + SCALED_EPS).

A parameter is inactive, and its step does not advance, in three cases: it has no gradient, found_inf is set, or the
global norm to clip by is not finite and such steps are to be skipped. The device decides all of this, and the host does
not know. The kernel counts the steps that no parameter takes.

The clip factor is the one of torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), or NaN if the norm is NaN.
"""

import triton
import triton.language as tl

from .layout import (
    K_ACTIVE,
    K_COEFFICIENTS,
    K_CORRECTED,
    K_DECAY_PER_STEP,
    K_GRAD_FACTOR,
    K_GROUP,
    K_GROUP_ADDRESSES,
    K_GROUP_BETA1,
    K_GROUP_BETA2,
    K_GROUP_EPS,
    K_GROUP_KINDS,
    K_GROUP_LR,
    K_GROUP_MULTIPLIERS,
    K_GROUP_SIGN,
    K_GROUP_WEIGHT_DECAY,
    K_HEADER,
    K_HEADER_FLAGS,
    K_HEADER_FOUND_INF,
    K_HEADER_GRAD_SCALE,
    K_HEADER_MAX_NORM,
    K_ONE_MINUS_BETA1,
    K_ONE_MINUS_BETA2,
    K_ROWS,
    K_SCALED_EPS,
    K_STEP_SIZE,
)

LARGEST = tl.constexpr((2.0 - 2.0**-23) * 2.0**127)  # of all fp32 numbers


@triton.jit
def hyperparameter(group, INDEX: tl.constexpr, mask):
    """Base value INDEX of each row's group, fp64[ROWS].

    The value is read from the table. If the table has an address for it, the value is read there.
    """
    value = tl.load(group + INDEX, mask=mask, other=0).to(tl.float64, bitcast=True)
    address = tl.load(group + K_GROUP_ADDRESSES + INDEX, mask=mask, other=0)
    kinds = tl.load(group + K_GROUP_KINDS, mask=mask, other=0)
    wide = (kinds >> INDEX & 1) != 0
    there = address != 0
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=there & (wide == 0), other=0.0).to(tl.float64)
    double = tl.load(address.to(tl.pointer_type(tl.float64)), mask=there & wide, other=0.0)
    return tl.where(there, single + double, value)


@triton.jit
def one_minus_power(beta, step):
    """1 - beta^step, fp64. For beta = 0 the result is 1."""
    return 1.0 - tl.exp(step * tl.log(tl.maximum(beta, 1e-300)))


@triton.jit
def scalar_at(address, DEFAULT: tl.constexpr):
    """The float32 at an address, or DEFAULT if the address is 0."""
    return tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=DEFAULT)


@triton.jit(do_not_specialize=["first_row", "last_row"])
def coefficients_kernel(
    words,  # int64[HEADER + n_rows + n_groups*GROUP]  the dynamic table, see layout.py
    row_group,  # int32[n_rows]  the group of each parameter
    steps,  # float32[n_rows]  the steps taken so far; the kernel advances them
    totals,  # float64[n_totals]  their sum is the square of the global norm of the scaled gradients; read if CLIP
    coefficients,  # float32[n_rows, COEFFICIENTS]  written
    grad_norm,  # float32[]  written if CLIP: the global norm of the unscaled gradients, before clipping; LARGEST if larger
    skipped,  # int64[]  advanced by one if no parameter takes this step
    n_rows,
    n_totals,
    first_row,  # this launch computes the rows [first_row, last_row)
    last_row,
    CLIP: tl.constexpr,
):
    rows = first_row + tl.program_id(0) * K_ROWS + tl.arange(0, K_ROWS)
    mask = rows < last_row

    loss_scale = scalar_at(tl.load(words + K_HEADER_GRAD_SCALE), 1.0).to(tl.float64)
    found_inf = scalar_at(tl.load(words + K_HEADER_FOUND_INF), 0.0)
    factor = 1.0 / loss_scale
    proceed = tl.where(found_inf == 0.0, 1, 0)
    if CLIP:
        max_norm = tl.load(words + K_HEADER_MAX_NORM).to(tl.float64, bitcast=True)
        total = tl.load(totals)
        for i in range(1, n_totals):
            total += tl.load(totals + i)
        norm = tl.sqrt(total) / loss_scale
        regardless = (tl.load(words + K_HEADER_FLAGS) & 1) != 0
        proceed = tl.where((norm < float("inf")) | regardless, proceed, 0)
        factor *= tl.minimum(max_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
        if tl.program_id(0) == 0:
            # Conversion to fp32 would make a large norm inf, and only a step that did not happen has this norm.
            tl.store(grad_norm, tl.where(norm < float("inf"), tl.minimum(norm, LARGEST), norm).to(tl.float32))
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
    base_lr = hyperparameter(group, K_GROUP_LR, mask)
    lr = base_lr * lr_mult
    beta1 = hyperparameter(group, K_GROUP_BETA1, mask)
    beta2 = hyperparameter(group, K_GROUP_BETA2, mask)
    eps = hyperparameter(group, K_GROUP_EPS, mask) * eps_mult
    corrected = (tl.load(group + K_GROUP_KINDS, mask=mask, other=0) >> K_CORRECTED & 1) != 0
    weight_decay = hyperparameter(group, K_GROUP_WEIGHT_DECAY, mask) * wd_mult * tl.where(corrected, base_lr, 1.0)

    t = step.to(tl.float64)
    root = tl.sqrt(one_minus_power(beta2, t))
    out = coefficients + rows * K_COEFFICIENTS
    tl.store(out + K_ONE_MINUS_BETA1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(out + K_ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(out + K_DECAY_PER_STEP, (lr * weight_decay).to(tl.float32), mask=mask)
    tl.store(out + K_STEP_SIZE, (lr * root / one_minus_power(beta1, t)).to(tl.float32), mask=mask)
    tl.store(out + K_SCALED_EPS, (eps * root).to(tl.float32), mask=mask)
    tl.store(out + K_GRAD_FACTOR, (sign * factor).to(tl.float32), mask=mask)
    tl.store(out + K_ACTIVE, active.to(tl.float32), mask=mask)
