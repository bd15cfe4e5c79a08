"""Names of parameters: given ones, places where there are none, and the types of layers."""

import pytest
import torch

from lwadamw import AdamW
from lwadamw.state.draws import rounding_row
from lwadamw.state.members import members_of
from lwadamw.state.names import layer_type, names_of


@pytest.mark.parametrize("names", [None, [], ["only one"], ["one", "two", "three"]])
def test_parameters_are_called_by_their_places_unless_there_is_a_name_for_each(names):
    group = {"params": [torch.zeros(1), torch.zeros(2)]} | ({} if names is None else {"param_names": names})
    assert names_of(group, 3) == ["3.0", "3.1"]


def test_a_group_whose_parameters_were_replaced_steps_and_does_not_use_old_names(backend, device):
    """A framework may put one flat tensor in the place of several named parameters."""
    a, b, flat = (torch.nn.Parameter(torch.ones(n, device=device)) for n in (2, 3, 5))
    optimizer = AdamW([("a", a), ("b", b)], lr=0.5, weight_decay=0.0, backend=backend)
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    optimizer.step()
    torch.testing.assert_close(flat.detach(), torch.full_like(flat, 0.5))
    assert optimizer.norms().names == ("0.0",)


def test_only_whole_components_that_are_numbers_are_layer_numbers():
    names = ["0.weight", "h.12.w1.weight", "h.12.w2.weight", "blocks.3.fc1_4.bias", "conv1", "7", "h.1.qkv[2]"]
    kinds = ["*.weight", "h.*.w1.weight", "h.*.w2.weight", "blocks.*.fc1_4.bias", "conv1", "*", "h.*.qkv[2]"]
    assert [layer_type(name) for name in names] == kinds


def test_random_bits_do_not_follow_a_name_that_is_only_a_place():
    """Otherwise regrouping would change the bits of a parameter whose own name is not known."""
    params = [torch.zeros(2), torch.zeros(3)]
    for names in ({}, {"param_names": ["one"]}):
        assert [rounding_row(m)[1] for m in members_of([{"params": params, **names}])] == [0, 0]
    assert 0 not in [rounding_row(m)[1] for m in members_of([{"params": params, "param_names": ["a", "b"]}])]


def test_segments_of_a_nameless_parameter_are_given_by_its_place(backend, device):
    p = torch.nn.Parameter(torch.randn(6, 4, device=device))
    optimizer = AdamW([{"params": [p], "segments": {"0.0": (2, 4)}}], backend=backend)
    assert [m.segments for m in members_of(optimizer.param_groups)] == [(8, 16)]
    with pytest.raises(
        ValueError, match=r"segments for 'w', which is not a parameter of this group. .* called '0.0'\."
    ):
        AdamW([{"params": [torch.nn.Parameter(torch.randn(6, 4))], "segments": {"w": (2, 4)}}])
