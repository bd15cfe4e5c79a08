"""Typed loads and stores through raw addresses: a tensor of any type is read as fp32 and written back.

Every kernel computes in fp32. It reaches memory through pairs of load and store: those of this file for plain arrays,
those of `weights.py` for a weight that is kept in one or two arrays, and those of `moments.py` for 8-bit moments. So
another way to store something is another pair, and never another kernel.

Names, in every file of kernels:
    *_address  int64 scalar, the byte address of the first element of a piece of an array
    i_*        index of a program, chunk, segment or block
    n_*        a count
    b_*        a block of values in registers, fp32 unless the text says otherwise
    UPPER      a compile-time constant
"""

import triton
import triton.language as tl

from .layout import K_INTERPRETED, K_LOAD_CACHE, K_LOAD_EVICTION, K_STORE_CACHE, K_STORE_EVICTION, K_THREADS


@triton.jit
def pointer_to(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """`address` as a pointer to `TYPE`. `ALIGNED` promises 16-byte alignment, so that accesses can be 16 bytes wide.

    Where the promise does not hold, the caller's loop does not run. But a loop that loads ahead issues its first copy all the
    same, of no bytes, and the address of a 16-byte copy has to be aligned even then. So the lower bits are cleared.
    """
    if ALIGNED:
        return tl.multiple_of((address & -16).to(tl.pointer_type(TYPE)), 16)
    else:
        return address.to(tl.pointer_type(TYPE))


@triton.jit
def element_address(address, index, TYPE: tl.constexpr):
    """The byte address of element `index` of the array of `TYPE` that begins at `address`."""
    # The sum is made of integers, because the compiler forgets the alignment of a pointer that is cast back and forth. The
    # size comes from a value, because a constexpr has no attributes in Triton 3.2.
    BITS: tl.constexpr = tl.full([], 0, TYPE).dtype.primitive_bitwidth
    return address + index * (BITS // 8)


@triton.jit
def of_threads(block, EACH: tl.constexpr):
    """Repeat the value of each thread, [K_THREADS], for each of its elements, [K_THREADS * EACH]."""
    return tl.reshape(tl.broadcast_to(block[:, None], [K_THREADS, EACH]), [K_THREADS * EACH])


@triton.jit
def largest_of(a, b):
    """The larger of two floats; NaN if one of the two is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_along(block, AXIS: tl.constexpr):
    """The largest along an axis of floats that are not negative; NaN if one of them is NaN."""
    if K_INTERPRETED:
        # The interpreter takes the elements one by one if the reduction is a function of ours. The bits of floats have the same
        # order as integers, and NaN is above inf.
        bits = tl.max(block.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
        return bits.to(tl.float32, bitcast=True)
    else:
        return tl.reduce(block, AXIS, largest_of)


@triton.jit
def load_raw(pointer, offsets, mask, MASKED: tl.constexpr):
    """Load a block of any type unchanged. Elements outside the mask are 0."""
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0)
    else:
        return tl.load(pointer + offsets, cache_modifier=K_LOAD_CACHE, eviction_policy=K_LOAD_EVICTION)


@triton.jit
def store_raw(pointer, offsets, block, mask, MASKED: tl.constexpr):
    """Write a block that already has the pointer's type."""
    if MASKED:
        tl.store(pointer + offsets, block, mask=mask)
    else:
        tl.store(pointer + offsets, block, cache_modifier=K_STORE_CACHE, eviction_policy=K_STORE_EVICTION)


@triton.jit
def load(pointer, offsets, mask, MASKED: tl.constexpr):
    """Load a block of any float type as fp32. Elements outside the mask are 0."""
    return load_raw(pointer, offsets, mask, MASKED).to(tl.float32)


@triton.jit
def rounded(block, TYPE: tl.constexpr):
    """An fp32 block rounded to a float type, to nearest with ties to even."""
    if K_INTERPRETED and TYPE == tl.bfloat16:
        # The conversion of the interpreter truncates.
        bits = block.to(tl.int32, bitcast=True)
        bits = tl.where(block == block, bits + 0x7FFF + (bits >> 16 & 1), 0x7FC00000) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return block.to(TYPE)


@triton.jit
def store(pointer, offsets, block, mask, MASKED: tl.constexpr):
    """Round an fp32 block to nearest in the pointer's type, and write it."""
    store_raw(pointer, offsets, rounded(block, pointer.dtype.element_ty), mask, MASKED)
