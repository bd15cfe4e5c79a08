r"""Update kernel: one AdamW step of every chunk of every parameter, with its norms.

    g <- a6 g            m <- m + a1 (g - m)        v <- v + a2 (g^2 - v)        x <- max(x, v)   (amsgrad, else x = v)
    u = m / (sqrt(x) + a5)                          d = -a3 p - a4 u             p <- p + d

a1..a6 are the coefficients of the parameter (coefficients.py). The moments are written with two fused
multiply-adds each, because 1 - beta rounds to fp32 far better than beta does: with beta2 = 0.999 the usual form
settles 1.3e-5 away from v. d is added once, so the weight is rounded once.

Division and square root round to nearest and no multiply-add is fused that is not written as one
(enable_fp_fusion off), so every path, chunking and target computes the same bits.

One program updates one chunk. Its full blocks take 16-byte accesses if all its addresses allow it; the rest, or
all of it, takes 4-byte accesses under a mask.

Bytes per element, fp32: read p g m v (16), write p m v (12); amsgrad 8 more. Per chunk 16 bytes of statistics.
"""

import triton
import triton.language as tl

from .layout import K_BLOCK, K_COEFFICIENTS, K_COUNT_BITS, K_COUNT_MASK, K_STATISTICS, K_TAIL
from .storage import element_address, load, pointer_to, store


@triton.jit
def update_blocks(
    p_address,  # byte addresses of the chunk's first elements; x_address 0: no amsgrad here
    g_address,
    m_address,
    v_address,
    x_address,
    begin,  # elements [begin, end) of the chunk, begin a multiple of SIZE
    end,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    NORMS: tl.constexpr,
    SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Update [begin, end) in blocks of SIZE; the chunk's four sums (zeros without NORMS)."""
    ALIGNED: tl.constexpr = not MASKED
    p = pointer_to(p_address, PARAM, ALIGNED)
    g = pointer_to(g_address, GRAD, ALIGNED)
    m = pointer_to(m_address, STATE, ALIGNED)
    v = pointer_to(v_address, STATE, ALIGNED)
    x = pointer_to(x_address, STATE, ALIGNED)
    sum_p = tl.zeros([SIZE], tl.float32)
    sum_d = tl.zeros([SIZE], tl.float32)
    sum_g = tl.zeros([SIZE], tl.float32)
    sum_pd = tl.zeros([SIZE], tl.float32)
    lanes = tl.arange(0, SIZE)
    x_end = tl.where(x_address != 0, end, 0)
    for i in range(begin, end, SIZE):
        offsets = i + lanes
        mask = offsets < end
        b_p = load(p, offsets, mask, MASKED)
        b_g = load(g, offsets, mask, MASKED) * a6
        b_m = load(m, offsets, mask, MASKED)
        b_v = load(v, offsets, mask, MASKED)
        b_m = tl.fma(b_g, a1, tl.fma(b_m, -a1, b_m))
        b_v = tl.fma(b_g * b_g, a2, tl.fma(b_v, -a2, b_v))
        b_x = b_v
        if AMSGRAD:
            x_mask = offsets < x_end
            b_x = tl.maximum(load(x, offsets, x_mask, True), b_v, propagate_nan=tl.PropagateNan.ALL)
            store(x, offsets, b_x, x_mask, True)
        b_u = tl.div_rn(b_m, tl.sqrt_rn(b_x) + a5)
        b_d = tl.fma(b_u, -a4, b_p * -a3)
        b_new = b_p + b_d
        store(p, offsets, b_new, mask, MASKED)
        store(m, offsets, b_m, mask, MASKED)
        store(v, offsets, b_v, mask, MASKED)
        if NORMS:
            if MASKED:
                # Outside the mask all loads gave 0, and 0 / (0 + eps) is NaN when eps is 0.
                b_d = tl.where(mask, b_d, 0.0)
                b_new = tl.where(mask, b_new, 0.0)
            sum_p = tl.fma(b_new, b_new, sum_p)
            sum_d = tl.fma(b_d, b_d, sum_d)
            sum_g = tl.fma(b_g, b_g, sum_g)
            sum_pd = tl.fma(b_p, b_d, sum_pd)
    return tl.sum(sum_p), tl.sum(sum_d), tl.sum(sum_g), tl.sum(sum_pd)


@triton.jit
def adamw_kernel(
    chunk_row,  # int32[n_chunks]  the parameter each chunk belongs to
    chunk_span,  # int64[n_chunks]  its first element within the parameter << COUNT_BITS | its elements
    addresses,  # int64[3 or 4, n_rows]  of parameter, exp_avg, exp_avg_sq; if AMSGRAD max_exp_avg_sq, 0 where there is none
    gradients,  # int64[n_rows]  addresses; not read for inactive rows
    coefficients,  # float32[n_rows, COEFFICIENTS]
    partials,  # float32[n_chunks, STATISTICS]  out if NORMS; left alone for inactive rows
    n_rows,
    PARAM: tl.constexpr,  # storage type of parameters, e.g. tl.float32
    GRAD: tl.constexpr,  # of gradients
    STATE: tl.constexpr,  # of exp_avg, exp_avg_sq, max_exp_avg_sq
    AMSGRAD: tl.constexpr,  # some parameter keeps max_exp_avg_sq
    NORMS: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    i_row = tl.load(chunk_row + i_chunk)
    span = tl.load(chunk_span + i_chunk)
    start = span >> K_COUNT_BITS
    count = (span & K_COUNT_MASK).to(tl.int32)
    row = coefficients + i_row * K_COEFFICIENTS
    a1 = tl.load(row)
    a2 = tl.load(row + 1)
    a3 = tl.load(row + 2)
    a4 = tl.load(row + 3)
    a5 = tl.load(row + 4)
    a6 = tl.load(row + 5)
    active = tl.load(row + 6).to(tl.int32)
    count *= active

    g_address = element_address(tl.load(gradients + i_row), start, GRAD)
    p_address = element_address(tl.load(addresses + i_row), start, PARAM)
    m_address = element_address(tl.load(addresses + n_rows + i_row), start, STATE)
    v_address = element_address(tl.load(addresses + 2 * n_rows + i_row), start, STATE)
    x_address = p_address * 0
    if AMSGRAD:
        x_address = tl.load(addresses + 3 * n_rows + i_row)
        x_address = tl.where(x_address != 0, element_address(x_address, start, STATE), 0)
    aligned = ((p_address | g_address | m_address | v_address | x_address) & 15) == 0
    full = tl.where(aligned, count // K_BLOCK * K_BLOCK, 0)

    p_1, d_1, g_1, pd_1 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, 0, full, a1, a2, a3, a4, a5, a6,
        PARAM, GRAD, STATE, AMSGRAD, NORMS, K_BLOCK, False,
    )  # fmt: skip
    p_2, d_2, g_2, pd_2 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, full, count, a1, a2, a3, a4, a5, a6,
        PARAM, GRAD, STATE, AMSGRAD, NORMS, K_TAIL, True,
    )  # fmt: skip
    if NORMS:
        out = partials + i_chunk * K_STATISTICS
        if active != 0:
            tl.store(out, p_1 + p_2)
            tl.store(out + 1, d_1 + d_2)
            tl.store(out + 2, g_1 + g_2)
            tl.store(out + 3, pd_1 + pd_2)
