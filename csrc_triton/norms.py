"""Norm reduction: from sums per chunk to sums per segment. It runs only when somebody reads norms.

One program adds the chunks of one segment in order and in fp64. There are no atomics, so the same step always gives the same
bits. The kernel writes sums of squares and takes no root, so that the sums of several shards can be added first.
"""

import triton
import triton.language as tl

from .layout import K_ACTIVE, K_COEFFICIENTS, K_PARTIALS, K_STATISTICS


@triton.jit
def norms_kernel(
    partials,  # float32[n_chunks, STATISTICS]
    segment_chunk,  # int32[n_segments + 1]  the first chunk of each segment; the last entry is n_chunks
    chunk_row,  # int32[n_chunks]  the parameter each chunk belongs to
    coefficients,  # float32[n_rows, COEFFICIENTS]
    sums,  # float64[n_segments, STATISTICS]  written; for an inactive parameter only the weight's sum is not 0
):
    i_segment = tl.program_id(0).to(tl.int64)
    first = tl.load(segment_chunk + i_segment).to(tl.int64)
    last = tl.load(segment_chunk + i_segment + 1).to(tl.int64)
    # An empty segment has no chunk, so there is no row to look up and nothing to add.
    i_row = tl.load(chunk_row + first, mask=first < last, other=0)
    active = tl.load(coefficients + i_row * K_COEFFICIENTS + K_ACTIVE).to(tl.int32)
    lanes = tl.arange(0, K_PARTIALS)
    columns = tl.arange(0, K_STATISTICS)
    total = tl.zeros([K_PARTIALS, K_STATISTICS], tl.float64)
    for i in range(first, last, K_PARTIALS):
        chunks = i + lanes[:, None]
        total += tl.load(partials + chunks * K_STATISTICS + columns[None, :], mask=chunks < last, other=0.0)
    row = tl.where(columns <= active * (K_STATISTICS - 1), tl.sum(total, 0), 0.0)
    tl.store(sums + i_segment * K_STATISTICS + columns, row)
