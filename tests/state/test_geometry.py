"""A geometry holds for tensors of the same shapes, strides, dtypes and devices, and for no others."""

import pytest
import torch

from lwadamw.state import geometry
from lwadamw.state.geometry import Geometry

OTHERS = {
    "rows cut off": lambda t: t[:2],
    "another shape": lambda t: t.view(3, 4),
    "another stride": lambda t: t.as_strided((4, 3), (1, 4)),
    "another dtype": lambda t: t.view(torch.int32),
    "another number of dimensions": lambda t: t.view(12),
    "another device": lambda t: t.to("meta"),
    "another type": lambda t: torch.nn.Parameter(t),
    "none": lambda t: None,
    "sparse": lambda t: t.to_sparse(),
}


@pytest.fixture(params=[True, False], ids=["with guards", "without guards"])
def guards(request, monkeypatch):
    """Run a test with torch's guards, and as in a build of torch that has none."""
    if not request.param:
        monkeypatch.setattr(geometry, "_guards_work", lambda: False)
    return request.param


@pytest.mark.parametrize("what", OTHERS)
def test_a_geometry_does_not_hold_for_another_tensor(what, guards):
    tensors = [torch.randn(n, 3) for n in (5, 4, 1)]
    known = Geometry(tensors)
    assert known.holds(tensors)
    assert not known.holds([tensors[0], OTHERS[what](tensors[1]), tensors[2]])
    assert known.holds([t.clone() for t in tensors])


def test_a_geometry_does_not_hold_for_a_sparse_tensor_without_dimensions(guards):
    tensor = torch.tensor(1.0)
    assert not Geometry([tensor]).holds([tensor.to_sparse()])


def test_a_geometry_holds_in_every_mode_of_torch(guards):
    tensors = [torch.nn.Parameter(torch.randn(3, 2).T) for _ in range(3)] + [torch.nn.Parameter(torch.tensor(1.0))]
    known = Geometry(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert known.holds(tensors)
    with torch.inference_mode():
        assert known.holds(tensors)
    tensors[1].requires_grad_(False)
    for _ in range(2 * geometry._REMAKES):
        tensors[0].requires_grad_(not tensors[0].requires_grad)
        assert known.holds(tensors)
    assert not known.holds([*tensors[:3], torch.nn.Parameter(torch.tensor([1.0]))])


def test_this_build_of_torch_has_guards():
    assert geometry._guards_work()
