"""Layout of the device tables that the kernels and the plan share, and the launch constants.

A measured run may change any launch constant here. No other file repeats one of these numbers.
"""

import os

import triton.language as tl

# Launch constants.

# Elements per iteration of the aligned path, if some array of the variant is fp32: 256 threads take 16 bytes of that
# array each. Variants without an fp32 array take twice as many. A thread holds the same elements of every array, so no
# value passes through shared memory.
BLOCK = 1024
# Limits on the registers per thread. The first is for variants with twice the BLOCK, so that three programs fit on a
# multiprocessor. The second is for variants that draw random bits, so that four programs fit.
DOUBLE_REGISTERS = 80
RANDOM_REGISTERS = 64
# Stages of the aligned loop. With n stages there are n - 1 buffers in shared memory. When a block has been computed, its buffer
# gets the block n - 1 further on. So with two stages nothing is on its way while a program computes, and the other programs of
# the multiprocessor have to fill the gap. The second number is for 8-bit moments: with one stage, the compiler loads their
# weights late, because it has no registers for them; with three stages it spills.
STAGES = 1
CODED_STAGES = 2
# Elements per iteration of the masked path, which takes the last elements of a chunk and unaligned tensors. The masked
# path has an address and a mask for each element. With more elements, it would set the register count of the whole kernel.
TAIL = 256
# Threads per program, and warps per program by backend: a warp has 32 threads on CUDA and 64 on ROCm.
THREADS = 256
WARPS = {"cuda": THREADS // 32, "hip": THREADS // 64}
# Elements per iteration of the aligned path of the gradient norm. This kernel reads one array only, so it can keep more
# elements of it in flight.
GRAD_BLOCK = 2 * BLOCK
# A chunk has MIN_CHUNK to MAX_CHUNK elements, and between these limits the square root of the number of all elements.
MIN_CHUNK = GRAD_BLOCK
MAX_CHUNK = 16 * BLOCK
# One int64 holds the first element and the number of elements of a chunk: first << COUNT_BITS | number.
COUNT_BITS = 20
# The update takes a gradient element beyond a limit as the limit. A second moment that is fp16 sets the smallest limit, a first
# moment that is fp16 the next. The squares of the first and the last limit are below the largest fp16 and the largest fp32
# number.
GRAD_LIMIT_FP16_SQ = 255.875
GRAD_LIMIT_FP16 = 65504.0
GRAD_LIMIT = 1.8e19
# The norm of a chunk is stored times NORM_UNIT. So it is below the largest fp32 number whatever its elements are.
NORM_UNIT = 2.0**-8
# Rows of coefficients that one program computes.
ROWS = 128
# Partial sums that a reduction reads per iteration.
PARTIALS = 1024
# Norms of chunks that the sum for clipping reads per iteration. A multiple of PARTIALS.
TOTAL_BLOCK = 8192
# Stages of the loops of total_kernel, see STAGES. It is a single program, so no other program fills its gaps.
TOTAL_STAGES = 3

# Cache hints of the aligned path. Loads: "", ".ca", ".cg". Stores: "", ".wb", ".cg", ".cs", ".wt". Eviction: "",
# "evict_first", "evict_last". All are empty until a measurement asks for one.
LOAD_CACHE = ""
LOAD_EVICTION = ""
STORE_CACHE = ""
STORE_EVICTION = ""

# Columns of the coefficients of one parameter, fp32[COEFFICIENTS]. t is the parameter's step. lr, weight_decay and eps
# are effective.
(
    ONE_MINUS_BETA1,
    ONE_MINUS_BETA2,
    DECAY_PER_STEP,  # lr * weight_decay
    STEP_SIZE,  # lr * sqrt(1 - beta2^t) / (1 - beta1^t)
    SCALED_EPS,  # eps * sqrt(1 - beta2^t)
    GRAD_FACTOR,  # what the gradient is multiplied by: sign, clip factor and 1 / loss scale
    ACTIVE,  # 1 if the parameter takes this step, else 0
) = range(7)
COEFFICIENTS = 7

# Columns of the statistics of one chunk or one segment, fp32[STATISTICS] or fp64[STATISTICS].
(
    WEIGHT_STATISTIC,  # sum of squares of the weight after the step
    UPDATE_STATISTIC,  # sum of squares of the update
    GRAD_STATISTIC,  # sum of squares of the clipped gradient
    DOT_STATISTIC,  # scalar product of the weight before the step and the update
) = range(4)
STATISTICS = 4

# How the weight of a parameter is kept.
#   PLAIN       in the parameter
#   MASTER      in an fp32 companion; the parameter is its rounded copy
#   REMAINDER   a bf16 parameter and an int16 companion are the upper and the lower half of the fp32 weight
#   KAHAN       the companion has the parameter's type and holds what rounding the parameter lost
#   STOCHASTIC  in the parameter, rounded up or down at random so that the mean is exact
PLAIN, MASTER, REMAINDER, KAHAN, STOCHASTIC = range(5)

# Elements that share a scale in an 8-bit moment. A warp holds at least this many, so their maximum stays within a warp.
QUANT = 128
# Elements that share one draw of 128 random bits. Each element gets 16 of them.
DRAW_BITS = 3
DRAW = 1 << DRAW_BITS
# Elements that share one hash of 32 random bits, which rounds 8-bit moments. Each element gets 16 of them.
HASH_DRAW = 2
# A power of two that no chunk is longer than. Runs of a shard that are longer count as this long.
LONG_RUN = 1 << 16
# Rounds of Philox 4x32. Seven rounds pass BigCrush (Salmon et al. 2011, table 2).
PHILOX_ROUNDS = 7
# Rows of the rounding table, int64[ROUNDING, n_rows]. The last three say where the local elements are in the whole parameter.
(
    ROUNDING_SEED,
    ROUNDING_STREAM,
    ROUNDING_FIRST,  # index of the first local element
    ROUNDING_RUN,  # number of elements that follow each other in the whole parameter
    ROUNDING_STRIDE,  # distance from the start of one run to the start of the next
) = range(5)
ROUNDING = 5

# The dynamic table, int64 words. A float64 value is stored by its bits. First come HEADER words:
HEADER_MAX_NORM = 0  # float64
HEADER_GRAD_SCALE = 1  # address of the float32 loss scale, or 0
HEADER_FOUND_INF = 2  # address of a float32 that is not 0 if the step must not happen, or 0
HEADER_FLAGS = 3  # bit 0: the step happens even if the norm to clip by is not finite
HEADER = 4
# Then one word for each row: the address of its gradient, 0 where there is none. Then GROUP words for each group:
#   words 0 to 4: the base values below, float64
GROUP_LR, GROUP_BETA1, GROUP_BETA2, GROUP_EPS, GROUP_WEIGHT_DECAY = range(5)
#   words 5 to 7: the width multipliers of lr, weight_decay and eps, float64. For the decay laws "independent"
#   and "corrected", the multiplier of weight_decay is already divided by peak_lr.
GROUP_MULTIPLIERS = 5
#   word 8: the sign of the gradient, float64: 1, or -1 to maximize
GROUP_SIGN = 8
#   words 9 to 13: the address of a device scalar that replaces value 0 to 4, or 0
GROUP_ADDRESSES = 9
#   word 14: bit i below 5 is set if that scalar is float64, else it is float32. Bit CORRECTED is set if weight_decay is to be
#   multiplied by the base lr of the step (decay law "corrected").
GROUP_KINDS = 14
CORRECTED = 5
GROUP = 16

# Whether the kernels run on Triton's interpreter. Triton decides it in the same way.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")

# The same numbers for device code, which reads globals only if they are constexpr.
K_INTERPRETED = tl.constexpr(INTERPRETED)
K_THREADS = tl.constexpr(THREADS)
K_STAGES = tl.constexpr(STAGES)
K_CODED_STAGES = tl.constexpr(CODED_STAGES)
K_GRAD_BLOCK = tl.constexpr(GRAD_BLOCK)
K_TAIL = tl.constexpr(TAIL)
K_GRAD_LIMIT_FP16_SQ = tl.constexpr(GRAD_LIMIT_FP16_SQ)
K_GRAD_LIMIT_FP16 = tl.constexpr(GRAD_LIMIT_FP16)
K_GRAD_LIMIT = tl.constexpr(GRAD_LIMIT)
K_NORM_UNIT = tl.constexpr(NORM_UNIT)
K_COUNT_BITS = tl.constexpr(COUNT_BITS)
K_COUNT_MASK = tl.constexpr((1 << COUNT_BITS) - 1)
K_ROWS = tl.constexpr(ROWS)
K_PARTIALS = tl.constexpr(PARTIALS)
K_TOTAL_BLOCK = tl.constexpr(TOTAL_BLOCK)
K_TOTAL_STAGES = tl.constexpr(TOTAL_STAGES)
K_ONE_MINUS_BETA1 = tl.constexpr(ONE_MINUS_BETA1)
K_ONE_MINUS_BETA2 = tl.constexpr(ONE_MINUS_BETA2)
K_DECAY_PER_STEP = tl.constexpr(DECAY_PER_STEP)
K_STEP_SIZE = tl.constexpr(STEP_SIZE)
K_SCALED_EPS = tl.constexpr(SCALED_EPS)
K_GRAD_FACTOR = tl.constexpr(GRAD_FACTOR)
K_ACTIVE = tl.constexpr(ACTIVE)
K_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
K_WEIGHT_STATISTIC = tl.constexpr(WEIGHT_STATISTIC)
K_UPDATE_STATISTIC = tl.constexpr(UPDATE_STATISTIC)
K_GRAD_STATISTIC = tl.constexpr(GRAD_STATISTIC)
K_DOT_STATISTIC = tl.constexpr(DOT_STATISTIC)
K_STATISTICS = tl.constexpr(STATISTICS)
K_HEADER_MAX_NORM = tl.constexpr(HEADER_MAX_NORM)
K_HEADER_GRAD_SCALE = tl.constexpr(HEADER_GRAD_SCALE)
K_HEADER_FOUND_INF = tl.constexpr(HEADER_FOUND_INF)
K_HEADER_FLAGS = tl.constexpr(HEADER_FLAGS)
K_HEADER = tl.constexpr(HEADER)
K_GROUP_LR = tl.constexpr(GROUP_LR)
K_GROUP_BETA1 = tl.constexpr(GROUP_BETA1)
K_GROUP_BETA2 = tl.constexpr(GROUP_BETA2)
K_GROUP_EPS = tl.constexpr(GROUP_EPS)
K_GROUP_WEIGHT_DECAY = tl.constexpr(GROUP_WEIGHT_DECAY)
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
K_DRAW_BITS = tl.constexpr(DRAW_BITS)
K_DRAW = tl.constexpr(DRAW)
K_HASH_DRAW = tl.constexpr(HASH_DRAW)
K_LONG_RUN = tl.constexpr(LONG_RUN)
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
