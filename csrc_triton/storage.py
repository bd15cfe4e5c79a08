"""Typed loads and stores through raw addresses: how a tensor of any type is read as fp32 and written back.

Every kernel computes in fp32 and reaches memory through the pairs here (plain arrays), in `weights.py` (a weight kept in
one or two arrays) and in `moments.py` (8-bit moments), so another way to store something is another pair, never another
kernel.

Names, here and in every kernel file:
    *_address  int64 scalar, the byte address of a segment's first element
    i_*        index of a program, chunk, segment or block
    n_*        a count
    b_*        a block of values in registers, fp32 unless said otherwise
    UPPER      compile-time constants
"""

import triton
import triton.language as tl

from .layout import K_INTERPRETED, K_LOAD_CACHE, K_LOAD_EVICTION, K_STORE_CACHE, K_STORE_EVICTION


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """`address` as a pointer to `TYPE`; `ALIGNED` promises 16-byte alignment, which makes accesses 16 bytes wide."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def element_address(address, index, TYPE: tl.constexpr):
    """Byte address of element `index` of the array of `TYPE` that begins at `address`."""
    # In integers, because a pointer cast back and forth loses what is known of its alignment. The size is asked of a
    # value, because Triton 3.2 knows no attributes of a constexpr.
    BITS: tl.constexpr = tl.full([], 0, TYPE).dtype.primitive_bitwidth
    return address + index * (BITS // 8)


@triton.jit
def load_raw(pointer, offsets, mask, MASKED: tl.constexpr):
    """A block of any type as it is; elements outside the mask read as 0."""
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0)
    else:
        return tl.load(pointer + offsets, cache_modifier=K_LOAD_CACHE, eviction_policy=K_LOAD_EVICTION)


@triton.jit
def store_raw(pointer, offsets, block, mask, MASKED: tl.constexpr):
    """Write a block that has the pointer's type."""
    if MASKED:
        tl.store(pointer + offsets, block, mask=mask)
    else:
        tl.store(pointer + offsets, block, cache_modifier=K_STORE_CACHE, eviction_policy=K_STORE_EVICTION)


@triton.jit
def load(pointer, offsets, mask, MASKED: tl.constexpr):
    """A block of any float type, as fp32; elements outside the mask read as 0."""
    return load_raw(pointer, offsets, mask, MASKED).to(tl.float32)


@triton.jit
def rounded(block, TYPE: tl.constexpr):
    """An fp32 block rounded to nearest, ties to even, in a float type."""
    if K_INTERPRETED and TYPE == tl.bfloat16:
        # The interpreter truncates.
        bits = block.to(tl.int32, bitcast=True)
        bits = tl.where(block == block, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return block.to(TYPE)


@triton.jit
def store(pointer, offsets, block, mask, MASKED: tl.constexpr):
    """Round an fp32 block to nearest in the pointer's type and write it."""
    store_raw(pointer, offsets, rounded(block, pointer.dtype.element_ty), mask, MASKED)
