r"""Huber decay: its proximal step, and the threshold of each parameter, which follows the weights.

With r = lr wd, the DECAY_PER_STEP of the parameter (coefficients.py), and delta its threshold (lwadamw/state/decay.py),
the proximal step of r R_delta maps a weight w to

    w / (1 + r)             where |w| <= L = (1 + r) delta
    w - r delta sign(w)     elsewhere

Both lines are w - s clip(w, -L, L) with s = r / (1 + r). The kernel adds this form to the update, so the weight is
rounded once, as it is without huber decay.
"""

import triton
import triton.language as tl

from .layout import K_ACTIVE, K_COEFFICIENTS, K_PARTIALS


@triton.jit
def huber_step(b_w, b_step, shrink, limit):
    """The change of weights that move by `b_step` and then shrink. `shrink` is s, `limit` is L."""
    b_moved = b_w + b_step
    b_clipped = tl.minimum(tl.maximum(b_moved, -limit), limit)
    return tl.fma(b_clipped, -shrink, b_step)


@triton.jit
def sum_of_chunks(absolutes, row_chunk, i_row):
    """The sum of |w| of one parameter, float64, from those of its chunks."""
    first = tl.load(row_chunk + i_row).to(tl.int64)
    last = tl.load(row_chunk + i_row + 1).to(tl.int64)
    lanes = tl.arange(0, K_PARTIALS)
    total = tl.zeros([K_PARTIALS], tl.float64)
    for i in range(first, last, K_PARTIALS):
        chunks = i + lanes
        total += tl.load(absolutes + chunks, mask=chunks < last, other=0.0)
    return tl.sum(total)


@triton.jit
def absolute_kernel(
    absolutes,  # float32[n_chunks]  sums of |w| after the step
    row_chunk,  # int32[n_rows + 1]  the first chunk of each parameter; the last entry is n_chunks
    totals,  # float64[n_rows]  written: the sum of |w| of what this process holds of each parameter
):
    i_row = tl.program_id(0).to(tl.int64)
    tl.store(totals + i_row, sum_of_chunks(absolutes, row_chunk, i_row))


@triton.jit(do_not_specialize=["first_row"])
def threshold_kernel(
    absolutes,  # float32[n_chunks]  sums of |w| after the step
    row_chunk,  # int32[n_rows + 1]  the first chunk of each parameter; the last entry is n_chunks
    row_factor,  # float64[n_rows]  huber_scale / numel of the whole: times the sum of |w|, it gives the threshold of
    # constant weights
    addresses,  # int64[n_rows]  addresses of the thresholds, which are float32[]
    coefficients,  # float32[n_rows, COEFFICIENTS]
    totals,  # float64[n_rows]  sums of |w| over whole parameters; read if SPLIT
    first_row,  # the row of the first program
    RATE: tl.constexpr,  # the share of its distance to the threshold of constant weights that a threshold moves in a step
    SPLIT: tl.constexpr,  # whether other processes hold other parts of the parameters; else the chunks are the whole
):
    i_row = first_row + tl.program_id(0).to(tl.int64)
    if SPLIT:
        total = tl.load(totals + i_row)
    else:
        total = sum_of_chunks(absolutes, row_chunk, i_row)
    threshold = tl.load(addresses + i_row).to(tl.pointer_type(tl.float32))
    before = tl.load(threshold).to(tl.float64)
    after = before + RATE * (total * tl.load(row_factor + i_row) - before)
    active = tl.load(coefficients + i_row * K_COEFFICIENTS + K_ACTIVE).to(tl.int32)
    if active != 0:
        tl.store(threshold, after.to(tl.float32))
