r"""Update kernel: one AdamW step of every chunk of every parameter, with its norms.

For each element, with w the weight, g the gradient, m and v the moments, and the coefficients of layout.py:

    g <- clamp(GRAD_FACTOR g, -LIMIT, LIMIT)
    m <- m + ONE_MINUS_BETA1 (g - m)
    v <- v + ONE_MINUS_BETA2 (g^2 - v)
    x <- max(x, v) with amsgrad, else x = v
    u = m / (sqrt(x) + SCALED_EPS)
    d = -DECAY_PER_STEP w - STEP_SIZE u
    w <- w + d

The moments take two fused multiply-adds each. The fp32 value of 1 - beta is far more accurate than the fp32 value of
beta: with beta2 = 0.999, the usual form of the update settles 1.3e-5 away from v. d is added in one addition, so the
weight is rounded once.

The square of LIMIT is a finite number in the storage type of v, so no finite gradient makes a moment inf. m and v see the
same g, so their quotient keeps its magnitude. If g is inf or NaN, or GRAD_FACTOR is, then g becomes NaN, as in torch.

The kernel computes in fp32, whatever the storage types are: weights.py reads and writes w, moments.py reads and writes
m and v. The update uses the moments before they are rounded for storage.

If HUBER, the decay is the one of huber.py instead of -DECAY_PER_STEP w. The kernel then also leaves the sum of |w|
after the step, from which the next threshold is made.

Division and square root round to nearest. enable_fp_fusion is off, so the only fused multiply-adds are those written as
tl.fma. So every path, every chunking and every target computes the same bits.

One program updates one chunk. If all addresses of the chunk allow it, its full blocks take accesses of 16 bytes of the widest
type. The rest of the chunk, or the whole chunk, takes one element per thread under a mask.

Bytes per element in fp32: 16 for reading p, g, m and v, and 12 for writing p, m and v. amsgrad adds 8. Statistics add
16 bytes per chunk.
"""

import triton
import triton.language as tl

from .huber import huber_step
from .layout import (
    K_ACTIVE,
    K_CODED_STAGES,
    K_COEFFICIENTS,
    K_COUNT_BITS,
    K_COUNT_MASK,
    K_DECAY_PER_STEP,
    K_DOT_STATISTIC,
    K_DRAW,
    K_GRAD_FACTOR,
    K_GRAD_LIMIT,
    K_GRAD_LIMIT_FP16,
    K_GRAD_LIMIT_FP16_SQ,
    K_GRAD_STATISTIC,
    K_HASH_DRAW,
    K_KAHAN,
    K_MASTER,
    K_ONE_MINUS_BETA1,
    K_ONE_MINUS_BETA2,
    K_QUANT,
    K_REMAINDER,
    K_ROUNDING_FIRST,
    K_ROUNDING_RUN,
    K_ROUNDING_SEED,
    K_ROUNDING_STREAM,
    K_ROUNDING_STRIDE,
    K_SCALED_EPS,
    K_STAGES,
    K_STATISTICS,
    K_STEP_SIZE,
    K_STOCHASTIC,
    K_TAIL,
    K_THREADS,
    K_UPDATE_STATISTIC,
    K_WEIGHT_STATISTIC,
)
from .moments import dither, load_moment, store_moment
from .stochastic import chunk_place, hash_bits, hash_key, random_bits
from .storage import element_address, load, pointer_to, store
from .sums import add_products
from .weights import load_weight, store_weight


@triton.jit
def limit_gradient(b_raw, factor, EXP_AVG: tl.constexpr, EXP_AVG_SQ: tl.constexpr):
    """`b_raw` times `factor`, at most LIMIT in magnitude; NaN if one of the two is not finite."""
    if EXP_AVG_SQ == tl.float16:
        LIMIT: tl.constexpr = K_GRAD_LIMIT_FP16_SQ
    elif EXP_AVG == tl.float16:
        LIMIT: tl.constexpr = K_GRAD_LIMIT_FP16
    else:
        LIMIT: tl.constexpr = K_GRAD_LIMIT
    # Zero times inf or NaN is NaN. A finite element whose product with the factor overflows adds 0 here.
    return tl.fma(b_raw, factor * 0.0, tl.clamp(b_raw * factor, -LIMIT, LIMIT))


