"""Global gradient norm for clipping: one sum of squares for each chunk, then one sum over all chunks.

Bytes per element in fp32: 4, for reading g. Clipping costs nothing else. The update multiplies by the clip factor when
it reads g again, and no kernel rewrites a gradient.

The sum over chunks does not depend on their order, so regrouping parameters cannot change one bit of a clipped step. The fp32
partial sums become integers on a common power-of-two scale, and integer addition is exact.
"""

import triton
import triton.language as tl

from .layout import (
    K_COUNT_BITS,
    K_COUNT_MASK,
    K_GRAD_BLOCK,
    K_GRAD_STATISTIC,
    K_PARTIALS,
    K_STATISTICS,
    K_TAIL,
)
from .storage import element_address, load, pointer_to


@triton.jit
def square_blocks(g_address, begin, end, GRAD: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    g = pointer_to(g_address, GRAD, not MASKED)
    total = tl.zeros([SIZE], tl.float32)
    lanes = tl.arange(0, SIZE)
    for i in range(begin, end, SIZE):
        offsets = i + lanes
        b_g = load(g, offsets, offsets < end, MASKED)
        total = tl.fma(b_g, b_g, total)
    return tl.sum(total)


@triton.jit
def grad_norm_kernel(
    chunk_row,  # int32[n_chunks]
    chunk_span,  # int64[n_chunks]  first element within the parameter << COUNT_BITS | number of elements
    gradients,  # int64[n_rows]  byte addresses; 0 for a parameter without a gradient
    partials,  # float32[n_chunks, STATISTICS]  GRAD_STATISTIC is written: the sum for the unclipped gradient
    GRAD: tl.constexpr,
):
    i_chunk = tl.program_id(0).to(tl.int64)
    g_address = tl.load(gradients + tl.load(chunk_row + i_chunk))
    span = tl.load(chunk_span + i_chunk)
    count = tl.where(g_address != 0, (span & K_COUNT_MASK).to(tl.int32), 0)
    g_address = element_address(g_address, span >> K_COUNT_BITS, GRAD)
    full = tl.where((g_address & 15) == 0, count // K_GRAD_BLOCK * K_GRAD_BLOCK, 0)
    total = square_blocks(g_address, 0, full, GRAD, K_GRAD_BLOCK, False)
    total += square_blocks(g_address, full, count, GRAD, K_TAIL, True)
    tl.store(partials + i_chunk * K_STATISTICS + K_GRAD_STATISTIC, total)


@triton.jit
def total_kernel(
    partials,  # float32[n_chunks, STATISTICS]
    total,  # float64[1]  written: the sum over all chunks; inf or NaN if a partial sum is
    n_chunks,
    BITS: tl.constexpr,  # bits of the integers; n_chunks << BITS fits into an int64
):
    lanes = tl.arange(0, K_PARTIALS).to(tl.int64)
    squares = partials + K_GRAD_STATISTIC
    largest = tl.zeros([K_PARTIALS], tl.float32)
    for i in range(0, n_chunks, K_PARTIALS):
        b = tl.load(squares + (i + lanes) * K_STATISTICS, mask=i + lanes < n_chunks, other=0.0)
        largest = tl.maximum(largest, b, propagate_nan=tl.PropagateNan.ALL)
    # Without the sign bit, the bits of floats have the same order as integers. NaN is above inf.
    top = tl.max(largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = (top >> 23) - 126
    # The scale is 2^(BITS - exponent), made from its bits. Every partial sum times the scale is below 2^BITS.
    scale = ((BITS - exponent + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    units = tl.zeros([K_PARTIALS], tl.int64)
    for i in range(0, n_chunks, K_PARTIALS):
        b = tl.load(squares + (i + lanes) * K_STATISTICS, mask=i + lanes < n_chunks, other=0.0)
        b = tl.where(top < 0x7F800000, b, 0.0)
        units += (b.to(tl.float64) * scale).to(tl.int64)
    result = tl.sum(units).to(tl.float64) / scale
    tl.store(total, tl.where(top < 0x7F800000, result, top.to(tl.float32, bitcast=True).to(tl.float64)))
