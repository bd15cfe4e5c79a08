r"""Update kernel: one AdamW step of every chunk of every parameter, with its norms.

    g <- a6 g            m <- m + a1 (g - m)        v <- v + a2 (g^2 - v)        x <- max(x, v)   (amsgrad, else x = v)
    u = m / (sqrt(x) + a5)                          d = -a3 w - a4 u             w <- w + d

a1..a6 are the coefficients of the parameter (coefficients.py). The moments are written with two fused
multiply-adds each, because 1 - beta rounds to fp32 far better than beta does: with beta2 = 0.999 the usual form
settles 1.3e-5 away from v. d is added once, so the weight is rounded once.

Everything is computed in fp32, from storage of any type: w through weights.py, m and v through moments.py. The update
uses m and v as they are before they are rounded to be stored.

With HUBER the decay is huber.py's instead of -a3 w, and the sum of |w| after the step is left for the next threshold.

Division and square root round to nearest and no multiply-add is fused that is not written as one
(enable_fp_fusion off), so every path, chunking and target computes the same bits.

One program updates one chunk. Its full blocks take 16-byte accesses of the widest type if all its addresses allow it;
the rest, or all of it, takes one element per thread under a mask.

Bytes per element, fp32: read p g m v (16), write p m v (12); amsgrad 8 more. Per chunk 16 bytes of statistics.
"""

import triton
import triton.language as tl

from .huber import huber_step
from .layout import (
    K_COEFFICIENTS,
    K_COUNT_BITS,
    K_COUNT_MASK,
    K_DRAW,
    K_KAHAN,
    K_MASTER,
    K_QUANT,
    K_REMAINDER,
    K_STATISTICS,
    K_STOCHASTIC,
    K_TAIL,
    K_THREADS,
)
from .moments import load_moment, store_moment
from .stochastic import hash_bits, hash_key, random_bits
from .storage import element_address, load, pointer_to, store
from .weights import load_weight, store_weight


