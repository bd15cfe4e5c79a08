"""Layout of the device tables that the kernels and the plan share, and the launch constants.

Each constant is defined here only. `bench/tune.py` may replace any launch constant for one measured run.
"""

import os

import triton.language as tl

# Elements per iteration of the aligned loop if at least one large array is fp32. With 256 threads, each thread then reads
# 16 bytes of the fp32 array per iteration. If all arrays are 16-bit, an iteration takes 2 * BLOCK elements. A thread holds
# the same elements of every array, so no value passes through shared memory.
BLOCK = 1024
# Upper limits of registers per thread. They let three programs share a multiprocessor. DOUBLE_REGISTERS is for variants
# with 2 * BLOCK elements per iteration, RANDOM_REGISTERS for variants that draw random bits.
DOUBLE_REGISTERS = 80
RANDOM_REGISTERS = 72
# Elements per iteration of the masked loop, which updates the last elements of a chunk and all of an unaligned chunk. TAIL
# is small because otherwise this loop's addresses and masks, one per element, would set the register count of the kernel.
TAIL = 256
# Threads per program, and warps per program by backend. A warp has 32 threads on CUDA and 64 on HIP.
THREADS = 256
WARPS = {"cuda": THREADS // 32, "hip": THREADS // 64}
# Elements per iteration of the aligned loop of the gradient norm. It reads one array only, so it can load more of that
# array at once.
GRAD_BLOCK = 2 * BLOCK
# A chunk has MIN_CHUNK to MAX_CHUNK elements. Chunks are as long as they can be while a plan still has TARGET_CHUNKS chunks.
MIN_CHUNK = GRAD_BLOCK
MAX_CHUNK = 16 * BLOCK
TARGET_CHUNKS = 2048
# The first element of a chunk and its number of elements share an int64: start << COUNT_BITS | count.
COUNT_BITS = 20
# Rows whose coefficients one program computes.
ROWS = 128
# Partial sums that a reduction reads per iteration.
PARTIALS = 1024

# Cache hints of the aligned loops. Loads: "", ".ca" or ".cg". Stores: "", ".wb", ".cg", ".cs" or ".wt". Evictions: "",
# "evict_first" or "evict_last". They stay empty until a measurement shows that a hint helps.
LOAD_CACHE = ""
LOAD_EVICTION = ""
STORE_CACHE = ""
STORE_EVICTION = ""

# Columns of the coefficients of one row, fp32[COEFFICIENTS]. t is the step of the parameter, counted from 1.
ONE_MINUS_BETA1 = 0
ONE_MINUS_BETA2 = 1
DECAY_PER_STEP = 2  # lr * wd
STEP_SIZE = 3  # lr * sqrt(1 - beta2^t) / (1 - beta1^t)
EPS = 4  # eps * sqrt(1 - beta2^t)
GRAD_FACTOR = 5  # sign * clip factor / loss scale; the update multiplies the gradient with it
ACTIVE = 6  # 1 if the parameter takes this step, else 0
COEFFICIENTS = 7

# Columns of the statistics of one chunk or one segment. Before the update runs, the column GRAD_STATISTIC holds the square
# sum of the unclipped gradient, from which the global norm is computed.
WEIGHT_STATISTIC = 0  # sum of squares of the weight after the step
UPDATE_STATISTIC = 1  # sum of squares of the update
GRAD_STATISTIC = 2  # sum of squares of the gradient after unscaling and clipping
PRODUCT_STATISTIC = 3  # scalar product of the weight before the step and the update
STATISTICS = 4

# How the weight of a parameter is kept:
#   PLAIN       in the parameter
#   MASTER      in an fp32 companion; the parameter is its rounded copy
#   REMAINDER   the bf16 parameter is the upper half of the fp32 weight, the int16 companion is the lower half
#   KAHAN       in the parameter and a companion of the same type; the companion keeps the rounding error of the parameter
#   STOCHASTIC  in the parameter, which is rounded up or down at random such that the mean is exact
PLAIN, MASTER, REMAINDER, KAHAN, STOCHASTIC = range(5)

# Elements that share one scale in an 8-bit moment. A warp holds at least so many elements, so the maximum of the elements
# is found inside one warp.
QUANT = 128
# Elements that share one draw of 128 random bits; each element takes 16 of them.
DRAW = 8
# Rounds of Philox 4x32. 7 rounds pass BigCrush (Salmon et al. 2011, table 2).
PHILOX_ROUNDS = 7

# Rows of the rounding table, int64[ROUNDING, n_rows]: one column of numbers per parameter. The last three say where the local
# elements lie in the whole (unsharded) parameter: the local elements are runs of consecutive elements of the whole.
ROUNDING_SEED = 0
ROUNDING_STREAM = 1  # random number stream of the parameter, below 2^32
ROUNDING_FIRST = 2  # index of the first local element in the whole parameter
ROUNDING_RUN = 3  # elements per run
ROUNDING_STRIDE = 4  # elements of the whole from the start of one run to the start of the next run
ROUNDING = 5

# The dynamic table, int64 words. A float64 value is stored as its bits. It has three parts:
#   HEADER words
#   one word per row: the address of the gradient, or 0 if there is no gradient
#   GROUP words per group
HEADER_MAX_NORM = 0  # max_grad_norm, float64
HEADER_GRAD_SCALE = 1  # address of the loss scale, float32, or 0
HEADER_FOUND_INF = 2  # address of found_inf, float32, or 0
HEADER_FLAGS = 3
HEADER = 4
# Bit of HEADER_FLAGS: the step happens even if the norm that it clips by is not finite.
FLAG_REGARDLESS = 1

# Words of a group. The first five are the hyperparameters, float64.
GROUP_LR = 0
GROUP_BETA1 = 1
GROUP_BETA2 = 2
GROUP_EPS = 3
GROUP_WEIGHT_DECAY = 4
# Width multipliers, float64, in the order lr, weight_decay, eps. The lr multiplier is already multiplied by the width
# warm-up factor of the group. For the decay laws 'independent' and 'corrected' the weight decay multiplier is already
# divided by peak_lr.
GROUP_MULTIPLIERS = 5
GROUP_LR_MULT = GROUP_MULTIPLIERS
GROUP_WD_MULT = GROUP_MULTIPLIERS + 1
GROUP_EPS_MULT = GROUP_MULTIPLIERS + 2
GROUP_SIGN = 8  # float64 sign of the gradient: 1, or -1 to maximize
# Word GROUP_ADDRESSES + i: the address of the device scalar that replaces hyperparameter i, or 0.
GROUP_ADDRESSES = 9
# Bit i, for i below 5: the device scalar that replaces hyperparameter i is float64, else float32.
GROUP_KINDS = 14
# Bit of GROUP_KINDS: the decay law is 'corrected', so weight_decay is multiplied by the base lr.
CORRECTED = 5
GROUP = 16

# Whether Triton's interpreter runs the kernels. Triton reads the same environment variable in the same way.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

# The same numbers for device code, which accepts a global only if it is a constexpr.
K_INTERPRETED = tl.constexpr(INTERPRETED)
K_THREADS = tl.constexpr(THREADS)
K_GRAD_BLOCK = tl.constexpr(GRAD_BLOCK)
K_TAIL = tl.constexpr(TAIL)
K_COUNT_BITS = tl.constexpr(COUNT_BITS)
K_COUNT_MASK = tl.constexpr((1 << COUNT_BITS) - 1)
K_ROWS = tl.constexpr(ROWS)
K_PARTIALS = tl.constexpr(PARTIALS)
K_ONE_MINUS_BETA1 = tl.constexpr(ONE_MINUS_BETA1)
K_ONE_MINUS_BETA2 = tl.constexpr(ONE_MINUS_BETA2)
K_DECAY_PER_STEP = tl.constexpr(DECAY_PER_STEP)
K_STEP_SIZE = tl.constexpr(STEP_SIZE)
K_EPS = tl.constexpr(EPS)
K_GRAD_FACTOR = tl.constexpr(GRAD_FACTOR)
K_ACTIVE = tl.constexpr(ACTIVE)
K_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
K_WEIGHT_STATISTIC = tl.constexpr(WEIGHT_STATISTIC)
K_UPDATE_STATISTIC = tl.constexpr(UPDATE_STATISTIC)
K_GRAD_STATISTIC = tl.constexpr(GRAD_STATISTIC)
K_PRODUCT_STATISTIC = tl.constexpr(PRODUCT_STATISTIC)
K_STATISTICS = tl.constexpr(STATISTICS)
K_HEADER_MAX_NORM = tl.constexpr(HEADER_MAX_NORM)
K_HEADER_GRAD_SCALE = tl.constexpr(HEADER_GRAD_SCALE)
K_HEADER_FOUND_INF = tl.constexpr(HEADER_FOUND_INF)
K_HEADER_FLAGS = tl.constexpr(HEADER_FLAGS)
K_HEADER = tl.constexpr(HEADER)
K_FLAG_REGARDLESS = tl.constexpr(FLAG_REGARDLESS)
K_GROUP_LR = tl.constexpr(GROUP_LR)
K_GROUP_BETA1 = tl.constexpr(GROUP_BETA1)
K_GROUP_BETA2 = tl.constexpr(GROUP_BETA2)
K_GROUP_EPS = tl.constexpr(GROUP_EPS)
K_GROUP_WEIGHT_DECAY = tl.constexpr(GROUP_WEIGHT_DECAY)
K_GROUP_LR_MULT = tl.constexpr(GROUP_LR_MULT)
K_GROUP_WD_MULT = tl.constexpr(GROUP_WD_MULT)
K_GROUP_EPS_MULT = tl.constexpr(GROUP_EPS_MULT)
K_GROUP_SIGN = tl.constexpr(GROUP_SIGN)
K_GROUP_ADDRESSES = tl.constexpr(GROUP_ADDRESSES)
K_GROUP_KINDS = tl.constexpr(GROUP_KINDS)
K_CORRECTED = tl.constexpr(CORRECTED)
K_GROUP = tl.constexpr(GROUP)
K_MASTER = tl.constexpr(MASTER)
K_REMAINDER = tl.constexpr(REMAINDER)
K_KAHAN = tl.constexpr(KAHAN)
K_STOCHASTIC = tl.constexpr(STOCHASTIC)
K_QUANT = tl.constexpr(QUANT)
K_DRAW = tl.constexpr(DRAW)
K_PHILOX_ROUNDS = tl.constexpr(PHILOX_ROUNDS)
K_ROUNDING_SEED = tl.constexpr(ROUNDING_SEED)
K_ROUNDING_STREAM = tl.constexpr(ROUNDING_STREAM)
K_ROUNDING_FIRST = tl.constexpr(ROUNDING_FIRST)
K_ROUNDING_RUN = tl.constexpr(ROUNDING_RUN)
K_ROUNDING_STRIDE = tl.constexpr(ROUNDING_STRIDE)
K_LOAD_CACHE = tl.constexpr(LOAD_CACHE)
K_LOAD_EVICTION = tl.constexpr(LOAD_EVICTION)
K_STORE_CACHE = tl.constexpr(STORE_CACHE)
K_STORE_EVICTION = tl.constexpr(STORE_EVICTION)
