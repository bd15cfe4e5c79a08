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

from .layout import K_DRAW, K_DRAW_BITS, K_LONG_RUN, K_PHILOX_ROUNDS, K_THREADS
from .storage import of_threads


@triton.jit
def chunk_place(start, first, run, stride):
    """Where the elements of a chunk lie in the whole parameter: (base, passed, run, gap).

    The shard consists of runs of `run` elements. In the whole parameter, the runs begin `stride` elements apart, the
    first at `first`. The chunk begins at element `start` of the shard. Its element i lies n = (i + passed) // run runs
    after its first one, and has the index base + i + n gap in the whole parameter. `base` and `gap` are int64. `passed`
    and `run` are int32: runs that are longer than a chunk look alike from inside of it.
    """
    gap = stride - run
    # A quotient in float64 is exact here, because a shard has fewer than 2^52 elements. It takes fewer registers than one of
    # integers.
    before = (start.to(tl.float64) / run.to(tl.float64)).to(tl.int64)
    left = run - (start - before * run)
    short = tl.minimum(run, K_LONG_RUN)
    passed = (short - tl.minimum(left, short)).to(tl.int32)
    return first + start + before * gap, passed, short.to(tl.int32), gap


@triton.jit
def draws_of_threads(base, begin, passed, run, gap, STRIDED: tl.constexpr, EACH: tl.constexpr):
    """The draw of each thread's elements, int64[K_THREADS]: their index in the whole parameter // DRAW. See random_bits.

    Thread t has the elements [begin + t EACH, begin + (t + 1) EACH) of the chunk. All numbers are multiples of DRAW, so these
    elements lie in one run and belong to one draw.
    """
    thread = tl.arange(0, K_THREADS)
    draw = ((base + begin) >> K_DRAW_BITS) + thread // (K_DRAW // EACH)
    if STRIDED:
        # In units of 4 elements. x // r is the upper half of x * ceil(2^32 / r) if x r < 2^32, and here x r < 2^15 * 2^14.
        reciprocal = 0xFFFFFFFF // (run // 4).to(tl.uint32) + 1
        place = ((begin + passed) // 4 + thread * (EACH // 4)).to(tl.uint32)
        draw += tl.umulhi(place, reciprocal).to(tl.int64) * (gap >> K_DRAW_BITS)
    return draw


@triton.jit
def whole_indices(base, begin, passed, run, gap, STRIDED: tl.constexpr, SIZE: tl.constexpr):
    """Index in the whole parameter of the elements [begin, begin + SIZE) of a chunk, int64[SIZE]. See random_bits."""
    index = begin + tl.arange(0, SIZE)
    if STRIDED:
        return base + index + ((index + passed) // run).to(tl.int64) * gap
    else:
        return base + index


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
    base,  # int64, index in the whole parameter of the chunk's first element
    begin,  # int32, the first of SIZE elements of the chunk that follow each other
    passed,  # int32, from chunk_place, as the next two
    run,
    gap,
    seed,  # int64
    stream,  # uint32
    step,  # uint32
    STRIDED: tl.constexpr,  # if False, passed, run and gap are not used
    SIZE: tl.constexpr,
    EACH: tl.constexpr,  # neighbouring elements per thread; with 4 or 8, every draw begins at a multiple of DRAW here
):
    """Random bits of SIZE elements, int32[SIZE], from 0 to 2^16 - 1."""
    if EACH >= 4:
        draw = draws_of_threads(base, begin, passed, run, gap, STRIDED, EACH)
        w0, w1, w2, w3 = words_at(draw, seed, step, stream)
        if EACH == 8:
            return halves(tl.join(tl.join(w0, w2), tl.join(w1, w3)), SIZE)
        else:
            even = tl.arange(0, K_THREADS) % 2 == 0
            return halves(tl.join(tl.where(even, w0, w2), tl.where(even, w1, w3)), SIZE)
    else:
        whole = whole_indices(base, begin, passed, run, gap, STRIDED, SIZE)
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
def hash_bits(base, begin, passed, run, gap, key, STRIDED: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr):
    """Random bits of the elements [begin, begin + SIZE) of a chunk, int32[SIZE], from 0 to 2^16 - 1.

    The arguments are those of `random_bits`, and `key` is from `hash_key`. With 4 or 8 elements per thread, `base` has to be
    even, and a multiple of DRAW if STRIDED.
    """
    if EACH < 4:
        index = whole_indices(base, begin, passed, run, gap, STRIDED, SIZE)
        words = mixed((index // 2).to(tl.uint32) * 0x9E3779B1 + key)
        return (tl.where(index % 2 == 0, words, words >> 16) & 0xFFFF).to(tl.int32)
    else:
        lanes = tl.arange(0, SIZE // 2).to(tl.uint32)
        if STRIDED:
            draw = draws_of_threads(base, begin, passed, run, gap, STRIDED, EACH)
            index = of_threads(draw.to(tl.uint32) * (K_DRAW // 2), EACH // 2) + lanes % (K_DRAW // 2)
        else:
            index = ((base + begin) // 2).to(tl.uint32) + lanes
        return halves(mixed(index * 0x9E3779B1 + key), SIZE)
