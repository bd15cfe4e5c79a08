r"""Huber decay: the proximal step of the update, and the kernel that moves the threshold of each parameter.

Huber decay maps a weight w to

    w / (1 + decay_per_step)               if |w| <= limit = (1 + decay_per_step) * threshold
    w - decay_per_step * threshold * sign(w)   otherwise

which is w - shrinkage * clip(w, -limit, limit) with shrinkage = decay_per_step / (1 + decay_per_step). decay_per_step is
lr * wd of the parameter (coefficients.py). The threshold is one number per parameter (lwadamw/state/decay.py). The kernel
adds the change of the weight, so the weight is rounded once, as with the other decay laws (docs/kernels.md).
"""

import triton
import triton.language as tl

from .layout import K_ACTIVE, K_COEFFICIENTS, K_PARTIALS


@triton.jit
def huber_numbers(decay_per_step, threshold):
    """Shrinkage and limit of a parameter."""
    limit = threshold * (1.0 + decay_per_step)
    return tl.div_rn(decay_per_step, 1.0 + decay_per_step), limit


@triton.jit
def huber_step(b_w, b_step, shrinkage, limit):
    """Change of the weights `b_w`, which first move by `b_step` and then decay."""
    b_moved = b_w + b_step
    b_clipped = tl.minimum(tl.maximum(b_moved, -limit), limit)
    return tl.fma(b_clipped, -shrinkage, b_step)


@triton.jit(do_not_specialize=["first_row"])
def threshold_kernel(
    absolutes,  # float32[n_chunks]  sum of |w| after the step
    row_chunk,  # int32[n_rows + 1]  first chunk of each parameter; the last entry is n_chunks
    row_factor,  # float64[n_rows]  factor * sum of |w| is the target of the threshold
    addresses,  # int64[n_rows]  addresses of the thresholds, float32
    coefficients,  # float32[n_rows, COEFFICIENTS]  read: column ACTIVE
    first_row,  # the row of the first program
    RATE: tl.constexpr,  # part of the distance to its target by which a threshold moves per step
):
    """One program moves the threshold of one parameter, if the parameter took the step."""
    i_row = first_row + tl.program_id(0).to(tl.int64)
    first = tl.load(row_chunk + i_row).to(tl.int64)
    last = tl.load(row_chunk + i_row + 1).to(tl.int64)
    lanes = tl.arange(0, K_PARTIALS)
    total = tl.zeros([K_PARTIALS], tl.float64)
    for i in range(first, last, K_PARTIALS):
        chunks = i + lanes
        total += tl.load(absolutes + chunks, mask=chunks < last, other=0.0)
    threshold = tl.load(addresses + i_row).to(tl.pointer_type(tl.float32))
    before = tl.load(threshold).to(tl.float64)
    after = before + RATE * (tl.sum(total) * tl.load(row_factor + i_row) - before)
    active = tl.load(coefficients + i_row * K_COEFFICIENTS + K_ACTIVE).to(tl.int32)
    if active != 0:
        tl.store(threshold, after.to(tl.float32))
