"""Random bits in the kernels: every element of a strided shard draws the bits of its index in the whole parameter."""

import pytest
import torch
import triton
import triton.language as tl

from lwadamw.kernels import layout
from lwadamw.kernels.stochastic import chunk_place, hash_bits, hash_key, random_bits
from lwadamw.state import random_bits as expected
from lwadamw.state.runs import ENDLESS_RUN
from lwadamw.tables.variants import current_backend, launch_options

SEED, STREAM, STEP = 2**40 + 7, 11, 13


@triton.jit
def _draw(place, weights, moments, begin, seed, stream, step, SIZE: tl.constexpr, EACH: tl.constexpr):
    start, first, whole_run, stride = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    base, passed, run, gap = chunk_place(start, first, whole_run, stride)
    stream, step = stream.to(tl.uint32), step.to(tl.uint32)
    lanes = tl.arange(0, SIZE)
    tl.store(weights + lanes, random_bits(base, begin, passed, run, gap, seed, stream, step, True, SIZE, EACH))
    key = hash_key(seed, stream, step)
    tl.store(moments + lanes, hash_bits(base, begin, passed, run, gap, key, True, SIZE, EACH))


def _check(start, first, run, stride, begin, each, device):
    size = layout.THREADS * each
    weights, moments = torch.empty(2, size, dtype=torch.int32, device=device)
    place = torch.tensor([start, first, run, stride], device=device)
    _draw[(1,)](place, weights, moments, begin, SEED, STREAM, STEP, size, each, **launch_options(current_backend()))
    index = start + begin + torch.arange(size)
    index = first + index + index // run * (stride - run)
    assert torch.equal(weights.cpu().long(), expected.random_bits(index, SEED, STREAM, STEP).long())
    assert torch.equal(moments.cpu().long(), expected.hash_bits(index, SEED, STREAM, STEP).long())


@pytest.mark.parametrize("each", [4, 8])
@pytest.mark.parametrize("run", [8, 24, 128, 1000, 4096, 2**16 - 8, 2**16, 2**16 + 8, 2**33 + 8])
def test_threads_find_the_run_of_their_elements(run, each, device):
    """Also where a chunk begins inside of a run, just before its end, or runs are longer than any chunk."""
    for start in (0, 16384, run - 8, 5 * run + run // 16 * 8, 2**34):
        for begin in (0, 3 * layout.THREADS * each):
            _check(start, 3 * run, run, 7 * run + 40, begin, each, device)


@pytest.mark.parametrize("each", [1, 4, 8])
def test_a_shard_of_one_run_draws_the_bits_of_its_elements(each, device):
    for first in (0, 2**33 + 8):
        _check(2**20, first, ENDLESS_RUN, ENDLESS_RUN, 256, each, device)


@pytest.mark.parametrize("run", [1, 3, 17, 254, 2**16 + 1, 2**33 + 1])
def test_the_masked_path_finds_runs_of_any_length(run, device):
    for start in (0, 5, run - 1, 4 * run + run // 2):
        _check(start, 5, run, 2 * run + 3, 256, 1, device)


def test_no_chunk_is_longer_than_the_longest_run_that_is_told_from_others():
    assert layout.MAX_CHUNK <= layout.LONG_RUN
