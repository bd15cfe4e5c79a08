"""Random bits for rounding. They come from a counter, so no generator state has to be stored.

The bits of an element depend on four numbers: the seed, the stream of the parameter, the step, and the index e of the
element in the whole (unsharded) parameter. They do not depend on grouping, chunking or sharding.

    weights        16 bits: half (e mod 2) of word (e mod 8) // 2 of Philox 4x32, whose key is the seed and whose counter is
                   (e // 8 low, e // 8 high, step, stream)
    8-bit moments  32 bits: a hash of the same four numbers, the finaliser of murmur3. Philox would take a fifth of all
                   instructions of these variants.
"""

import triton
import triton.language as tl

from .layout import K_DRAW, K_PHILOX_ROUNDS


@triton.jit
def whole_index(index, first, run, stride, STRIDED: tl.constexpr):
    """Index in the whole parameter of elements `index` of a shard.

    The shard consists of runs of `run` elements. In the whole parameter the first run begins at `first`, and the starts of
    two runs are `stride` apart. Without STRIDED there is one run.
    """
    if STRIDED:
        return first + index + index // run * (stride - run)
    else:
        return first + index


@triton.jit
def words_at(draw, seed, step, stream):
    """The four uint32 words of each draw. `draw` is the index of eight consecutive elements of the whole parameter, int64."""
    low = (draw & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, (draw >> 32).to(tl.uint32), zero + step, zero + stream, K_PHILOX_ROUNDS)


@triton.jit
def halves(words, SIZE: tl.constexpr):
    """Split uint32 words into 16-bit numbers, the lower half first; int32[SIZE]."""
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [SIZE]).to(tl.int32)


@triton.jit
def random_bits(
    begin,  # int64  the first of SIZE consecutive elements of this shard
    seed,  # int64  seed, stream, first, run and stride are of the rounding table, see layout.py
    stream,  # uint32
    first,  # int64
    run,  # int64
    stride,  # int64
    step,  # uint32  this step, counted from 1
    STRIDED: tl.constexpr,  # False: run and stride are not read
    SIZE: tl.constexpr,
    EACH: tl.constexpr,  # consecutive elements per thread; with 4 or 8, begin, first, run, stride have to be multiples of DRAW
):
    """Random bits for the weights of SIZE consecutive elements; int32[SIZE], 0 <= bits < 2^16."""
    if EACH == 8:
        draw = begin // 8 + tl.arange(0, SIZE // 8)
        w0, w1, w2, w3 = words_at(whole_index(draw, first // 8, run // 8, stride // 8, STRIDED), seed, step, stream)
        return halves(tl.join(tl.join(w0, w2), tl.join(w1, w3)), SIZE)
    elif EACH == 4:
        half = tl.arange(0, SIZE // 4)
        draw = begin // 8 + half // 2
        w0, w1, w2, w3 = words_at(whole_index(draw, first // 8, run // 8, stride // 8, STRIDED), seed, step, stream)
        return halves(tl.join(tl.where(half % 2 == 0, w0, w2), tl.where(half % 2 == 0, w1, w3)), SIZE)
    else:
        whole = whole_index(begin + tl.arange(0, SIZE), first, run, stride, STRIDED)
        w0, w1, w2, w3 = words_at(whole // K_DRAW, seed, step, stream)
        place = whole % K_DRAW
        words = tl.where(place < 4, tl.where(place < 2, w0, w1), tl.where(place < 6, w2, w3))
        return (tl.where(place % 2 == 0, words, words >> 16) & 0xFFFF).to(tl.int32)


@triton.jit
def mixed(h):
    """The 32-bit finaliser of murmur3; uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def hash_key(seed, stream, step):
    """The part of the hash that all elements of a parameter share; uint32 from int64 seed, uint32 stream and uint32 step."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return mixed(mixed(mixed(low ^ 0x9E3779B9) ^ high ^ stream) ^ step)


@triton.jit
def hash_bits(begin, first, run, stride, key, STRIDED: tl.constexpr, SIZE: tl.constexpr):
    """Random bits for the 8-bit moments of elements [begin, begin + SIZE) of this shard; int32[SIZE]. `key` is of hash_key."""
    lanes = tl.arange(0, SIZE)
    if STRIDED:
        index = whole_index(begin + lanes, first, run, stride, STRIDED).to(tl.uint32)
    else:
        index = (first + begin).to(tl.uint32) + lanes.to(tl.uint32)
    return mixed(index * 0x9E3779B1 + key).to(tl.int32, bitcast=True)
