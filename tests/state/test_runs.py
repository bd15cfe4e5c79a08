"""Runs: where the elements of a shard lie in the whole parameter, against torch's own way to cut tensors."""

import itertools
import math

import pytest
import torch

from lwadamw.state.runs import ENDLESS_RUN, Cut, runs


def _indices(shape, cuts, coordinate, held):
    first, run, stride = runs(shape, cuts, coordinate, tuple(held.shape))
    i = torch.arange(held.numel())
    return first + i + i // run * (stride - run)


def _chunk(tensor, parts, place, dim):
    chunks = tensor.chunk(parts, dim)
    return chunks[place] if place < len(chunks) else tensor.narrow(dim, 0, 0)


def _in_order(shape, cuts, order, coordinate):
    """What fully_shard leaves after tensor parallelism: chunks of chunks, in the order of time."""
    held = torch.arange(math.prod(shape)).view(shape)
    for i in order:
        held = _chunk(held, cuts[i].parts, coordinate[i], cuts[i].dim)
    return held


def _places(cuts):
    return itertools.product(*(range(cut.parts) for cut in cuts))


# Cuts in the order of the mesh, and the order in which they happen.
ORDERS = {
    "rows": ([Cut(0, 3, 1)], [0]),
    "columns": ([Cut(1, 2, 1)], [0]),
    "rows and columns": ([Cut(0, 2, 1), Cut(1, 3, 1)], [0, 1]),
    "FSDP2 x TP": ([Cut(0, 2, 2), Cut(0, 2, 1)], [1, 0]),
    "FSDP2 x TP, 3 x 2": ([Cut(0, 3, 2), Cut(0, 2, 1)], [1, 0]),
    "FSDP2 x TP x rows": ([Cut(0, 2, 1), Cut(0, 2, 2), Cut(0, 2, 1)], [0, 2, 1]),
    "two strided": ([Cut(0, 2, 4), Cut(0, 2, 2), Cut(0, 2, 1)], [2, 1, 0]),
    "columns strided": ([Cut(1, 2, 2), Cut(1, 2, 1)], [1, 0]),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shape", [(7, 8), (16, 12), (5, 4), (1, 3), (19, 1), (13, 6, 4)])
def test_indices_are_those_of_the_elements_that_the_process_holds(name, shape):
    cuts, order = ORDERS[name]
    for coordinate in _places(cuts):
        held = _in_order(shape, cuts, order, coordinate)
        if held.numel():
            found = _indices(shape, tuple(cuts), coordinate, held)
            assert torch.equal(found, held.contiguous().flatten()), coordinate


STRIDED = {"alone": [Cut(0, 2, 3)], "after rows": [Cut(0, 2, 1), Cut(0, 2, 2)], "columns": [Cut(1, 2, 2)]}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("shape", [(12, 8), (24, 4), (11, 4), (7, 8)])
def test_strided_cuts_that_no_order_explains_are_those_of_torch(name, shape):
    """Left to right, as torch's `_StridedShard` splits a tensor: factor blocks, and a part of each."""
    cuts = STRIDED[name]
    even = all(shape[cut.dim] % (cut.parts * cut.factor) == 0 for cut in cuts)
    for coordinate in _places(cuts):
        held = torch.arange(math.prod(shape)).view(shape)
        for cut, place in zip(cuts, coordinate, strict=True):
            blocks = held.chunk(cut.factor, cut.dim)
            held = torch.cat([_chunk(block, cut.parts, place, cut.dim) for block in blocks], cut.dim)
        described = runs(shape, tuple(cuts), coordinate, tuple(held.shape)) is not None
        assert described or not even
        if described and held.numel():
            assert torch.equal(_indices(shape, tuple(cuts), coordinate, held), held.contiguous().flatten()), coordinate


def test_what_three_numbers_cannot_describe_is_refused_on_every_process():
    """Two cut dimensions inside a third. The last process of 3 along a dimension of 4 holds nothing."""
    cuts = (Cut(1, 3, 1), Cut(2, 2, 1))
    for coordinate in _places(cuts):
        held = _in_order((2, 4, 6), cuts, [0, 1], coordinate)
        assert runs((2, 4, 6), cuts, coordinate, tuple(held.shape)) is None


def test_a_shard_of_rows_is_one_run():
    assert runs((6, 4), (Cut(0, 2, 1),), (1,), (3, 4)) == (12, ENDLESS_RUN, ENDLESS_RUN)
