"""Splits: parameters on unlike meshes have sums of their own, even if the meshes have one shape."""

from types import SimpleNamespace

import pytest
import torch

from lwadamw.state.members import Member
from lwadamw.state.shards import WHOLE, Shards


class Mesh:
    """A mesh over pretended processes. Two meshes of one shape have process groups of their own."""

    def __init__(self, *shape):
        self.shape, self._groups = shape, [object() for _ in shape]

    def size(self, dimension):
        return self.shape[dimension]

    def get_group(self, dimension):
        return self._groups[dimension]

    def get_coordinate(self):
        return [0] * len(self.shape)


def _member(mesh, *sharded):
    p = torch.nn.Parameter(torch.zeros(2))
    p._local_tensor, p.device_mesh = torch.zeros(1), mesh
    p.placements = tuple(SimpleNamespace(is_shard=lambda s=s: s) for s in sharded)
    return Member(p, "w", {}, 0, 0, ())


def test_meshes_of_one_shape_are_told_apart():
    """The data dimension and the tensor dimension of a 2 x 2 mesh are both meshes of two processes."""
    data, tensor = Mesh(2), Mesh(2)
    shards = Shards()
    first, second = (shards.split_of(_member(mesh, True)) for mesh in (data, tensor))
    assert first.label != second.label
    assert (first.groups, second.groups) == ((data.get_group(0),), (tensor.get_group(0),))
    assert shards.split_of(_member(data, True)) == first


@pytest.mark.parametrize("sharded", [(True, False), (False, True), (True, True), (False, False)])
def test_only_sharded_dimensions_are_added_up(sharded):
    mesh = Mesh(2, 3)
    split = Shards().split_of(_member(mesh, *sharded))
    assert split.groups == tuple(mesh.get_group(d) for d, is_sharded in enumerate(sharded) if is_sharded)
    assert (split == WHOLE) == (not any(sharded))
