"""Chunks: how the segments of a plan's rows are divided into the pieces that one Triton program each works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels import layout


class Chunks(NamedTuple):
    """The chunks of all rows, in the order of rows, then of segments, then of elements in memory."""

    chunk_row: NDArray[np.int32]  # [n_chunks]: the row of each chunk
    # [n_chunks]: first element << COUNT_BITS | number of elements. The first element is counted from the row's start.
    chunk_span: NDArray[np.int64]
    segment_chunk: NDArray[np.int32]  # [n_segments + 1]: the first chunk of each segment, then n_chunks


def chunk_length(elements: int) -> int:
    """Return how many elements a full chunk has in a plan.

    A program needs several dependent loads before its first block, so short chunks cost time. The last programs of a launch run
    alone, so long chunks cost time too. The first cost falls with the length and the second grows with the length divided by
    the number of elements, so the best length grows with the square root of the number of elements (see bench.predict).

    The length depends only on the number of elements. So moving parameters between groups cannot change the order in which
    anything is summed.

    Args:
        elements: number of elements of all rows of the plan.

    Returns:
        A multiple of MIN_CHUNK, from MIN_CHUNK to MAX_CHUNK elements.
    """
    length = math.isqrt(elements) // layout.MIN_CHUNK * layout.MIN_CHUNK
    return int(min(max(length, layout.MIN_CHUNK), layout.MAX_CHUNK))


def cut_segments(rows: Sequence[Sequence[int]], length: int) -> Chunks:
    """Cut every segment into chunks. Only the last chunk of a segment may be shorter than the others.

    The segments of a row follow each other in memory. A segment without elements gets no chunk.

    Args:
        rows: for each row, the number of elements of each of its segments.
        length: number of elements of a full chunk, below 2**COUNT_BITS.

    Returns:
        The three tables of chunks.

    Examples:
        >>> chunks = cut_segments([[5], [0, 2]], length=4)
        >>> chunks.chunk_row.tolist(), chunks.segment_chunk.tolist()
        ([0, 0, 1], [0, 2, 2, 3])
        >>> [(span >> layout.COUNT_BITS, span & (1 << layout.COUNT_BITS) - 1) for span in chunks.chunk_span.tolist()]
        [(0, 4), (4, 1), (0, 2)]
    """
    sizes = np.array([size for row in rows for size in row], np.int64)
    segments_of_row = np.array([len(row) for row in rows], np.int64)
    first_segment = np.cumsum(segments_of_row) - segments_of_row
    # The first element of each segment: counted over all rows, then from the start of the segment's own row.
    start = np.cumsum(sizes) - sizes
    start -= np.repeat(np.append(start, 0)[first_segment], segments_of_row)
    chunks_of_segment = -(-sizes // length)
    segment_chunk = np.append(0, np.cumsum(chunks_of_segment))

    segment_row = np.repeat(np.arange(len(rows), dtype=np.int32), segments_of_row)
    chunk_row = np.repeat(segment_row, chunks_of_segment)
    # In place, because a large model has millions of chunks and every array here counts towards peak memory.
    first = np.arange(len(chunk_row), dtype=np.int64)
    first -= np.repeat(segment_chunk[:-1], chunks_of_segment)
    first *= length
    count = np.repeat(sizes, chunks_of_segment)
    count -= first
    np.minimum(count, length, out=count)
    first += np.repeat(start, chunks_of_segment)
    first <<= layout.COUNT_BITS
    first |= count
    return Chunks(chunk_row, first, segment_chunk.astype(np.int32))
