r"""Update kernel: one AdamW step of every chunk of every parameter, and the sums for the norms.

    g <- grad_factor * g
    m <- m + one_minus_beta1 * (g - m)
    v <- v + one_minus_beta2 * (g^2 - v)
    x <- max(x, v) with amsgrad, otherwise x = v
    u = m / (sqrt(x) + eps)
    d = -decay_per_step * w - step_size * u
    w <- w + d

The factors are the coefficients of the parameter (coefficients.py). docs/kernels.md derives this form and explains why the
moments are written with two fused multiply-adds each. d is added once, so the weight is rounded once.

The kernel computes in fp32 and stores in any type: w through weights.py, m and v through moments.py. The update uses m and
v before they are rounded to the stored type.

With HUBER, d comes from huber.py, and the kernel also writes the sum of |w| after the step, from which the next threshold is
computed.

Division and square root round to nearest. The compiler option enable_fp_fusion is off, so only tl.fma fuses a multiply and an
add. Both loops, every chunking and every target therefore compute the same bits. 8-bit moments are the exception: their
division and root are approximate.

One program updates one chunk with two loops. If all addresses of the chunk allow it, the aligned loop updates its full
blocks and reads 16 bytes of the widest type per thread. The masked loop updates the rest, one element per thread.

Bytes per element, fp32: read p g m v (16), write p m v (12), with amsgrad 8 more. Bytes per chunk: 16 for the statistics.
"""

import triton
import triton.language as tl

from .huber import huber_numbers, huber_step
from .layout import (
    K_ACTIVE,
    K_COEFFICIENTS,
    K_COUNT_BITS,
    K_COUNT_MASK,
    K_DECAY_PER_STEP,
    K_DRAW,
    K_EPS,
    K_GRAD_FACTOR,
    K_GRAD_STATISTIC,
    K_KAHAN,
    K_MASTER,
    K_ONE_MINUS_BETA1,
    K_ONE_MINUS_BETA2,
    K_PRODUCT_STATISTIC,
    K_QUANT,
    K_REMAINDER,
    K_ROUNDING_FIRST,
    K_ROUNDING_RUN,
    K_ROUNDING_SEED,
    K_ROUNDING_STREAM,
    K_ROUNDING_STRIDE,
    K_STATISTICS,
    K_STEP_SIZE,
    K_STOCHASTIC,
    K_TAIL,
    K_THREADS,
    K_UPDATE_STATISTIC,
    K_WEIGHT_STATISTIC,
)
from .moments import load_moment, store_moment
from .stochastic import hash_bits, hash_key, random_bits
from .storage import element_address, load, pointer_to, store
from .weights import load_weight, store_weight


