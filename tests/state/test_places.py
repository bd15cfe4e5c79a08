"""Flat shards with a place: their elements are found in the whole, and draw the random bits of the whole."""

import itertools
import math
import random

import pytest
import torch
from torch import nn

import lwadamw
from lwadamw.state.places import place_of, whole_shape


def _piece(numel, *arguments, **options):
    p = nn.Parameter(torch.zeros(numel))
    lwadamw.place_flat_shard(p, *arguments, **options)
    return p


def test_runs_are_the_indices_in_the_whole_or_nothing():
    generator, said, unsaid = random.Random(0), 0, 0
    for shape in ((), (5,), (4, 6), (3, 4, 5), (2, 3, 2, 4)):
        whole = torch.arange(math.prod(shape)).reshape(shape)
        for _ in range(150):
            block = [
                sorted(generator.choices(range(n + 1), k=2)) if generator.random() < 0.5 else (0, n) for n in shape
            ]
            cut = whole[tuple(itertools.starmap(slice, block))].flatten()
            first, end = sorted(generator.choices(range(len(cut) + 1), k=2))
            runs = place_of(_piece(end - first, shape, first, block=block)).runs()
            if runs is None:
                steps = cut[first:end].diff()
                assert len(steps[steps > 1]), "what is one run can be said"
                unsaid += 1
                continue
            said += 1
            begin, run, stride = runs
            index = torch.arange(end - first)
            assert torch.equal(begin + index + index // run * (stride - run), cut[first:end])
    assert said > 500
    assert unsaid > 20


STORED = {
    "stochastic": {"rounding": "stochastic"},
    "8 bits": {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the CPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("stored", STORED)
def test_pieces_draw_the_bits_of_the_whole(backend, stored):
    """Of a matrix and of the block of its columns; pieces end where blocks of 8-bit codes end."""
    torch.manual_seed(0)
    shape, columns = (160, 64), (32, 64)
    weight = torch.randn(shape).bfloat16()
    grads = [torch.randn(shape).bfloat16() for _ in range(2)]
    whole = nn.Parameter(weight.clone())
    cuts = {"whole": (slice(None), 4224), "block": (slice(*columns), 32 * 64)}
    options = {"lr": 1e-2, "backend": backend, **STORED[stored]}
    one = lwadamw.AdamW([("w", whole)], **options)
    for g in grads:
        whole.grad = g.clone()
        one.step()
    for name, (kept, cut) in cuts.items():
        if name == "block" and stored == "8 bits":
            continue  # other elements share a scale
        flat = weight[:, kept].flatten()
        # The second piece of the matrix ends inside a row where weights alone are drawn for.
        ends = [0, cut, len(flat)] if stored == "8 bits" or name == "block" else [0, cut + 13, len(flat)]
        for begin, end in itertools.pairwise(ends):
            piece = nn.Parameter(flat[begin:end].clone())
            block = None if name == "whole" else ((0, shape[0]), columns)
            ours = lwadamw.AdamW([("w", piece)], **options)
            lwadamw.place_flat_shard(piece, shape, begin, block=block)
            for g in grads:
                piece.grad = g[:, kept].flatten()[begin:end].clone()
                ours.step()
            assert torch.equal(piece.detach(), whole.detach()[:, kept].flatten()[begin:end]), (name, begin)


def test_a_piece_that_begins_inside_a_row_of_a_block_is_refused_by_name():
    p = nn.Parameter(torch.zeros(9, dtype=torch.bfloat16))
    lwadamw.place_flat_shard(p, (4, 8), 3, block=((0, 4), (2, 6)))
    optimizer = lwadamw.AdamW([("w", p)], rounding="stochastic", backend="torch")
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"'w' \(9,\) is a flat shard that begins inside a row .* rounding='kahan'"):
        optimizer.step()
    assert not p.any()


def test_the_place_says_the_shape_of_the_whole_until_the_piece_changes():
    p = _piece(6, (4, 5), 8)
    assert whole_shape(p) == (4, 5)
    assert whole_shape(nn.Parameter(torch.zeros(3, 2))) == (3, 2)
    p.data = torch.zeros(7)
    with pytest.raises(RuntimeError, match=r"'w' \(7,\) was placed as 6 elements of \(4, 5\).*place_flat_shard\(p, "):
        place_of(p, "w")


@pytest.mark.parametrize(
    ("shape", "first", "block", "message"),
    [
        ((4, 5), 15, None, r"\(6,\) with first=15 ends behind the 20 elements"),
        ((4, 5), -1, None, "with first=-1"),
        ((4, 5), 5, ((0, 4), (0, 2)), r"with first=5 ends behind the 8 elements .*block=\(\(0, 4\), \(0, 2\)\)"),
        ((4, 5), 0, ((0, 4),), r"no block of \(4, 5\)"),
        ((4, 5), 0, ((0, 4), (2, 6)), r"no block of \(4, 5\)"),
    ],
)
def test_a_place_that_cannot_be_is_refused(shape, first, block, message):
    with pytest.raises(ValueError, match=message):
        _piece(6, shape, first, block=block)


def test_a_tensor_that_is_no_run_of_memory_is_refused():
    with pytest.raises(ValueError, match="is not contiguous"):
        lwadamw.place_flat_shard(torch.zeros(4, 4).t(), (4, 4), 0)
