"""Layout of the device tables that the kernels and the plan share, and the launch constants.

Everything here is a number that one measured run may change; nothing else in the package repeats any of them.
"""

import os

import triton.language as tl

# Elements per iteration of the aligned path where some bulk array is fp32: 16 bytes of that per thread at 256 threads.
# Where all are 16-bit, twice as many. A thread holds the same elements of every array, so none passes through shared memory.
BLOCK = 1024
# Registers per thread that the compiler is held to so that three programs share a multiprocessor: of variants with twice as
# many elements, and of those that draw random bits.
DOUBLE_REGISTERS = 80
RANDOM_REGISTERS = 72
# Elements per iteration of the masked path (a chunk's last elements, unaligned tensors). Small, because its
# per-element addresses and masks would otherwise set the register count of the whole kernel.
TAIL = 256
# Threads per program, and that divided by the width of a warp, by backend.
THREADS = 256
WARPS = {"cuda": THREADS // 32, "hip": THREADS // 64}
# Elements per iteration of the gradient norm's aligned path: it reads one array, so it keeps more of it on its way.
GRAD_BLOCK = 2 * BLOCK
# A chunk has MIN_CHUNK to MAX_CHUNK elements, as few as still make TARGET_CHUNKS chunks of all of them.
MIN_CHUNK = GRAD_BLOCK
MAX_CHUNK = 16 * BLOCK
TARGET_CHUNKS = 2048
# A chunk's first element and its number of elements share an int64: start << COUNT_BITS | count.
COUNT_BITS = 20
# Rows of coefficients computed by one program.
ROWS = 128
# Partial sums read per iteration by the reductions.
PARTIALS = 1024

# Cache hints of the aligned path: "", ".ca", ".cg" for loads, "", ".wb", ".cg", ".cs", ".wt" for stores; "", "evict_first",
# "evict_last". Unset until a measurement asks for one.
LOAD_CACHE = ""
LOAD_EVICTION = ""
STORE_CACHE = ""
STORE_EVICTION = ""

# Coefficients of one parameter, fp32[COEFFICIENTS]: 1 - beta1, 1 - beta2, lr*wd, lr*sqrt(1 - beta2^t)/(1 - beta1^t),
# eps*sqrt(1 - beta2^t), factor of the gradient (sign, clipping, unscaling), 1 if the step happens else 0.
COEFFICIENTS = 7

# Statistics of one chunk or segment: sums of squares of weight, update, gradient, and <weight before, update>.
# Until the update overwrites it, the gradient's is that before clipping, which the global norm is made of.
STATISTICS = 4
GRAD_STATISTIC = 2

# How the weight of a parameter is kept. PLAIN: in the parameter. MASTER: in an fp32 companion, of which the parameter is
# the rounded copy. REMAINDER: bf16 parameter and int16 companion are the upper and lower half of the fp32 weight. KAHAN:
# the companion, of the parameter's type, is what rounding the parameter left over. STOCHASTIC: in the parameter, rounded
# up or down at random so that the mean is exact.
PLAIN, MASTER, REMAINDER, KAHAN, STOCHASTIC = range(5)

# Elements that share a scale in an 8-bit moment: no more than a warp holds, so that their maximum stays within it.
QUANT = 128
# Elements that share one draw of 128 random bits, 16 each.
DRAW = 8
# Rounds of Philox 4x32; 7 pass BigCrush (Salmon et al. 2011, table 2).
PHILOX_ROUNDS = 7
# Words of a row of the rounding table, int64: seed, stream, and where its elements are in the whole parameter: index of the
# first, elements that follow each other there, elements from one such run's start to the next one's.
ROUNDING = 5

# The dynamic table, int64 words; float64 values are stored by their bits.
#   HEADER words:     0 max_grad_norm   1 address of grad_scale or 0   2 address of found_inf or 0   3 flags
#                     flags bit 0: a step whose norm to clip by is not finite happens all the same
#   one word per row: address of the gradient, 0 where there is none
#   GROUP words per group:
#     0..4   lr, beta1, beta2, eps, weight_decay
#     5..7   width multipliers of lr, weight_decay, eps; that of weight_decay over the peak lr where a law divides by it
#     8      sign of the gradient: 1, or -1 to maximize
#     9..13  address of the device scalar that replaces value 0..4, or 0
#     14     bit i below 5 set: that scalar is float64, else float32; bit CORRECTED: weight_decay times base lr
HEADER = 4
GROUP = 16
GROUP_MULTIPLIERS = 5
GROUP_SIGN = 8
GROUP_ADDRESSES = 9
GROUP_KINDS = 14
CORRECTED = 5

# Whether the kernels run on Triton's interpreter, decided as it decides it.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

# The same numbers for device code.
K_INTERPRETED = tl.constexpr(INTERPRETED)
K_THREADS = tl.constexpr(THREADS)
K_GRAD_BLOCK = tl.constexpr(GRAD_BLOCK)
K_TAIL = tl.constexpr(TAIL)
K_COUNT_BITS = tl.constexpr(COUNT_BITS)
K_COUNT_MASK = tl.constexpr((1 << COUNT_BITS) - 1)
K_ROWS = tl.constexpr(ROWS)
K_PARTIALS = tl.constexpr(PARTIALS)
K_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
K_STATISTICS = tl.constexpr(STATISTICS)
K_GRAD_STATISTIC = tl.constexpr(GRAD_STATISTIC)
K_HEADER = tl.constexpr(HEADER)
K_GROUP = tl.constexpr(GROUP)
K_GROUP_MULTIPLIERS = tl.constexpr(GROUP_MULTIPLIERS)
K_GROUP_SIGN = tl.constexpr(GROUP_SIGN)
K_GROUP_ADDRESSES = tl.constexpr(GROUP_ADDRESSES)
K_GROUP_KINDS = tl.constexpr(GROUP_KINDS)
K_CORRECTED = tl.constexpr(CORRECTED)
K_PLAIN = tl.constexpr(PLAIN)
K_MASTER = tl.constexpr(MASTER)
K_REMAINDER = tl.constexpr(REMAINDER)
K_KAHAN = tl.constexpr(KAHAN)
K_STOCHASTIC = tl.constexpr(STOCHASTIC)
K_QUANT = tl.constexpr(QUANT)
K_DRAW = tl.constexpr(DRAW)
K_PHILOX_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
K_ROUNDING = tl.constexpr(ROUNDING)
K_LOAD_CACHE = tl.constexpr(LOAD_CACHE)
K_LOAD_EVICTION = tl.constexpr(LOAD_EVICTION)
K_STORE_CACHE = tl.constexpr(STORE_CACHE)
K_STORE_EVICTION = tl.constexpr(STORE_EVICTION)
