"""Norm reduction: from sums per chunk to sums per segment. It is launched only when the norms are read.

One program adds up the chunks of one segment in a fixed order in fp64. It uses no atomics, so the same step gives the same
bits. The results are sums and not roots, so that the sums of several shards can be added before the root is taken.
"""

import triton
import triton.language as tl

from .layout import K_ACTIVE, K_COEFFICIENTS, K_PARTIALS, K_STATISTICS


@triton.jit
def norms_kernel(
    partials,  # float32[n_chunks, STATISTICS]
    segment_chunk,  # int32[n_segments + 1]  first chunk of each segment; the last entry is n_chunks
    chunk_row,  # int32[n_chunks]  row of the parameter that each chunk belongs to
    coefficients,  # float32[n_rows, COEFFICIENTS]
    sums,  # float64[n_segments, STATISTICS]  out
):
    """One program adds up the statistics of one segment.

    If the parameter did not take the last step, the partial sums are from an older step. Then the sum of the weight is kept,
    and the sums of update, gradient and product are 0, because the weight did not move.
    """
    i_segment = tl.program_id(0).to(tl.int64)
    first = tl.load(segment_chunk + i_segment).to(tl.int64)
    last = tl.load(segment_chunk + i_segment + 1).to(tl.int64)
    # An empty segment has no chunk, so its row cannot be looked up. Any row will do: the sums are 0 anyway.
    i_row = tl.load(chunk_row + first, mask=first < last, other=0)
    active = tl.load(coefficients + i_row * K_COEFFICIENTS + K_ACTIVE).to(tl.int32)
    lanes = tl.arange(0, K_PARTIALS)
    columns = tl.arange(0, K_STATISTICS)
    total = tl.zeros([K_PARTIALS, K_STATISTICS], tl.float64)
    for i in range(first, last, K_PARTIALS):
        chunks = i + lanes[:, None]
        total += tl.load(partials + chunks * K_STATISTICS + columns[None, :], mask=chunks < last, other=0.0)
    # Column 0 is WEIGHT_STATISTIC, the only column that an inactive row keeps.
    row = tl.where(columns <= active * (K_STATISTICS - 1), tl.sum(total, 0), 0.0)
    tl.store(sums + i_segment * K_STATISTICS + columns, row)
