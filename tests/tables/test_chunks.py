"""Segments are cut into chunks without gaps and overlaps, and there are as many chunks as the device needs."""

import random

import numpy as np
import pytest

from lwadamw.kernels import layout
from lwadamw.tables import chunks

COUNT_MASK = (1 << layout.COUNT_BITS) - 1


def _naive(rows, length):
    """The tables of `cut_segments`, one chunk at a time."""
    chunk_row, chunk_span, segment_chunk = [], [], [0]
    for row, segments in enumerate(rows):
        begin = 0
        for size in segments:
            for first in range(begin, begin + size, length):
                chunk_row.append(row)
                chunk_span.append(first << layout.COUNT_BITS | min(length, begin + size - first))
            begin += size
            segment_chunk.append(len(chunk_row))
    return chunk_row, chunk_span, segment_chunk


@pytest.mark.parametrize("seed", range(20))
def test_chunks_are_those_of_a_naive_loop(seed):
    """Random numbers of rows, segments and elements. Many segments are empty or end where a chunk ends."""
    chance = random.Random(seed)
    length = chance.choice([1, 7, 64])
    sizes = (0, 1, length - 1, length, length + 1, 5 * length, chance.randrange(10 * length))
    rows = [[chance.choice(sizes) for _ in range(chance.randint(1, 4))] for _ in range(chance.randint(1, 12))]
    cut = chunks.cut_segments(rows, length)
    assert [table.tolist() for table in cut] == list(_naive(rows, length))
    assert [table.dtype for table in cut] == [np.int32, np.int64, np.int32]


def test_rows_without_elements_have_no_chunks():
    cut = chunks.cut_segments([[0], [0, 0]], 16)
    assert [table.tolist() for table in cut] == [[], [], [0, 0, 0, 0]]


def test_an_empty_last_row_does_not_disturb_the_row_before():
    cut = chunks.cut_segments([[3, 2], [0]], 16)
    assert cut.chunk_row.tolist() == [0, 0]
    assert [(span >> layout.COUNT_BITS, span & COUNT_MASK) for span in cut.chunk_span.tolist()] == [(0, 3), (3, 2)]
    assert cut.segment_chunk.tolist() == [0, 1, 2, 2]


def test_first_elements_beyond_2_to_the_31_are_kept():
    elements = 2**33 + 5
    cut = chunks.cut_segments([[elements]], layout.MAX_CHUNK)
    first, count = cut.chunk_span >> layout.COUNT_BITS, cut.chunk_span & COUNT_MASK
    assert (first == np.arange(len(first)) * layout.MAX_CHUNK).all()
    assert (first[-1], count[-1]) == (2**33, 5)
    assert count.sum() == elements


def test_a_chunk_has_whole_blocks_and_about_as_many_elements_as_there_are_chunks():
    for elements in (0, 1, 10**5, 10**6, 3 * 10**7, 10**8, 10**9, 2**33):
        length = chunks.chunk_length(elements)
        assert length % layout.MIN_CHUNK == 0
        assert layout.MIN_CHUNK <= length <= layout.MAX_CHUNK < 2**layout.COUNT_BITS
        assert length == layout.MIN_CHUNK or elements / length >= length
        assert length == layout.MAX_CHUNK or elements / (length + layout.MIN_CHUNK) <= length + layout.MIN_CHUNK
