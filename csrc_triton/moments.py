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

from .layout import K_QUANT, K_THREADS
from .storage import largest_along, load, load_raw, of_threads, pointer_to, store, store_raw

TINY = tl.constexpr(2.0**-90)
# y + FLOOR is 2^23 + k for the nearest integer k of y - 0.5. So the lower bits hold k, and subtracting FLOOR gives k + 0.5.
# This needs y >= 0.25, so a shift is added to the fourth power of y, and to the threshold that it is compared with.
FLOOR = tl.constexpr(8388607.5)
SHIFT = tl.constexpr(0.00390625)  # 0.25^4
SHIFT_SQ = tl.constexpr(1.001)  # y > 1, so the code is never 0
# Keeps the largest value of a block at or below the largest code, whatever rsqrt loses.
BELOW = tl.constexpr(1.0 - 2.0**-20)


@triton.jit
def scales_at(scale_address, begin, end, EACH: tl.constexpr):
    """For each thread, a pointer to the scale of its elements, and whether they are before `end`.

    Thread t has the elements [begin + t EACH, begin + (t + 1) EACH).
    """
    first = tl.arange(0, K_THREADS) * EACH
    return scale_address.to(tl.pointer_type(tl.float32)) + begin // K_QUANT + first // K_QUANT, begin + first < end


@triton.jit
def load_moment(
    address, scale_address, begin, offsets, mask, end, TYPE: tl.constexpr, EACH: tl.constexpr, MASKED: tl.constexpr
):
    """Load a block of exp_avg or exp_avg_sq as fp32. Elements outside the mask are 0."""
    block = load(pointer_to(address, TYPE, not MASKED), offsets, mask, MASKED)
    if TYPE == tl.int8 or TYPE == tl.uint8:
        scales, there = scales_at(scale_address, begin, end, EACH)
        scale = of_threads(load_raw(scales, 0, there, MASKED), EACH)
        block *= tl.abs(block)
        block = block * scale * tl.abs(block)
        if TYPE == tl.uint8:
            block *= block
    return block


@triton.jit
def dither(bits):
    """What rounds all codes of an element: a number from -0.5 + 2^-16 to 0.5, made of its 16 random bits."""
    return (bits | 0x43000000).to(tl.float32, bitcast=True) - 128.4999847412109375


@triton.jit
def round_code(power, u, SQUARED: tl.constexpr):
    """Round `power` to the code k or k + 1 whose fourth powers enclose it. Returns an integer whose lower 8 bits are the code.

    The code is k + 1 with the probability that makes the mean of its fourth power equal to `power`. If SQUARED, the mean of
    its eighth power is equal to the square of `power`, and the code is at least 1. `u` is the dither. With h = k + 0.5, the
    code is k + 1 where `power` is above

        h^4 + 4 u h^3 + 1.5 h^2 + u h + 1/16                     the mean of k^4 and (k+1)^4, plus u times their distance
        h^4 + 4 u h^3 + (3.5 - 8 u^2) h^2 + (32 u^3 - 7 u) h + 1/16     if SQUARED: nearly the root of the same for eighth
                                                                         powers, and k^4 for u = -0.5

    So a value that is a code, or is below the code 1 of a square, is never rounded up. The root's error moves the probability
    by less than 1e-3 for k >= 10, and by less than 4e-5 for k >= 32.
    """
    if SQUARED:
        e_0: tl.constexpr = SHIFT_SQ + 0.0625
        uu = u * u
        e_1 = u * tl.fma(uu, 32.0, -7.0)
        e_2 = tl.fma(uu, -8.0, 3.5)
        power += SHIFT_SQ
    else:
        e_0: tl.constexpr = SHIFT + 0.0625
        e_1 = u
        e_2: tl.constexpr = 1.5
        power += SHIFT
    lower = tl.rsqrt(tl.rsqrt(power)) + FLOOR
    h = lower - FLOOR
    threshold = tl.fma(tl.fma(tl.fma(tl.fma(u, 4.0, h), h, e_2), h, e_1), h, e_0)
    up = (threshold - power).to(tl.uint32, bitcast=True) >> 31
    return lower.to(tl.uint32, bitcast=True) + up


@triton.jit
def store_codes(
    pointer, scale_address, begin, offsets, block, u, mask, end,
    TYPE: tl.constexpr, EACH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    LARGEST: tl.constexpr = 127.0**4 if TYPE == tl.int8 else 255.0**4
    QUOTA: tl.constexpr = K_QUANT // EACH
    block_abs = tl.abs(block)
    largest = largest_along(tl.reshape(block_abs, [K_THREADS, EACH]), 1)
    # Without the sign bit, the bits of floats have the same order as integers, and NaN is above inf. A warp has one
    # instruction for the maximum of integers.
    bits = tl.reshape(largest.to(tl.int32, bitcast=True) & 0x7FFFFFFF, [K_THREADS // QUOTA, QUOTA])
    bits = tl.broadcast_to(tl.max(bits, 1)[:, None], [K_THREADS // QUOTA, QUOTA])
    largest = tl.reshape(bits, [K_THREADS]).to(tl.float32, bitcast=True)
    zero = largest < TINY
    scales, there = scales_at(scale_address, begin, end, EACH)
    writes = tl.arange(0, K_THREADS) % QUOTA == 0
    if MASKED:
        writes = writes & there
    tl.store(scales, tl.where(zero, 0.0, largest * (1.0 / LARGEST)), mask=writes)
    # The quotient and the roots in round_code are approximate. An error in them only moves a probability. rsqrt is one
    # instruction, and a quotient takes eight.
    inverse = tl.rsqrt(tl.where(zero, 1.0, largest))
    inverse = tl.where(zero, 0.0, inverse * (LARGEST * BELOW) * inverse)
    code = round_code(block_abs * of_threads(inverse, EACH), u, TYPE == tl.uint8)
    if TYPE == tl.int8:
        sign = block.to(tl.int32, bitcast=True)
        code = (code ^ (sign >> 31).to(tl.uint32)) + (sign.to(tl.uint32) >> 31)
    store_raw(pointer, offsets, code.to(TYPE), mask, MASKED)


@triton.jit
def store_moment(
    address, scale_address, begin, offsets, block, root, u, mask, end,
    TYPE: tl.constexpr, EACH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write a block of exp_avg or exp_avg_sq. `root` is the square root of the block, which only exp_avg_sq uses.

    `u` is the dither of each element, if the moment has codes. Both moments of an element share it: if both are rounded up,
    their quotient changes least.
    """
    pointer = pointer_to(address, TYPE, not MASKED)
    if TYPE == tl.int8:
        store_codes(pointer, scale_address, begin, offsets, block, u, mask, end, TYPE, EACH, MASKED)
    elif TYPE == tl.uint8:
        store_codes(pointer, scale_address, begin, offsets, root, u, mask, end, TYPE, EACH, MASKED)
    else:
        store(pointer, offsets, block, mask, MASKED)