@triton.jit
def update_blocks(
    p_address,  # int64, byte address of the chunk's first element in the parameter
    g_address,  # the same in the gradient
    m_address,  # in exp_avg
    v_address,  # in exp_avg_sq
    x_address,  # in max_exp_avg_sq; 0 for a parameter without amsgrad
    c_address,  # in the companion of the weight
    ms_address,  # in the scales of exp_avg
    vs_address,  # in the scales of exp_avg_sq
    base,  # the next eight say how random bits are drawn, see stochastic.py
    passed,
    run,
    gap,
    seed,
    stream,
    step,
    key,
    begin,  # int32: the call updates the elements [begin, end) of the chunk; begin is a multiple of SIZE
    end,
    one_minus_beta1,  # float32; the next six are coefficients of layout.py
    one_minus_beta2,
    shrinkage,  # decay_per_step; if HUBER, decay_per_step / (1 + decay_per_step)
    step_size,
    scaled_eps,
    grad_factor,
    limit,  # float32, read if HUBER: where huber decay stops growing with the weight
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
    """Update the elements [begin, end) in blocks of SIZE elements.

    Returns the sums of the four statistics of layout.py, which are 0 without NORMS, and the sum of |w|, which is 0
    without HUBER.
    """
    EACH: tl.constexpr = SIZE // K_THREADS
    CODED: tl.constexpr = EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8
    STAGES: tl.constexpr = 1 if MASKED else K_CODED_STAGES if CODED else K_STAGES
    g = pointer_to(g_address, GRAD, not MASKED)
    sum_w = tl.zeros([K_THREADS], tl.float32)
    sum_d = tl.zeros([K_THREADS], tl.float32)
    sum_g = tl.zeros([K_THREADS], tl.float32)
    sum_wd = tl.zeros([K_THREADS], tl.float32)
    sum_abs = tl.zeros([K_THREADS], tl.float32)
    lanes = tl.arange(0, SIZE)
    x_end = tl.where(x_address != 0, end, 0)
    for i in tl.range(begin, end, SIZE, num_stages=STAGES):
        offsets = i + lanes
        mask = offsets < end
        b_w = load_weight(p_address, c_address, offsets, mask, PARAM, WEIGHT, MASKED)
        b_g = limit_gradient(load(g, offsets, mask, MASKED), grad_factor, EXP_AVG, EXP_AVG_SQ)
        b_m = load_moment(m_address, ms_address, i, offsets, mask, end, EXP_AVG, EACH, MASKED)
        b_v = load_moment(v_address, vs_address, i, offsets, mask, end, EXP_AVG_SQ, EACH, MASKED)
        b_m = tl.fma(b_g, one_minus_beta1, tl.fma(b_m, -one_minus_beta1, b_m))
        b_v = tl.fma(b_g * b_g, one_minus_beta2, tl.fma(b_v, -one_minus_beta2, b_v))
        b_x = b_v
        if AMSGRAD:
            x = pointer_to(x_address, EXP_AVG_SQ, not MASKED)
            x_mask = offsets < x_end
            b_x = tl.maximum(load(x, offsets, x_mask, True), b_v, propagate_nan=tl.PropagateNan.ALL)
            store(x, offsets, b_x, x_mask, True)
        if CODED:
            # The codes lose the last bits anyway. This variant is bound by instructions, not by bytes.
            b_root = tl.sqrt(b_x)
            b_inverse = tl.rsqrt(b_root + scaled_eps)
            b_u = b_m * b_inverse * b_inverse
        else:
            b_root = tl.sqrt_rn(b_x)
            b_u = tl.div_rn(b_m, b_root + scaled_eps)
        if HUBER:
            b_d = huber_step(b_w, b_u * -step_size, shrinkage, limit)
        else:
            b_d = tl.fma(b_u, -step_size, b_w * -shrinkage)
        b_new = b_w + b_d
        random = 0
        if WEIGHT == K_STOCHASTIC:
            random = random_bits(base, i, passed, run, gap, seed, stream, step, STRIDED, SIZE, EACH)
        b_kept = store_weight(p_address, c_address, offsets, b_new, random, mask, PARAM, WEIGHT, MASKED)
        u = 0
        if CODED:
            u = dither(hash_bits(base, i, passed, run, gap, key, STRIDED, SIZE, EACH))
        store_moment(m_address, ms_address, i, offsets, b_m, b_m, u, mask, end, EXP_AVG, EACH, MASKED)
        store_moment(v_address, vs_address, i, offsets, b_v, b_root, u, mask, end, EXP_AVG_SQ, EACH, MASKED)
        if HUBER:
            b_abs = tl.abs(b_kept)
            if MASKED:
                b_abs = tl.where(mask, b_abs, 0.0)
            sum_abs += tl.sum(tl.reshape(b_abs, [K_THREADS, EACH]), 1)
        if NORMS:
            if (WEIGHT != K_MASTER and WEIGHT != K_REMAINDER) and PARAM != tl.float32:
                # The update counts as it is stored: rounding may have lost a part of it.
                b_d = b_kept - b_w
            if MASKED:
                # Outside the mask every load gave 0, and 0 / (0 + eps) is NaN if eps is 0.
                b_d = tl.where(mask, b_d, 0.0)
                b_kept = tl.where(mask, b_kept, 0.0)
            # Each thread adds its own elements. So it keeps four sums, and not four values for each element.
            sum_w = add_products(sum_w, b_kept, b_kept, EACH)
            sum_d = add_products(sum_d, b_d, b_d, EACH)
            sum_g = add_products(sum_g, b_g, b_g, EACH)
            sum_wd = add_products(sum_wd, b_w, b_d, EACH)
    return tl.sum(sum_w), tl.sum(sum_d), tl.sum(sum_g), tl.sum(sum_wd), tl.sum(sum_abs)


@triton.jit(do_not_specialize=["first_chunk"])
def adamw_kernel(
    chunk_row,  # int32[n_chunks]  the parameter each chunk belongs to
    chunk_span,  # int64[n_chunks]  first element within the parameter << COUNT_BITS | number of elements
    addresses,  # int64[n_arrays, n_rows]  byte addresses of the arrays that this variant has, in the order of the code below
    gradients,  # int64[n_rows]  byte addresses; the kernel does not read them for inactive rows
    coefficients,  # float32[n_rows, COEFFICIENTS]
    partials,  # float32[n_chunks, STATISTICS]  written if NORMS, but not for inactive rows
    steps,  # float32[n_rows]  the steps taken, this one included; read if random bits are drawn
    rounding,  # int64[ROUNDING, n_rows]  read if random bits are drawn
    n_rows,
    first_chunk,  # the chunk of the first program
    PARAM: tl.constexpr,  # storage type of the parameter, for example tl.float32
    GRAD: tl.constexpr,  # storage type of the gradient
    EXP_AVG: tl.constexpr,  # storage type of exp_avg; tl.int8 means codes with scales
    EXP_AVG_SQ: tl.constexpr,  # storage type of exp_avg_sq and max_exp_avg_sq; tl.uint8 means codes with scales
    WEIGHT: tl.constexpr,  # how the weight is kept: PLAIN, MASTER, REMAINDER, KAHAN or STOCHASTIC
    STRIDED: tl.constexpr,  # whether random bits are drawn and some parameter is a shard of several runs of elements
    AMSGRAD: tl.constexpr,  # whether some parameter keeps max_exp_avg_sq; the address is 0 for a parameter that does not
    HUBER: tl.constexpr,  # whether the decay is huber decay; then `addresses` ends with the threshold of each row and, in
    # each row alike, the address of float32[n_chunks], to which the kernel writes the sums of |w|
    NORMS: tl.constexpr,  # whether the kernel writes statistics
    BLOCK: tl.constexpr,  # elements per iteration of the aligned path
):
    i_chunk = first_chunk + tl.program_id(0).to(tl.int64)
    i_row = tl.load(chunk_row + i_chunk)
    span = tl.load(chunk_span + i_chunk)
    start = span >> K_COUNT_BITS
    count = (span & K_COUNT_MASK).to(tl.int32)
    row = coefficients + i_row * K_COEFFICIENTS
    one_minus_beta1 = tl.load(row + K_ONE_MINUS_BETA1)
    one_minus_beta2 = tl.load(row + K_ONE_MINUS_BETA2)
    shrinkage = tl.load(row + K_DECAY_PER_STEP)
    step_size = tl.load(row + K_STEP_SIZE)
    scaled_eps = tl.load(row + K_SCALED_EPS)
    grad_factor = tl.load(row + K_GRAD_FACTOR)
    active = tl.load(row + K_ACTIVE).to(tl.int32)
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
    limit = shrinkage
    if HUBER:
        limit = tl.load(tl.load(address).to(tl.pointer_type(tl.float32))) * (1.0 + shrinkage)
        shrinkage = tl.div_rn(shrinkage, 1.0 + shrinkage)
    aligned = ((p_address | g_address | m_address | v_address | x_address | c_address) & 15) == 0
    base, passed, run, gap, seed, stream, step, key = 0, 0, 0, 0, 0, 0, 0, 0
    if WEIGHT == K_STOCHASTIC or (EXP_AVG == tl.int8 or EXP_AVG_SQ == tl.uint8):
        word = rounding + i_row
        seed = tl.load(word + K_ROUNDING_SEED * n_rows)
        stream = tl.load(word + K_ROUNDING_STREAM * n_rows).to(tl.uint32)
        first = tl.load(word + K_ROUNDING_FIRST * n_rows)
        step = tl.load(steps + i_row).to(tl.uint32)
        key = hash_key(seed, stream, step)
        # Words of random bits belong to several elements. The aligned loop draws each word once.
        SHARED: tl.constexpr = K_DRAW if WEIGHT == K_STOCHASTIC or STRIDED else K_HASH_DRAW
        if STRIDED:
            whole_run = tl.load(word + K_ROUNDING_RUN * n_rows)
            stride = tl.load(word + K_ROUNDING_STRIDE * n_rows)
            # The aligned loop looks up the run of a thread's elements once, so they all have to lie in it.
            aligned = aligned & (((start | whole_run) & (K_DRAW - 1)) == 0)
            base, passed, run, gap = chunk_place(start, first, whole_run, stride)
        else:
            base = first + start
        aligned = aligned & (((base | gap) & (SHARED - 1)) == 0)
    full = tl.where(aligned, count // BLOCK * BLOCK, 0)

    w_1, d_1, g_1, wd_1, abs_1 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, c_address, ms_address, vs_address,
        base, passed, run, gap, seed, stream, step, key, 0, full,
        one_minus_beta1, one_minus_beta2, shrinkage, step_size, scaled_eps, grad_factor, limit,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, STRIDED, AMSGRAD, HUBER, NORMS, BLOCK, False,
    )  # fmt: skip
    w_2, d_2, g_2, wd_2, abs_2 = update_blocks(
        p_address, g_address, m_address, v_address, x_address, c_address, ms_address, vs_address,
        base, passed, run, gap, seed, stream, step, key, full, count,
        one_minus_beta1, one_minus_beta2, shrinkage, step_size, scaled_eps, grad_factor, limit,
        PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, WEIGHT, STRIDED, AMSGRAD, HUBER, NORMS, K_TAIL, True,
    )  # fmt: skip
    if STRIDED:
        active = count  # 0 in the same rows, because no chunk is empty. Registers are short in this variant.
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
            tl.store(out + K_DOT_STATISTIC, wd_1 + wd_2)
