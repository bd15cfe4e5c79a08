"""Global gradient norm for clipping: one norm for each chunk, then one sum of squares over all chunks.

Bytes per element in fp32: 4, for reading g. Clipping costs nothing else. The update multiplies by the clip factor when
it reads g again, and no kernel rewrites a gradient.

The squares of a chunk are added in fp32. If their sum leaves the range of fp32, the program reads the chunk again and adds the
squares of scaled elements. A chunk of zeros is read again too; it then lies in a cache.

The sum over chunks does not depend on their order, so regrouping parameters cannot change one bit of a clipped step. The
squares of the fp32 norms become integers on a common power-of-two scale, and integer addition is exact.
"""

import triton
import triton.language as tl

from .layout import (
    K_COUNT_BITS,
    K_COUNT_MASK,
    K_GRAD_BLOCK,
    K_GRAD_STATISTIC,
    K_NORM_UNIT,
    K_PARTIALS,
    K_STATISTICS,
    K_TAIL,
)
from .storage import element_address, load, pointer_to

# A sum of squares in fp32 is exact enough if it is above LEAST: what underflowed is then far below its last digit.
LEAST = tl.constexpr(2.0**-100)
# Factors for elements that are too large and too small. They suit every fp32 number that makes the sum of squares infinite or
# less than LEAST.
SHRINK = tl.constexpr(2.0**-80)
GROW = tl.constexpr(2.0**90)


@triton.jit
def square_blocks(
    g_address, begin, end, factor, GRAD: tl.constexpr, SCALED: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr
):
    """The sum of the squares of the elements [begin, end), if SCALED times `factor` each."""
    g = pointer_to(g_address, GRAD, not MASKED)
    total = tl.zeros([SIZE], tl.float32)
    lanes = tl.arange(0, SIZE)
    for i in range(begin, end, SIZE):
        offsets = i + lanes
        b_g = load(g, offsets, offsets < end, MASKED)
        if SCALED:
            b_g *= factor
        total = tl.fma(b_g, b_g, total)
    return tl.sum(total)


@triton.jit
def grad_norm_kernel(
    chunk_row,  # int32[n_chunks]
    chunk_span,  # int64[n_chunks]  first element within the parameter << COUNT_BITS | number of elements
    gradients,  # int64[n_rows]  byte addresses; 0 for a parameter without a gradient
    partials,  # float32[n_chunks, STATISTICS]  GRAD_STATISTIC is written: the norm of the unclipped gradient, times NORM_UNIT
    GRAD: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    g_address = tl.load(gradients + tl.load(chunk_row + i_chunk))
    span = tl.load(chunk_span + i_chunk)
    count = tl.where(g_address != 0, (span & K_COUNT_MASK).to(tl.int32), 0)
    g_address = element_address(g_address, span >> K_COUNT_BITS, GRAD)
    full = tl.where((g_address & 15) == 0, count // K_GRAD_BLOCK * K_GRAD_BLOCK, 0)
    total = square_blocks(g_address, 0, full, 1.0, GRAD, False, K_GRAD_BLOCK, False)
    total += square_blocks(g_address, full, count, 1.0, GRAD, False, K_TAIL, True)
    norm = tl.sqrt_rn(total) * K_NORM_UNIT
    too_small = tl.where(total < LEAST, 1, 0)
    too_large = tl.where(total == float("inf"), 1, 0)
    if too_small + too_large != 0:
        factor = tl.where(too_small != 0, GROW, SHRINK)
        total = square_blocks(g_address, 0, full, factor, GRAD, True, K_GRAD_BLOCK, False)
        total += square_blocks(g_address, full, count, factor, GRAD, True, K_TAIL, True)
        norm = tl.sqrt_rn(total) * tl.where(too_small != 0, K_NORM_UNIT / GROW, K_NORM_UNIT / SHRINK)
    tl.store(partials + i_chunk * K_STATISTICS + K_GRAD_STATISTIC, norm)


@triton.jit
def total_kernel(
    partials,  # float32[n_chunks, STATISTICS]
    total,  # float64[1]  written: the sum of the squared norms of all chunks; inf or NaN if a norm is
    n_chunks,
    BITS: tl.constexpr,  # bits of the integers; n_chunks << BITS fits into an int64
):
    lanes = tl.arange(0, K_PARTIALS).to(tl.int64)
    norms = partials + K_GRAD_STATISTIC
    largest = tl.zeros([K_PARTIALS], tl.float32)
    for i in range(0, n_chunks, K_PARTIALS):
        b = tl.load(norms + (i + lanes) * K_STATISTICS, mask=i + lanes < n_chunks, other=0.0)
        largest = tl.maximum(largest, b, propagate_nan=tl.PropagateNan.ALL)
    # Without the sign bit, the bits of floats have the same order as integers. NaN is above inf.
    top = tl.max(largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = (top >> 23) - 126
    # The scale is 2^(BITS - 2 exponent), made from its bits. Every squared norm times the scale is below 2^BITS.
    scale = ((BITS - 2 * exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    units = tl.zeros([K_PARTIALS], tl.int64)
    for i in range(0, n_chunks, K_PARTIALS):
        b = tl.load(norms + (i + lanes) * K_STATISTICS, mask=i + lanes < n_chunks, other=0.0)
        b = tl.where(top < 0x7F800000, b, 0.0)
        b = b.to(tl.float64)
        units += (b * b * scale).to(tl.int64)
    result = tl.sum(units).to(tl.float64) / scale * (1.0 / (K_NORM_UNIT * K_NORM_UNIT))
    tl.store(total, tl.where(top < 0x7F800000, result, top.to(tl.float32, bitcast=True).to(tl.float64)))
