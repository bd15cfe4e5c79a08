"""Checkpoints of an earlier version: they load, training goes on bit for bit, and today's have the same keys."""

from pathlib import Path

import pytest
import torch

from tests.fixtures import write

FILE = Path(write.__file__).parent / "1c3fdde" / "checkpoints.pt"


@pytest.fixture(scope="module")
def checkpoints():
    """Read the file once. The tests may not change what it holds."""
    return torch.load(FILE, weights_only=True)


def _resumed(saved, case):
    """A newly built model and optimizer that have loaded a saved case."""
    model, optimizer = write.build(case)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


def test_the_file_has_every_case(checkpoints):
    assert checkpoints.keys() == write.CASES.keys()


@pytest.mark.parametrize("case", write.CASES)
def test_an_earlier_checkpoint_goes_on_bit_for_bit(case, checkpoints):
    """On the torch backend, which has written it."""
    saved = checkpoints[case]
    model, optimizer = _resumed(saved, case)
    write.take_steps(model, optimizer, seed=2)
    weights = model.state_dict()
    assert weights.keys() == saved["model_later"].keys()
    for name, weight in weights.items():
        assert torch.equal(weight, saved["model_later"][name]), name
        assert not torch.equal(weight, saved["model"][name]), name


@pytest.mark.parametrize("case", write.CASES)
def test_loading_an_earlier_checkpoint_loses_no_bit(case, checkpoints):
    saved = checkpoints[case]["optimizer"]
    _, optimizer = _resumed(checkpoints[case], case)
    # The saved form has another shape where arrays are no plain numbers, so look at the state itself.
    loaded = optimizer._state_dict()
    assert loaded["param_groups"] == saved["param_groups"]
    assert loaded["state"].keys() == saved["state"].keys()
    for i, state in saved["state"].items():
        assert loaded["state"][i].keys() == state.keys()
        for key, value in state.items():
            assert loaded["state"][i][key].dtype == value.dtype, key
            assert torch.equal(loaded["state"][i][key].view(value.shape), value), key


@pytest.mark.parametrize("case", write.CASES)
def test_a_checkpoint_of_today_has_the_keys_dtypes_and_shapes_of_an_earlier_one(case, checkpoints):
    saved = checkpoints[case]["optimizer"]
    model, optimizer = write.build(case)
    write.take_steps(model, optimizer, seed=1)
    today = optimizer._state_dict()
    assert today.keys() == saved.keys()
    assert [list(g) for g in today["param_groups"]] == [list(g) for g in saved["param_groups"]]
    assert today["state"].keys() == saved["state"].keys()
    for i, state in saved["state"].items():
        # Scales were flat where a row is not whole blocks.
        found = {key: (value.dtype, key.endswith("scale") or value.shape) for key, value in today["state"][i].items()}
        assert found == {key: (value.dtype, key.endswith("scale") or value.shape) for key, value in state.items()}