@triton.jit
def update_blocks(
    p_address,  # parameter; this and the next seven are byte addresses of the first element of the chunk
    g_address,  # gradient
    m_address,  # exp_avg
    v_address,  # exp_avg_sq
    x_address,  # max_exp_avg_sq; 0: the parameter has none
    c_address,  # companion of the weight
    ms_address,  # scales of exp_avg
    vs_address,  # scales of exp_avg_sq
    start,  # index of the first element of the chunk in its parameter
    seed,  # the next five are of the rounding table, see layout.py
    stream,
    first,
    run,
    stride,
    step,  # this step as uint32
    begin,  # the function updates elements [begin, end) of the chunk; begin is a multiple of SIZE
    end,
    one_minus_beta1,  # the next six are coefficients, see layout.py
    one_minus_beta2,
    decay_per_step,
    step_size,
    eps,
    grad_factor,
    threshold,  # threshold of huber decay; read if HUBER
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
    """Update elements [begin, end) of a chunk in blocks of SIZE.

    Returns the four statistics (0 without NORMS) and the sum of |w| after the step (0 without HUBER).
    """
    EACH: tl.constexpr = SIZE // K_THREADS
    g = pointer_to(g_address, GRAD, not MASKED)
    sum_w = tl.zeros([K_THREADS], tl.float32)
    sum_d = tl.zeros([K_THREADS], tl.float32)
    sum_g = tl.zeros([K_THREADS], tl.float32)
    sum_product = tl.zeros([K_THREADS], tl.float32)
    sum_abs = tl.zeros([K_THREADS], tl.float32)
    lanes = tl.arange(0, SIZE)
    x_end = tl.where(x_address != 0, end, 0)
    if EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8:
        key = hash_key(seed, stream, step)
    if HUBER:
        shrinkage, limit = huber_numbers(decay_per_step, threshold)
    for i in range(begin, end, SIZE):
        offsets = i + lanes
        mask = offsets < end
        b_w = load_weight(p_address, c_address, offsets, mask, PARAM, WEIGHT, MASKED)
        b_g = load(g, offsets, mask, MASKED) * grad_factor
        b_m = load_moment(m_address, ms_address, i, offsets, mask, end, EXP_AVG, SIZE, MASKED)
        b_v = load_moment(v_address, vs_address, i, offsets, mask, end, EXP_AVG_SQ, SIZE, MASKED)
        b_m = tl.fma(b_g, one_minus_beta1, tl.fma(b_m, -one_minus_beta1, b_m))
        b_v = tl.fma(b_g * b_g, one_minus_beta2, tl.fma(b_v, -one_minus_beta2, b_v))
        b_x = b_v
        if AMSGRAD:
            x = pointer_to(x_address, EXP_AVG_SQ, not MASKED)
            x_mask = offsets < x_end
            b_x = tl.maximum(load(x, offsets, x_mask, True), b_v, propagate_nan=tl.PropagateNan.ALL)
            store(x, offsets, b_x, x_mask, True)
        if EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8:
            # Encoding loses the last bits anyway, and instructions limit the speed of this variant, not bytes. So the root
            # and the quotient are approximate.
            b_root = tl.sqrt(b_x)
            b_inverse = tl.rsqrt(b_root + eps)
            b_u = b_m * b_inverse * b_inverse
        else:
            b_root = tl.sqrt_rn(b_x)
            b_u = tl.div_rn(b_m, b_root + eps)
        if HUBER:
            b_d = huber_step(b_w, b_u * -step_size, shrinkage, limit)
        else:
            b_d = tl.fma(b_u, -step_size, b_w * -decay_per_step)
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
                # The weight was rounded, so the statistics use the change that remained after rounding.
                b_d = b_kept - b_w
            if MASKED:
                # Outside the mask all loads gave 0. If eps is 0 there, 0 / (0 + eps) is NaN.
                b_d = tl.where(mask, b_d, 0.0)
                b_kept = tl.where(mask, b_kept, 0.0)
            # Each thread first adds up its own elements. So it keeps one number per sum and not one per element.
            sum_w += tl.sum(tl.reshape(b_kept * b_kept, [K_THREADS, EACH]), 1)
            sum_d += tl.sum(tl.reshape(b_d * b_d, [K_THREADS, EACH]), 1)
            sum_g += tl.sum(tl.reshape(b_g * b_g, [K_THREADS, EACH]), 1)
            sum_product += tl.sum(tl.reshape(b_w * b_d, [K_THREADS, EACH]), 1)
    return tl.sum(sum_w), tl.sum(sum_d), tl.sum(sum_g), tl.sum(sum_product), tl.sum(sum_abs)


@triton.jit(do_not_specialize=["first_chunk"])
def adamw_kernel(
    chunk_row,  # int32[n_chunks]  row of the parameter that each chunk belongs to
    chunk_span,  # int64[n_chunks]  first element of the chunk in its parameter << COUNT_BITS | number of elements
    addresses,  # int64[n_arrays, n_rows]  of the arrays of each parameter; the constants below say which arrays there are
    gradients,  # int64[n_rows]  addresses; not read for inactive rows
    coefficients,  # float32[n_rows, COEFFICIENTS]
    partials,  # float32[n_chunks, STATISTICS]  out if NORMS; not written for inactive rows
    steps,  # float32[n_rows]  this step, counted from 1; read if random bits are drawn
    rounding,  # int64[ROUNDING, n_rows]  read if random bits are drawn
    n_rows,
    first_chunk,  # the chunk of the first program
    PARAM: tl.constexpr,  # storage type of the parameter, for example tl.float32
    GRAD: tl.constexpr,  # storage type of the gradient
    EXP_AVG: tl.constexpr,  # storage type of exp_avg; tl.int8: codes and scales
    EXP_AVG_SQ: tl.constexpr,  # storage type of exp_avg_sq and max_exp_avg_sq; tl.uint8: codes and scales
    WEIGHT: tl.constexpr,  # how the weight is kept: PLAIN, MASTER, REMAINDER, KAHAN or STOCHASTIC
    STRIDED: tl.constexpr,  # random bits are drawn, and some parameter is a shard of several runs
    AMSGRAD: tl.constexpr,  # some parameter keeps max_exp_avg_sq; a parameter without it has the address 0
    HUBER: tl.constexpr,  # huber decay; addresses has two more rows: thresholds, and float32[n_chunks] for sums of |w|, out
    NORMS: tl.constexpr,  # write the statistics
    BLOCK: tl.constexpr,  # elements per iteration of the aligned loop
):
    """One program updates one chunk of one parameter. A chunk of an inactive row has no elements to update."""
    i_chunk = first_chunk + tl.program_id(0).to(tl.int64)
    i_row = tl.load(chunk_row + i_chunk)
    span = tl.load(chunk_span + i_chunk)
    start = span >> K_COUNT_BITS
    count = (span & K_COUNT_MASK).to(tl.int32)
    row = coefficients + i_row * K_COEFFICIENTS
    one_minus_beta1 = tl.load(row + K_ONE_MINUS_BETA1)
    one_minus_beta2 = tl.load(row + K_ONE_MINUS_BETA2)
    decay_per_step = tl.load(row + K_DECAY_PER_STEP)
    step_size = tl.load(row + K_STEP_SIZE)
    eps = tl.load(row + K_EPS)
    grad_factor = tl.load(row + K_GRAD_FACTOR)
    active = tl.load(row + K_ACTIVE).to(tl.int32)
    count *= active

    # The rows of `addresses` follow each other in this order. Rows of arrays that the variant does not have are missing.
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
    threshold = decay_per_step
    if HUBER:
        threshold = tl.load(tl.load(address).to(tl.pointer_type(tl.float32)))
    aligned = ((p_address | g_address | m_address | v_address | x_address | c_address) & 15) == 0
    seed, stream, first, run, stride, step = 0, 0, 0, 0, 0, 0
    if WEIGHT == K_STOCHASTIC or (EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8):
        word = rounding + i_row
        seed = tl.load(word + K_ROUNDING_SEED * n_rows)
        stream = tl.load(word + K_ROUNDING_STREAM * n_rows).to(tl.uint32)
        first = tl.load(word + K_ROUNDING_FIRST * n_rows)
        step = tl.load(steps + i_row).to(tl.uint32)
        if STRIDED:
            run = tl.load(word + K_ROUNDING_RUN * n_rows)
            stride = tl.load(word + K_ROUNDING_STRIDE * n_rows)
        if WEIGHT == K_STOCHASTIC:
            aligned = aligned & (((first | run | stride) & (K_DRAW - 1)) == 0)
    full = tl.where(aligned, count // BLOCK * BLOCK, 0)

    w_1, d_1, g_1, product_1, abs_1 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, c_address, ms_address, vs_address,
        start, seed, stream, first, run, stride, step, 0, full,
        one_minus_beta1, one_minus_beta2, decay_per_step, step_size, eps, grad_factor, threshold,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, STRIDED, AMSGRAD, HUBER, NORMS, BLOCK, False,
    )  # fmt: skip
    w_2, d_2, g_2, product_2, abs_2 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, c_address, ms_address, vs_address,
        start, seed, stream, first, run, stride, step, full, count,
        one_minus_beta1, one_minus_beta2, decay_per_step, step_size, eps, grad_factor, threshold,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, STRIDED, AMSGRAD, HUBER, NORMS, K_TAIL, True,
    )  # fmt: skip
    if HUBER:
        absolutes = tl.load(address + n_rows).to(tl.pointer_type(tl.float32))
        if active != 0:
            tl.store(absolutes + i_chunk, abs_1 + abs_2)
    if NORMS:
        out = partials + i_chunk * K_STATISTICS
        if active != 0:
            tl.store(out + K_WEIGHT_STATISTIC, w_1 + w_2)
            tl.store(out + K_UPDATE_STATISTIC, d_1 + d_2)
            tl.store(out + K_GRAD_STATISTIC, g_1 + g_2)
            tl.store(out + K_PRODUCT_STATISTIC, product_1 + product_2)
