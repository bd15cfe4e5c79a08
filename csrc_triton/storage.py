"""Typed loads and stores through raw addresses: a tensor of any type is read as fp32 and written back.

Every kernel computes in fp32. It reads and writes memory through pairs of functions: the pairs in this file for plain
arrays, the pair in `weights.py` for a weight that is kept in one or two arrays, the pair in `moments.py` for moments. A new
way to store a tensor needs a new pair and no new kernel.

Names in this file and in every kernel file:
    *_address  int64 scalar, byte address of the first element of a chunk
    i_*        index of a program, chunk, segment or block
    n_*        a count
    b_*        a block of values in registers, fp32 if the comment names no other type
    UPPER      compile-time constants
"""

import triton
import triton.language as tl

from .layout import K_INTERPRETED, K_LOAD_CACHE, K_LOAD_EVICTION, K_STORE_CACHE, K_STORE_EVICTION


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to `TYPE` at an address. `ALIGNED` promises 16-byte alignment, so that accesses can be 16 bytes wide."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def element_address(address, index, TYPE: tl.constexpr):
    """Byte address of element `index` of an array of `TYPE` that begins at `address`."""
    # The computation uses integers, because a cast from pointer to integer and back loses the known alignment. The size
    # comes from a value of TYPE, because Triton 3.2 cannot read attributes of a constexpr.
    BITS: tl.constexpr = tl.full([], 0, TYPE).dtype.primitive_bitwidth
    return address + index * (BITS // 8)


@triton.jit
def load_raw(pointer, offsets, mask, MASKED: tl.constexpr):
    """Read a block of any type without conversion. Elements outside the mask are 0."""
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0)
    else:
        return tl.load(pointer + offsets, cache_modifier=K_LOAD_CACHE, eviction_policy=K_LOAD_EVICTION)


@triton.jit
def store_raw(pointer, offsets, block, mask, MASKED: tl.constexpr):
    """Write a block whose type is the type of the pointer."""
    if MASKED:
        tl.store(pointer + offsets, block, mask=mask)
    else:
        tl.store(pointer + offsets, block, cache_modifier=K_STORE_CACHE, eviction_policy=K_STORE_EVICTION)


@triton.jit
def load(pointer, offsets, mask, MASKED: tl.constexpr):
    """Read a block of any float type as fp32. Elements outside the mask are 0."""
    return load_raw(pointer, offsets, mask, MASKED).to(tl.float32)


@triton.jit
def rounded(block, TYPE: tl.constexpr):
    """Convert an fp32 block to a float type, rounded to nearest, ties to even."""
    if K_INTERPRETED and TYPE == tl.bfloat16:
        # The interpreter truncates to bf16, so this branch rounds the bits itself.
        bits = block.to(tl.int32, bitcast=True)
        bits = tl.where(block == block, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return block.to(TYPE)


@triton.jit
def store(pointer, offsets, block, mask, MASKED: tl.constexpr):
    """Round an fp32 block to the type of the pointer, to nearest, and write it."""
    store_raw(pointer, offsets, rounded(block, pointer.dtype.element_ty), mask, MASKED)
