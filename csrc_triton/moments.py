r"""Load and store of moments: plain arrays of a float type, or 8-bit codes.

An 8-bit moment has one code c per element and one fp32 scale s per block of QUANT elements. Blocks are counted from the
first element of the parameter.

    exp_avg, int8 c in -127..127      m = s * sign(c) * c^4     s = max |m| / 127^4
    exp_avg_sq, uint8 c in 0..255     sqrt(v) = s * c^4         s = max sqrt(v) / 255^4

Codes are rounded up or down at random such that the mean of m and the mean of v are exact. A code of exp_avg_sq is at least
1 if its block has any value other than 0, so that a denominator cannot become 0. A block whose largest value is below TINY
is stored as zeros. If a value of a block is inf or NaN, the scale is inf or NaN, and the block never becomes finite again.
docs/kernels.md gives the reasons and the error of one encoding.
"""

import triton
import triton.language as tl

from .layout import K_QUANT
from .storage import load, load_raw, pointer_to, store, store_raw

TINY = tl.constexpr(2.0**-90)
# 1.5 * 2^23. The lower bits of MAGIC + x are the integer nearest to a small number x, in two's complement.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def spread(b_scale, SIZE: tl.constexpr):
    """Repeat each value of a block [SIZE / QUANT] for its QUANT elements; [SIZE]."""
    N: tl.constexpr = SIZE // K_QUANT
    return tl.reshape(tl.broadcast_to(b_scale[:, None], [N, K_QUANT]), [SIZE])


@triton.jit
def scales_at(scale_address, begin, end, SIZE: tl.constexpr):
    """Pointers to the scales of elements [begin, begin + SIZE), and a mask: the block of a scale begins before `end`."""
    i_block = begin // K_QUANT + tl.arange(0, SIZE // K_QUANT)
    return scale_address.to(tl.pointer_type(tl.float32)) + i_block, i_block * K_QUANT < end


@triton.jit
def load_moment(
    address, scale_address, begin, offsets, mask, end, TYPE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr
):
    """Read a block of exp_avg or exp_avg_sq as fp32. Elements outside the mask are 0."""
    block = load(pointer_to(address, TYPE, not MASKED), offsets, mask, MASKED)
    if TYPE == tl.int8 or TYPE == tl.uint8:
        scales, there = scales_at(scale_address, begin, end, SIZE)
        block = (block * tl.abs(block)) * (block * block) * spread(load_raw(scales, 0, there, MASKED), SIZE)
        if TYPE == tl.uint8:
            block *= block
    return block


@triton.jit
def round_code(power, random, LARGEST: tl.constexpr, SQUARED: tl.constexpr):
    """Round fourth powers to codes at random; the bits of MAGIC + code, int32.

    k^4 <= power <= (k + 1)^4 gives code k or k + 1. The probability of k + 1 makes the mean of code^4 equal to `power`, or with
    SQUARED the mean of code^8 equal to power^2. `random` has 16 bits per element.
    """
    # (random + 0.5) / 2^16 - 0.5, uniform between -0.5 and 0.5 with mean 0.
    centred = (random << 7 | 0x3F800000).to(tl.float32, bitcast=True) - 1.4999924
    lower = tl.minimum(tl.rsqrt(tl.rsqrt(tl.maximum(power, 1e-30))) - 0.5 + MAGIC, MAGIC + (LARGEST - 1.0))
    # x is halfway between k and k + 1; gap = (k + 1)^4 - k^4, and mean is the mean of the two powers.
    x = lower - MAGIC + 0.5
    xx = x * x
    gap = x * tl.fma(xx, 4.0, 1.0)
    mean = tl.fma(xx, xx + 1.5, 0.0625)
    if SQUARED:
        half = gap * 0.5
        threshold = tl.fma(centred, 2.0 * gap * mean, tl.fma(half, half, mean * mean))
        up = threshold < power * power
    else:
        up = tl.fma(centred, gap, mean) < power
    return lower.to(tl.int32, bitcast=True) + up.to(tl.int32)


@triton.jit
def store_codes(
    pointer, scale_address, begin, offsets, block, random, mask, end,
    TYPE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Encode an fp32 block and write its codes and scales. `random`: int32, the lowest 16 bits are used."""
    LARGEST: tl.constexpr = 127.0 if TYPE == tl.int8 else 255.0
    # Without the sign bit, the bits of floats have the same order as integers, and NaN is above inf. So the maximum keeps both.
    bits = tl.reshape(block.to(tl.int32, bitcast=True) & 0x7FFFFFFF, [SIZE // K_QUANT, K_QUANT])
    largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
    zero = largest < TINY
    scales, there = scales_at(scale_address, begin, end, SIZE)
    store_raw(scales, 0, tl.where(zero, 0.0, largest * (1.0 / LARGEST**4)), there, MASKED)
    # rsqrt is one instruction, a quotient is eight. rsqrt is approximate, here and in round_code, but its error only changes
    # a probability.
    inverse = tl.rsqrt(tl.where(zero, 1.0, largest))
    power = tl.abs(block) * spread(tl.where(zero, 0.0, inverse * inverse * LARGEST**4), SIZE)
    code = round_code(power, random & 0xFFFF, LARGEST, TYPE == tl.uint8) & 0xFF
    if TYPE == tl.int8:
        code = tl.where(block < 0.0, -code, code)
    else:
        code = tl.maximum(code, 1)
    store_raw(pointer, offsets, code.to(TYPE), mask, MASKED)


@triton.jit
def store_moment(
    address, scale_address, begin, offsets, block, root, random, mask, end,
    TYPE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write a block of exp_avg or exp_avg_sq.

    `root` is the square root of `block`, read for 8-bit exp_avg_sq. `random` has 32 bits per element, read for 8-bit types:
    exp_avg takes the lower half and exp_avg_sq the upper half.
    """
    pointer = pointer_to(address, TYPE, not MASKED)
    if TYPE == tl.int8:
        store_codes(pointer, scale_address, begin, offsets, block, random, mask, end, TYPE, SIZE, MASKED)
    elif TYPE == tl.uint8:
        store_codes(pointer, scale_address, begin, offsets, root, random >> 16, mask, end, TYPE, SIZE, MASKED)
    else:
        store(pointer, offsets, block, mask, MASKED)
