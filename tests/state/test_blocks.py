"""Blocks of 8-bit moments, compared with cutting the whole parameter and its scales as DTensor does."""

import itertools
import math

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lwadamw import AdamW, place_flat_shard
from lwadamw.state.blocks import QUANT, cut, local_scale_shape, quantizes, scale_shape, whole_scale_shape

SHAPES = [(64, 128), (33, 256), (128, 70), (64, 192), (96, 1600), (50, 100), (17, 241), (8, 64, 70), (512, 3, 3)]
SHAPES += [(64, 32, 3, 3), (6, 128, 256), (4224,), (4099,), (130, 64), (3, 5, 1280), (256, 1, 48)]


class Mesh:
    def __init__(self, shape):
        self.shape = shape


class Placed:
    """What `blocks` asks a DTensor for."""

    def __init__(self, shape, mesh, placements, held):
        self.shape, self.ndim, self.placements, self.device_mesh = torch.Size(shape), len(shape), placements, Mesh(mesh)
        self._held = held

    def numel(self):
        return math.prod(self.shape)

    def is_contiguous(self):
        return True

    def to_local(self):
        return self._held


def _pieces(tensor, mesh, placements):
    """What each process of a mesh holds, in the order of the mesh."""
    pieces = [tensor]
    for size, placement in zip(mesh, placements, strict=True):
        cuts = []
        for piece in pieces:
            if isinstance(placement, Replicate) or size == 1:
                cuts.append([piece] * size)
                continue
            found = list(piece.chunk(size, placement.dim))
            cuts.append(found + [found[0].narrow(placement.dim, 0, 0)] * (size - len(found)))
        pieces = [piece for found in cuts for piece in found]
    return pieces


def _pieces_of_strided(tensor, dp, tp):
    """Dimension 0 cut by tensor parallelism first, and each part by FSDP: the mesh is (dp, tp)."""
    parts = [part.chunk(dp, 0) for part in tensor.chunk(tp, 0)]
    return [parts[j][i] for i in range(dp) for j in range(tp)]


def _whole_blocks(piece):
    """The number of each block of a shard of [0, 1, 2, ...], or None if a block of the whole lies in several shards."""
    elements = piece.flatten()
    if len(elements) % QUANT:
        return None
    blocks = elements.view(-1, QUANT)
    whole = (blocks == blocks[:, :1] + torch.arange(QUANT)).all() and (blocks[:, 0] % QUANT == 0).all()
    return blocks[:, 0] // QUANT if whole else None


def _check(shape, mesh, placements, split):
    whole = torch.arange(math.prod(shape)).view(shape)
    held = split(whole)
    p = Placed(shape, mesh, placements, held[0])
    found = [_whole_blocks(piece) for piece in held]
    if cut(p) is not None:
        assert None in found or 1 in shape, (shape, mesh, placements)
        return False
    assert all(blocks is not None for blocks in found), (shape, mesh, placements)
    scales = split(torch.arange(math.prod(whole_scale_shape(p))).view(whole_scale_shape(p)))
    for piece, blocks, own in zip(held, found, scales, strict=True):
        assert local_scale_shape(Placed(shape, mesh, placements, piece)) == own.shape, (shape, mesh, placements)
        assert torch.equal(own.flatten(), blocks), (shape, mesh, placements)
    return True


def test_a_layout_is_accepted_only_if_shards_are_whole_blocks_and_scales_are_cut_as_the_parameter_is():
    accepted = refused = 0
    for shape in SHAPES:
        dims = [Replicate(), *map(Shard, range(len(shape)))]
        layouts = [((n,), (a,)) for n in (1, 2, 3, 4, 8) for a in dims]
        layouts += [(mesh, pair) for mesh in ((2, 2), (2, 3), (1, 4)) for pair in itertools.product(dims, repeat=2)]
        for mesh, placements in layouts:
            if all(isinstance(a, Replicate) or n == 1 for n, a in zip(mesh, placements, strict=True)):
                assert cut(Placed(shape, mesh, placements, torch.empty(shape))) is None
            elif _check(shape, mesh, placements, lambda t, m=mesh, a=placements: _pieces(t, m, a)):
                accepted += 1
            else:
                refused += 1
    assert accepted > 100
    assert refused > 100


