r"""Moments in 8 bits: a code c for each element, and one fp32 scale s for each QUANT elements of the parameter.

    exp_avg      int8, c from -127 to 127     m = s sign(c) c^4      s = max |m| / 127^4
    exp_avg_sq   uint8, c from 0 to 255       sqrt(v) = s c^4        s = max sqrt(v) / 255^4

The codes hold fourth powers, because a block holds moments of many magnitudes. exp_avg_sq holds the root of v, so that
both moments cover the same range.

Codes are rounded up or down at random, so that the mean of m and of v is exact. Rounded to nearest, 0.9 m would return
to m for ever while v decays, and v with beta2 = 0.999 would not move at all. A code of v is never 0 if its block holds
anything else, so that no denominator vanishes. A block whose largest value is below TINY counts as zeros. If a scale is
inf or NaN, its whole block stays so.

One encoding is off by less than one code. So |m|^1/4 and v^1/8 are off by at most 1/127 and 1/255 of the block's
largest value, and m and sqrt(v) by at most 3.1 % and 1.6 % of it.
"""

import triton
import triton.language as tl

from .layout import K_QUANT
from .storage import load, load_raw, pointer_to, store, store_raw

TINY = tl.constexpr(2.0**-90)
# The sum of 1.5 2^23 and a small number has the nearest integer of that number in its lower bits, as two's complement.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def spread(b_scale, SIZE: tl.constexpr):
    """Repeat the value of each block of QUANT elements, [SIZE / QUANT], for each of its elements, [SIZE]."""
    N: tl.constexpr = SIZE // K_QUANT
    return tl.reshape(tl.broadcast_to(b_scale[:, None], [N, K_QUANT]), [SIZE])


@triton.jit
def scales_at(scale_address, begin, end, SIZE: tl.constexpr):
    """Pointers to the scales of the elements [begin, begin + SIZE), and a mask of the blocks that begin before `end`."""
    i_block = begin // K_QUANT + tl.arange(0, SIZE // K_QUANT)
    return scale_address.to(tl.pointer_type(tl.float32)) + i_block, i_block * K_QUANT < end


@triton.jit
def load_moment(
    address, scale_address, begin, offsets, mask, end, TYPE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr
):
    """Load a block of exp_avg or exp_avg_sq as fp32. Elements outside the mask are 0."""
    block = load(pointer_to(address, TYPE, not MASKED), offsets, mask, MASKED)
    if TYPE == tl.int8 or TYPE == tl.uint8:
        scales, there = scales_at(scale_address, begin, end, SIZE)
        block = (block * tl.abs(block)) * (block * block) * spread(load_raw(scales, 0, there, MASKED), SIZE)
        if TYPE == tl.uint8:
            block *= block
    return block


@triton.jit
def round_code(power, random, LARGEST: tl.constexpr, SQUARED: tl.constexpr):
    """Round `power` to the code k or k + 1 whose fourth powers enclose it. Returns the bits of MAGIC plus the code.

    `random` has 16 random bits. The code is k + 1 with the probability that makes the mean of its fourth power equal to
    `power`. If SQUARED, the mean of the square of its fourth power is equal to the square of `power`.
    """
    centred = (random << 7 | 0x3F800000).to(tl.float32, bitcast=True) - 1.4999924
    lower = tl.minimum(tl.rsqrt(tl.rsqrt(tl.maximum(power, 1e-30))) - 0.5 + MAGIC, MAGIC + (LARGEST - 1.0))
    # x is halfway between k and k + 1. `gap` is the distance of the fourth powers of k and k + 1, `mean` is their mean.
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
    LARGEST: tl.constexpr = 127.0 if TYPE == tl.int8 else 255.0
    # Without the sign bit, the bits of floats have the same order as integers, and NaN is above inf. So the maximum
    # keeps both.
    bits = tl.reshape(block.to(tl.int32, bitcast=True) & 0x7FFFFFFF, [SIZE // K_QUANT, K_QUANT])
    largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
    zero = largest < TINY
    scales, there = scales_at(scale_address, begin, end, SIZE)
    store_raw(scales, 0, tl.where(zero, 0.0, largest * (1.0 / LARGEST**4)), there, MASKED)
    # The quotient and the roots in round_code are approximate. An error in them only moves a probability. rsqrt is one
    # instruction, and a quotient takes eight.
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
    """Write a block of exp_avg or exp_avg_sq. `root` is the square root of the block, which only exp_avg_sq uses.

    `random` has 32 random bits for each element. exp_avg uses the lower half, exp_avg_sq the upper half.
    """
    pointer = pointer_to(address, TYPE, not MASKED)
    if TYPE == tl.int8:
        store_codes(pointer, scale_address, begin, offsets, block, random, mask, end, TYPE, SIZE, MASKED)
    elif TYPE == tl.uint8:
        store_codes(pointer, scale_address, begin, offsets, root, random >> 16, mask, end, TYPE, SIZE, MASKED)
    else:
        store(pointer, offsets, block, mask, MASKED)
