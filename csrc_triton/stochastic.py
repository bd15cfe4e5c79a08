"""Random bits for rounding, from a counter: nothing has to be stored or carried along.

The bits depend on the seed, the stream of the parameter, the step, and the index e of the element in the whole (unsharded)
parameter. They do not depend on grouping, chunking or sharding.

Weights draw 16 bits for each element: half (e mod 2) of word (e mod 8) // 2 of Philox 4x32, with the key `seed` and the
counter (e // 8 low, e // 8 high, step, stream). 8-bit moments draw 16 bits for each element, which both moments use: half
(e mod 2) of a 32-bit hash of e // 2 and the other numbers, murmur3's finaliser. There, Philox would take a tenth of all
instructions.
"""

import triton
import triton.language as tl

from .layout import K_DRAW, K_PHILOX_ROUNDS


@triton.jit
def whole_index(index, first, run, stride, STRIDED: tl.constexpr):
    """Index in the whole parameter of elements of this shard.

    The shard consists of runs of `run` elements. In the whole parameter, the runs begin `stride` elements apart, the
    first at `first`.
    """
    if STRIDED:
        return first + index + index // run * (stride - run)
    else:
        return first + index


@triton.jit
def words_at(draw, seed, step, stream):
    """The four uint32 words of one draw of Philox, for each number of a draw in `draw`."""
    low = (draw & 0xFFFFFFFF).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, (draw >> 32).to(tl.uint32), zero + step, zero + stream, K_PHILOX_ROUNDS)


@triton.jit
def halves(words, SIZE: tl.constexpr):
    """Split uint32 words into twice as many 16-bit numbers, int32[SIZE]. The lower half of a word comes first."""
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [SIZE]).to(tl.int32)


@triton.jit
def random_bits(
    begin,  # int64, the first of SIZE elements of this shard that follow each other
    seed,  # int64; the next five are a column of the rounding table, see layout.py, and the step
    stream,  # uint32
    first,  # int64
    run,
    stride,
    step,  # uint32
    STRIDED: tl.constexpr,  # if False, run and stride are not used
    SIZE: tl.constexpr,
    EACH: tl.constexpr,  # neighbouring elements per thread; with 4 or 8, every draw begins at a multiple of DRAW here
):
    """Random bits of SIZE elements, int32[SIZE], from 0 to 2^16 - 1."""
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
    """The 32-bit finaliser of murmur3, of and to uint32."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def hash_key(seed, stream, step):
    """The key of `hash_bits`, uint32, from an int64 seed, a uint32 stream and a uint32 step."""
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    return mixed(mixed(mixed(low ^ 0x9E3779B9) ^ high ^ stream) ^ step)


@triton.jit
def hash_bits(begin, first, run, stride, key, STRIDED: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr):
    """Random bits of the elements [begin, begin + SIZE) of this shard, int32[SIZE], from 0 to 2^16 - 1.

    With 4 or 8 elements per thread, `begin`, `first`, `run` and `stride` have to be even.
    """
    if EACH < 4:
        index = whole_index(begin + tl.arange(0, SIZE), first, run, stride, STRIDED)
        words = mixed((index // 2).to(tl.uint32) * 0x9E3779B1 + key)
        return (tl.where(index % 2 == 0, words, words >> 16) & 0xFFFF).to(tl.int32)
    else:
        lanes = tl.arange(0, SIZE // 2)
        if STRIDED:
            index = whole_index(begin // 2 + lanes, first // 2, run // 2, stride // 2, STRIDED).to(tl.uint32)
        else:
            index = ((first + begin) // 2).to(tl.uint32) + lanes.to(tl.uint32)
        return halves(mixed(index * 0x9E3779B1 + key), SIZE)
