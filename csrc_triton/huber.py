r"""Huber decay: the proximal step, and each parameter's threshold from what its weights have been.

    prox of tau R_delta at w:   w / (1 + tau)  where |w| <= L = (1 + tau) delta,  else  w - tau delta sign(w)
                              = w - s clip(w, -L, L)                            with s = tau / (1 + tau)

tau = lr wd is the decay coefficient of the parameter (coefficients.py), delta its threshold (lwadamw/decay.py). The second
form is added to the update, so the weight is rounded once, as it is without it.
"""

import triton
import triton.language as tl

from .layout import K_COEFFICIENTS, K_PARTIALS


@triton.jit
def huber_step(b_w, b_step, shrink, limit):
    """The change of weights that move by `b_step` and then shrink; shrink: s, limit: L."""
    b_moved = b_w + b_step
    b_clipped = tl.minimum(tl.maximum(b_moved, -limit), limit)
    return tl.fma(b_clipped, -shrink, b_step)


@triton.jit(do_not_specialize=["first_row"])
def threshold_kernel(
    absolutes,  # float32[n_chunks]  sums of |w| after the step
    row_chunk,  # int32[n_rows + 1]  first chunk of each parameter, then n_chunks
    row_factor,  # float64[n_rows]  what turns a parameter's sum into the threshold for weights that stay as they are
    addresses,  # int64[n_rows]  of the thresholds, float32
    coefficients,  # float32[n_rows, COEFFICIENTS]
    first_row,  # the row of the first program
    RATE: tl.constexpr,  # how much of the way to that a threshold goes per step
):
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
    active = tl.load(coefficients + i_row * K_COEFFICIENTS + 6).to(tl.int32)
    if active != 0:
        tl.store(threshold, after.to(tl.float32))