@triton.jit
def update_blocks(
    p_address,  # byte addresses of the chunk's first elements; x_address 0: no amsgrad here
    g_address,
    m_address,
    v_address,
    x_address,
    c_address,  # the weight's companion
    ms_address,  # the moments' scales
    vs_address,
    start,  # the chunk's first element
    seed,  # what random bits are drawn with, see stochastic.py
    stream,
    first,
    run,
    stride,
    step,
    key,
    begin,  # elements [begin, end) of the chunk, begin a multiple of SIZE
    end,
    a1,
    a2,
    a3,
    a4,
    a5,
    a6,
    limit,  # read if HUBER, whose a3 is the shrinkage
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    WEIGHT: tl.constexpr,
    STRIDED: tl.constexpr,
    AMSGRAD: tl.constexpr,
    HUBER: tl.constexpr,
    NORMS: tl.constexpr,
    SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Update [begin, end) in blocks of SIZE; the chunk's four sums (zeros without NORMS), and that of |w| (0 without HUBER)."""
    EACH: tl.constexpr = SIZE // K_THREADS
    g = pointer_to(g_address, GRAD, not MASKED)
    sum_w = tl.zeros([K_THREADS], tl.float32)
    sum_d = tl.zeros([K_THREADS], tl.float32)
    sum_g = tl.zeros([K_THREADS], tl.float32)
    sum_wd = tl.zeros([K_THREADS], tl.float32)
    sum_abs = tl.zeros([K_THREADS], tl.float32)
    lanes = tl.arange(0, SIZE)
    x_end = tl.where(x_address != 0, end, 0)
    for i in range(begin, end, SIZE):
        offsets = i + lanes
        mask = offsets < end
        b_w = load_weight(p_address, c_address, offsets, mask, PARAM, WEIGHT, MASKED)
        b_g = load(g, offsets, mask, MASKED) * a6
        b_m = load_moment(m_address, ms_address, i, offsets, mask, end, EXP_AVG, SIZE, MASKED)
        b_v = load_moment(v_address, vs_address, i, offsets, mask, end, EXP_AVG_SQ, SIZE, MASKED)
        b_m = tl.fma(b_g, a1, tl.fma(b_m, -a1, b_m))
        b_v = tl.fma(b_g * b_g, a2, tl.fma(b_v, -a2, b_v))
        b_x = b_v
        if AMSGRAD:
            x = pointer_to(x_address, EXP_AVG_SQ, not MASKED)
            x_mask = offsets < x_end
            b_x = tl.maximum(load(x, offsets, x_mask, True), b_v, propagate_nan=tl.PropagateNan.ALL)
            store(x, offsets, b_x, x_mask, True)
        if EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8:
            # Their last bits are lost in the codes anyway, and this variant is short of instructions, not of bytes.
            b_root = tl.sqrt(b_x)
            b_inverse = tl.rsqrt(b_root + a5)
            b_u = b_m * b_inverse * b_inverse
        else:
            b_root = tl.sqrt_rn(b_x)
            b_u = tl.div_rn(b_m, b_root + a5)
        if HUBER:
            b_d = huber_step(b_w, b_u * -a4, a3, limit)
        else:
            b_d = tl.fma(b_u, -a4, b_w * -a3)
        b_new = b_w + b_d
        random = 0
        if WEIGHT == K_STOCHASTIC:
            random = random_bits(start + i, seed, stream, first, run, stride, step, STRIDED, SIZE, EACH)
        b_kept = store_weight(p_address, c_address, offsets, b_new, random, mask, PARAM, WEIGHT, MASKED)
        bits = 0
        if EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8:
            bits = hash_bits(start + i, first, run, stride, key, STRIDED, SIZE)
        store_moment(m_address, ms_address, i, offsets, b_m, b_m, bits, mask, end, EXP_AVG, SIZE, MASKED)
        store_moment(v_address, vs_address, i, offsets, b_v, b_root, bits, mask, end, EXP_AVG_SQ, SIZE, MASKED)
        if HUBER:
            b_abs = tl.abs(b_kept)
            if MASKED:
                b_abs = tl.where(mask, b_abs, 0.0)
            sum_abs += tl.sum(tl.reshape(b_abs, [K_THREADS, EACH]), 1)
        if NORMS:
            if (WEIGHT != K_MASTER and WEIGHT != K_REMAINDER) and PARAM != tl.float32:
                # What rounding left of the update.
                b_d = b_kept - b_w
            if MASKED:
                # Outside the mask all loads gave 0, and 0 / (0 + eps) is NaN when eps is 0.
                b_d = tl.where(mask, b_d, 0.0)
                b_kept = tl.where(mask, b_kept, 0.0)
            # Each thread adds up its own elements first, so that it keeps four sums and not four per element.
            sum_w += tl.sum(tl.reshape(b_kept * b_kept, [K_THREADS, EACH]), 1)
            sum_d += tl.sum(tl.reshape(b_d * b_d, [K_THREADS, EACH]), 1)
            sum_g += tl.sum(tl.reshape(b_g * b_g, [K_THREADS, EACH]), 1)
            sum_wd += tl.sum(tl.reshape(b_w * b_d, [K_THREADS, EACH]), 1)
    return tl.sum(sum_w), tl.sum(sum_d), tl.sum(sum_g), tl.sum(sum_wd), tl.sum(sum_abs)


@triton.jit(do_not_specialize=["first_chunk"])
def adamw_kernel(
    chunk_row,  # int32[n_chunks]  the parameter each chunk belongs to
    chunk_span,  # int64[n_chunks]  its first element within the parameter << COUNT_BITS | its elements
    addresses,  # int64[n_arrays, n_rows]  of the arrays below, those of them that the constants say there are
    gradients,  # int64[n_rows]  addresses; not read for inactive rows
    coefficients,  # float32[n_rows, COEFFICIENTS]
    partials,  # float32[n_chunks, STATISTICS]  out if NORMS; left alone for inactive rows
    steps,  # float32[n_rows]  of this step; read if STOCHASTIC
    rounding,  # int64[ROUNDING, n_rows]  read if random bits are drawn
    n_rows,
    first_chunk,  # the chunk of the first program
    PARAM: tl.constexpr,  # storage type of the parameter, e.g. tl.float32
    GRAD: tl.constexpr,  # of the gradient
    EXP_AVG: tl.constexpr,  # of exp_avg; tl.int8: codes and scales
    EXP_AVG_SQ: tl.constexpr,  # of exp_avg_sq and max_exp_avg_sq; tl.uint8: codes and scales
    WEIGHT: tl.constexpr,  # how the weight is kept: PLAIN, MASTER, REMAINDER, KAHAN or STOCHASTIC
    STRIDED: tl.constexpr,  # if random bits are drawn: some parameter is a shard of several runs of elements
    AMSGRAD: tl.constexpr,  # some parameter keeps max_exp_avg_sq; address 0 for those that do not
    HUBER: tl.constexpr,  # the decay is Huber's; two more rows of addresses: thresholds, and absolutes, float32[n_chunks], out
    NORMS: tl.constexpr,
    BLOCK: tl.constexpr,  # elements per iteration of the aligned path
):
    i_chunk = first_chunk + tl.program_id(0).to(tl.int64)
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

    address = addresses + i_row
    g_address = element_address(tl.load(gradients + i_row), start, GRAD)
    p_address = element_address(tl.load(address), start, PARAM)
    m_address = element_address(tl.load(address + n_rows), start, EXP_AVG)
    v_address = element_address(tl.load(address + 2 * n_rows), start, EXP_AVG_SQ)
    address += 3 * n_rows
    x_address = p_address * 0
    if AMSGRAD:
        x_address = tl.load(address)
        x_address = tl.where(x_address != 0, element_address(x_address, start, EXP_AVG_SQ), 0)
        address += n_rows
    c_address = p_address * 0
    if WEIGHT == K_MASTER:
        c_address = element_address(tl.load(address), start, tl.float32)
        address += n_rows
    elif WEIGHT == K_REMAINDER or WEIGHT == K_KAHAN:
        c_address = element_address(tl.load(address), start, PARAM)
        address += n_rows
    ms_address = p_address * 0
    if EXP_AVG == tl.int8:
        ms_address = element_address(tl.load(address), start // K_QUANT, tl.float32)
        address += n_rows
    vs_address = p_address * 0
    if EXP_AVG_SQ == tl.uint8:
        vs_address = element_address(tl.load(address), start // K_QUANT, tl.float32)
        address += n_rows
    limit = a3
    if HUBER:
        limit = tl.load(tl.load(address).to(tl.pointer_type(tl.float32))) * (1.0 + a3)
        a3 = tl.div_rn(a3, 1.0 + a3)
    aligned = ((p_address | g_address | m_address | v_address | x_address | c_address) & 15) == 0
    seed, stream, first, run, stride, step, key = 0, 0, 0, 0, 0, 0, 0
    if WEIGHT == K_STOCHASTIC or (EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8):
        word = rounding + i_row
        seed = tl.load(word)
        stream = tl.load(word + n_rows).to(tl.uint32)
        first = tl.load(word + 2 * n_rows)
        step = tl.load(steps + i_row).to(tl.uint32)
        key = hash_key(seed, stream, step)
        if STRIDED:
            run = tl.load(word + 3 * n_rows)
            stride = tl.load(word + 4 * n_rows)
        if WEIGHT == K_STOCHASTIC:
            aligned = aligned & (((first | run | stride) & (K_DRAW - 1)) == 0)
    full = tl.where(aligned, count // BLOCK * BLOCK, 0)

    w_1, d_1, g_1, wd_1, abs_1 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, c_address, ms_address, vs_address,
        start, seed, stream, first, run, stride, step, key, 0, full, a1, a2, a3, a4, a5, a6, limit,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, STRIDED, AMSGRAD, HUBER, NORMS, BLOCK, False,
    )  # fmt: skip
    w_2, d_2, g_2, wd_2, abs_2 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, c_address, ms_address, vs_address,
        start, seed, stream, first, run, stride, step, key, full, count, a1, a2, a3, a4, a5, a6, limit,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, STRIDED, AMSGRAD, HUBER, NORMS, K_TAIL, True,
    )  # fmt: skip
    if HUBER:
        absolutes = tl.load(address + n_rows).to(tl.pointer_type(tl.float32))
        if active != 0:
            tl.store(absolutes + i_chunk, abs_1 + abs_2)
    if NORMS:
        out = partials + i_chunk * K_STATISTICS
        if active != 0:
            tl.store(out, w_1 + w_2)
            tl.store(out + 1, d_1 + d_2)
            tl.store(out + 2, g_1 + g_2)
            tl.store(out + 3, wd_1 + wd_2)
