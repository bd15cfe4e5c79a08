r"""Moments in 8 bits: codes c and one fp32 scale s per QUANT elements, counted from the parameter's first.

    exp_avg, int8 c in -127..127      m = s sign(c) c^4         s = max |m| / 127^4
    exp_avg_sq, uint8 c in 0..255     sqrt(v) = s c^4           s = max sqrt(v) / 255^4

Fourth powers, because a block holds moments of many magnitudes; of v the root, so that both cover the same range.

Codes are rounded up or down at random such that the mean of m and of v is exact. Rounded to nearest, 0.9 m would find its
way back to m for ever while v decays, and a v with beta2 = 0.999 would not move at all. That of v is never 0 where its
block has anything else, so that a denominator cannot vanish. A block whose largest value is below TINY counts as zeros.
A scale that is inf or NaN keeps its whole block from being finite again.

One encoding is off by less than a code: |m|^1/4 and v^1/8 by 1/127 and 1/255 of the block's largest, m and sqrt(v)
themselves by at most 3.1 % and 1.6 % of it.
"""

import triton
import triton.language as tl

from .layout import K_QUANT
from .storage import load, load_raw, pointer_to, store, store_raw

TINY = tl.constexpr(2.0**-90)
# Added to a small number, 1.5 2^23 leaves its nearest integer in the lower bits, as two's complement.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def spread(b_scale, SIZE: tl.constexpr):
    """One value per QUANT elements, [SIZE / QUANT], to one per element."""
    N: tl.constexpr = SIZE // K_QUANT
    return tl.reshape(tl.broadcast_to(b_scale[:, None], [N, K_QUANT]), [SIZE])


@triton.jit
def scales_at(scale_address, begin, end, SIZE: tl.constexpr):
    """Pointers to the scales of elements [begin, begin + SIZE), and which of those blocks begin before `end`."""
    i_block = begin // K_QUANT + tl.arange(0, SIZE // K_QUANT)
    return scale_address.to(tl.pointer_type(tl.float32)) + i_block, i_block * K_QUANT < end


@triton.jit
def load_moment(
    address, scale_address, begin, offsets, mask, end, TYPE: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr
):
    """A block of exp_avg or exp_avg_sq as fp32; elements outside the mask read as 0."""
    block = load(pointer_to(address, TYPE, not MASKED), offsets, mask, MASKED)
    if TYPE == tl.int8 or TYPE == tl.uint8:
        scales, there = scales_at(scale_address, begin, end, SIZE)
        block = (block * tl.abs(block)) * (block * block) * spread(load_raw(scales, 0, there, MASKED), SIZE)
        if TYPE == tl.uint8:
            block *= block
    return block


@triton.jit
def round_code(power, random, LARGEST: tl.constexpr, SQUARED: tl.constexpr):
    """MAGIC plus the code k or k + 1 whose fourth powers `power` lies between, as bits.

    k + 1 with the probability that makes the mean of the fourth power, or of its square, that of `power`; random: 16 bits.
    """
    centred = (random << 7 | 0x3F800000).to(tl.float32, bitcast=True) - 1.4999924
    lower = tl.minimum(tl.rsqrt(tl.rsqrt(tl.maximum(power, 1e-30))) - 0.5 + MAGIC, MAGIC + (LARGEST - 1.0))
    # With x halfway between k and k + 1: the powers' distance, and their mean.
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
    # Without the sign bit floats order as integers do, NaN above inf, so neither is lost in the maximum.
    bits = tl.reshape(block.to(tl.int32, bitcast=True) & 0x7FFFFFFF, [SIZE // K_QUANT, K_QUANT])
    largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
    zero = largest < TINY
    scales, there = scales_at(scale_address, begin, end, SIZE)
    store_raw(scales, 0, tl.where(zero, 0.0, largest * (1.0 / LARGEST**4)), there, MASKED)
    # Approximate, as the roots in round_code; an error there only moves a probability. rsqrt is one instruction, a quotient
    # eight.
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
    """Write a block of exp_avg, or of exp_avg_sq with its root; of the 32 random bits per element each takes a half."""
    pointer = pointer_to(address, TYPE, not MASKED)
    if TYPE == tl.int8:
        store_codes(pointer, scale_address, begin, offsets, block, random, mask, end, TYPE, SIZE, MASKED)
    elif TYPE == tl.uint8:
        store_codes(pointer, scale_address, begin, offsets, root, random >> 16, mask, end, TYPE, SIZE, MASKED)
    else:
        store(pointer, offsets, block, mask, MASKED)
