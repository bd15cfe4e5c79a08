r"""How the weight w of a parameter is kept: in the parameter alone, or in the parameter and a companion array.

PLAIN       w = parameter, rounded to nearest
MASTER      w = companion, in fp32; the parameter is w rounded to nearest
REMAINDER   bits of w = (bits of the parameter << 16) + companion, a signed 16-bit number; exact
KAHAN       w = parameter + companion; the parameter is w rounded to nearest, the companion is what rounding lost, rounded
STOCHASTIC  w = parameter, rounded up with the probability (distance to the lower neighbour) / (spacing of the neighbours)

Other code may write to the parameter between two steps. With MASTER, an element counts as it is in the parameter if it is
no longer the rounded companion. With REMAINDER, a new upper half may make the joined bits those of a NaN. Rounding never
splits a number into such halves, so the parameter alone counts then. With KAHAN, the parameter alone counts if its sum with
the companion does not round to it.
"""

import triton
import triton.language as tl

from .layout import K_KAHAN, K_MASTER, K_REMAINDER, K_STOCHASTIC
from .storage import load, load_raw, pointer_to, rounded, store, store_raw


@triton.jit
def load_weight(p_address, c_address, offsets, mask, PARAM: tl.constexpr, WEIGHT: tl.constexpr, MASKED: tl.constexpr):
    """Load a block of the fp32 weight."""
    ALIGNED: tl.constexpr = not MASKED
    if WEIGHT == K_MASTER:
        master = load(pointer_to(c_address, tl.float32, ALIGNED), offsets, mask, MASKED)
        held = load_raw(pointer_to(p_address, PARAM, ALIGNED), offsets, mask, MASKED)
        # Bits and not values: they also tell 0 from -0, and a NaN equals itself.
        same = rounded(master, PARAM).to(tl.int16, bitcast=True) == held.to(tl.int16, bitcast=True)
        return tl.where(same, master, held.to(tl.float32))
    elif WEIGHT == K_REMAINDER:
        upper = load_raw(pointer_to(p_address, tl.int16, ALIGNED), offsets, mask, MASKED).to(tl.int32)
        lower = load_raw(pointer_to(c_address, tl.int16, ALIGNED), offsets, mask, MASKED).to(tl.int32)
        upper = upper << 16
        joined = (upper + lower).to(tl.float32, bitcast=True)
        return tl.where(joined == joined, joined, upper.to(tl.float32, bitcast=True))
    elif WEIGHT == K_KAHAN:
        held = load_raw(pointer_to(p_address, PARAM, ALIGNED), offsets, mask, MASKED)
        b_p = held.to(tl.float32)
        b_c = load(pointer_to(c_address, PARAM, ALIGNED), offsets, mask, MASKED)
        # A compensation of exactly half the spacing would round to even, perhaps away from the parameter that it belongs to.
        near = rounded(tl.fma(b_c, 1.0 - 2.0**-8, b_p), PARAM)
        return tl.where(near.to(tl.int16, bitcast=True) == held.to(tl.int16, bitcast=True), b_p + b_c, b_p)
    else:
        return load(pointer_to(p_address, PARAM, ALIGNED), offsets, mask, MASKED)


@triton.jit
def canonical_bits(block):
    """Bits of an fp32 block as int32. Every NaN gets bits that are still a NaN when they are cut in half.

    The NaN of CUDA, 0x7fffffff, would not be one any more: its rounded upper half is -0.
    """
    return tl.where(block == block, block.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def store_weight(
    p_address,
    c_address,
    offsets,
    block,
    random,  # int32[SIZE] below 2^16, read if STOCHASTIC
    mask,
    PARAM: tl.constexpr,
    WEIGHT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write a block of the fp32 weight. Returns the block as the next step will read it."""
    ALIGNED: tl.constexpr = not MASKED
    p = pointer_to(p_address, PARAM, ALIGNED)
    if WEIGHT == K_MASTER:
        store(pointer_to(c_address, tl.float32, ALIGNED), offsets, block, mask, MASKED)
        store(p, offsets, block, mask, MASKED)
        return block
    elif WEIGHT == K_REMAINDER:
        bits = canonical_bits(block)
        lower = bits.to(tl.int16)
        upper = ((bits - lower.to(tl.int32)) >> 16).to(tl.int16)
        store_raw(pointer_to(p_address, tl.int16, ALIGNED), offsets, upper, mask, MASKED)
        store_raw(pointer_to(c_address, tl.int16, ALIGNED), offsets, lower, mask, MASKED)
        return block
    elif WEIGHT == K_STOCHASTIC:
        bits = (canonical_bits(block) + random) >> 16
        store_raw(pointer_to(p_address, tl.int16, ALIGNED), offsets, bits.to(tl.int16), mask, MASKED)
        return (bits << 16).to(tl.float32, bitcast=True)
    else:
        near = rounded(block, PARAM)
        store_raw(p, offsets, near, mask, MASKED)
        kept = near.to(tl.float32)
        if WEIGHT == K_KAHAN:
            rest = rounded(block - kept, PARAM)
            store_raw(pointer_to(c_address, PARAM, ALIGNED), offsets, rest, mask, MASKED)
            kept += rest.to(tl.float32)
        return kept