@pytest.mark.parametrize(
    ("shape", "fits"), [((64, 128), True), ((64, 192), True), ((8, 192), True), ((12, 192), False)]
)
def test_shards_of_fsdp_over_tensor_parallelism_are_accepted_if_they_are_whole_blocks(shape, fits):
    for dp, tp in ((2, 2), (1, 2), (2, 1)):
        placements = (_StridedShard(0, split_factor=tp), Shard(0))
        found = _check(shape, (dp, tp), placements, lambda t, dp=dp, tp=tp: _pieces_of_strided(t, dp, tp))
        assert found == (fits or dp * tp == 2)


def test_strided_shards_are_cut_in_the_order_of_tensor_parallelism():
    """20 rows over two and then three processes would be whole blocks, and over three and then two they are not."""
    placements = (_StridedShard(0, split_factor=3), Shard(0))
    assert not _check((20, 192), (2, 3), placements, lambda t: _pieces_of_strided(t, 2, 3))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((768, 1600), True), ((4096, 2880), True), ((1152, 4304), True), ((768, 3, 16, 16), True), ((50257, 1600), False)],
)
def test_rows_that_are_no_whole_blocks_are_sharded_over_eight_in_bundles(shape, fits):
    assert _check(shape, (8,), (Shard(0),), lambda t: _pieces(t, (8,), (Shard(0),))) == fits


def test_whether_a_moment_is_in_8_bits_depends_on_the_whole_shape_only():
    for shape in SHAPES:
        for n, placement in itertools.product((1, 2, 8), map(Shard, range(len(shape)))):
            placed = Placed(shape, (n,), (placement,), None)
            assert quantizes(placed) == quantizes(torch.nn.Parameter(torch.empty(shape)))
    assert not quantizes(torch.nn.Parameter(torch.empty(8192)))
    assert quantizes(torch.empty(8192))
    assert not quantizes(torch.empty(64, 100), (3200, 3200 - 64, 64))
    for shape, fits in [((64, 128), True), ((8192,), False), ((16, 128), False)]:
        for piece in (torch.empty(5), torch.empty(0), torch.nn.Parameter(torch.empty(2000))):
            place_flat_shard(piece, shape, 7)
            assert quantizes(piece) == fits


def test_scales_of_another_memory_layout_have_another_shape():
    for shape in [(64, 128), (128, 70), (50, 100), (17, 241), (64, 32, 3, 3), (4096, 2)]:
        rows = torch.empty(shape)
        columns = torch.empty(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))
        assert columns.shape == rows.shape
        assert not columns.is_contiguous()
        assert whole_scale_shape(columns) != whole_scale_shape(rows)
        for p in (rows, columns):
            assert math.prod(scale_shape(p)) == math.prod(whole_scale_shape(p)) == -(-rows.numel() // QUANT)


def test_segments_decide_about_8_bits_although_a_transposed_parameter_is_one_segment_in_memory():
    for p in (torch.randn(64, 100), torch.randn(100, 64).T):
        q = torch.nn.Parameter(p)
        group = {"params": [("w", q)], "segments": {"w": (32, 31, 1)}}
        optimizer = AdamW([group], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8)
        q.grad = torch.ones_like(q)
        optimizer.step()
        assert optimizer.state[q]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings("ignore:load_state_dict")
def test_loaded_codes_whose_blocks_cross_segments_are_refused_with_a_remedy(backend):
    """The kernels update each segment alone, and would read the scales of other blocks."""
    p = torch.nn.Parameter(torch.randn(64, 100))
    options = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
    optimizer = AdamW([("w", p)], **options, backend=backend)
    p.grad = torch.randn_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["segments"] = {"w": (32, 31, 1)}
    optimizer.load_state_dict(saved)
    before, moment = p.detach().clone(), optimizer.get_unscaled_state(p, "exp_avg")
    with pytest.raises(
        RuntimeError, match=r"'w' \(64, 100\) are kept in 8 bits, and its segments of \(3200, 3100, 100\)"
    ):
        optimizer.step()
    assert torch.equal(p, before)
    optimizer.convert_state()
    assert torch.equal(optimizer.state[p]["exp_avg"], moment)
    optimizer.step()
