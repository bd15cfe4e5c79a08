"""Global gradient norm for clipping: one norm for each chunk, then one sum of squares over all chunks.

Bytes per element in fp32: 4, for reading g. Clipping costs nothing else. The update multiplies by the clip factor when
it reads g again, and no kernel rewrites a gradient.

The squares of a chunk are added in fp32. If their sum leaves the range of fp32, the program reads the chunk again and adds the
squares of scaled elements. A chunk of zeros is read again too; it then lies in a cache.

The sum over chunks does not depend on their order, so regrouping parameters cannot change one bit of a clipped step. The
squares of the fp32 norms become integers on a common power-of-two scale, and integer addition is exact. One program reads all
norms twice. Its time is that of waiting for memory, so it reads many norms at once.
"""

import triton
import triton.language as tl

from .layout import (
    K_COUNT_BITS,
    K_COUNT_MASK,
    K_GRAD_BLOCK,
    K_NORM_UNIT,
    K_PARTIALS,
    K_TAIL,
    K_TOTAL_BLOCK,
    K_TOTAL_STAGES,
)
from .storage import element_address, largest_along, largest_of, load, pointer_to

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
    norms,  # float32[n_blocks * TOTAL_BLOCK]  written at the chunk's index: the norm of the unclipped gradient, times NORM_UNIT
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
    tl.store(norms + i_chunk, norm)


@triton.jit
def total_kernel(
    norms,  # float32[n_blocks * TOTAL_BLOCK]  norms of the chunks, then zeros
    total,  # float64[1]  written: the sum of the squared norms of all chunks; inf or NaN if a norm is
    n_blocks,
    BITS: tl.constexpr,  # bits of the integers, at most 52; n_chunks << BITS fits into an int64
):
    ROWS: tl.constexpr = K_TOTAL_BLOCK // K_PARTIALS
    places = norms + tl.arange(0, ROWS)[:, None] * K_PARTIALS + tl.arange(0, K_PARTIALS)[None, :]
    largest = tl.zeros([K_PARTIALS], tl.float32)
    for i in tl.range(n_blocks, num_stages=K_TOTAL_STAGES):
        largest = largest_of(largest, largest_along(tl.load(places + i * K_TOTAL_BLOCK), 0))
    # Without the sign bit, the bits of floats have the same order as integers. NaN is above inf.
    top = tl.max(largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    units = tl.zeros([K_PARTIALS], tl.int64)
    for i in tl.range(n_blocks, num_stages=K_TOTAL_STAGES):
        bits = tl.load(places + i * K_TOTAL_BLOCK).to(tl.uint32, bitcast=True)
        # With the significand s, an integer of 24 bits, `square` is s^2 2^15. Shifting it right keeps the bits above the unit.
        exponent = (bits >> 23).to(tl.int32)
        significand = (bits << 8) | tl.where(exponent > 0, 0x80000000, 0).to(tl.uint32)
        square = significand.to(tl.uint64) * (significand >> 1).to(tl.uint64)
        shift = tl.minimum(63 - BITS + 2 * ((top >> 23) - tl.maximum(exponent, 1)), 63)
        units += tl.sum((square >> shift.to(tl.uint64)).to(tl.int64), 0)
    # The unit is 2^(2 exponent of the largest norm - BITS), so every squared norm is below 2^BITS units.
    unit = ((2 * ((top >> 23) - 126) - BITS + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    result = tl.sum(units).to(tl.float64) * unit * (1.0 / (K_NORM_UNIT * K_NORM_UNIT))
    tl.store(total, tl.where(top < 0x7F800000, result, top.to(tl.float32, bitcast=True).to(tl.float64)))
