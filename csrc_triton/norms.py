"""Norm reduction: from sums per chunk to sums per segment, only when somebody reads them.

Each segment's chunks are added in order, in fp64, by one program: no atomics, so the same step gives the same
bits. Sums, not roots, so that shards can be added before the root is taken.
"""

import triton
import triton.language as tl

from .layout import K_COEFFICIENTS, K_PARTIALS, K_STATISTICS


@triton.jit
def norms_kernel(
    partials,  # float32[n_chunks, STATISTICS]
    segment_chunk,  # int32[n_segments + 1]  first chunk of each segment, then n_chunks
    chunk_row,  # int32[n_chunks]  the parameter each chunk belongs to
    coefficients,  # float32[n_rows, COEFFICIENTS]
    sums,  # float64[n_segments, STATISTICS]  out; a parameter the last step left alone moved by 0 with gradient 0
):
    i_segment = tl.program_id(0).to(tl.int64)
    first = tl.load(segment_chunk + i_segment).to(tl.int64)
    last = tl.load(segment_chunk + i_segment + 1).to(tl.int64)
    # An empty segment has no chunk to ask, and nothing to add up.
    i_row = tl.load(chunk_row + first, mask=first < last, other=0)
    active = tl.load(coefficients + i_row * K_COEFFICIENTS + 6).to(tl.int32)
    lanes = tl.arange(0, K_PARTIALS)
    columns = tl.arange(0, K_STATISTICS)
    total = tl.zeros([K_PARTIALS, K_STATISTICS], tl.float64)
    for i in range(first, last, K_PARTIALS):
        chunks = i + lanes[:, None]
        total += tl.load(partials + chunks * K_STATISTICS + columns[None, :], mask=chunks < last, other=0.0)
    row = tl.where(columns <= active * (K_STATISTICS - 1), tl.sum(total, 0), 0.0)
    tl.store(sums + i_segment * K_STATISTICS + columns, row)
