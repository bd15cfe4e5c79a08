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


CODED = [case for case, options in write.CASES.items() if torch.int8 in options.values()]


@pytest.mark.parametrize("case", [case for case in write.CASES if case not in CODED])
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


@pytest.mark.parametrize("case", CODED)
def test_an_earlier_checkpoint_with_codes_goes_on_with_other_random_bits(case, checkpoints):
    """Codes are read as before, and rounded by other random bits.

    Three steps at lr 0.01 move the weights by about 0.03, and the rounding by a few percent of it.
    """
    saved = checkpoints[case]
    model, optimizer = _resumed(saved, case)
    write.take_steps(model, optimizer, seed=2)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, saved["model_later"][name], rtol=0.01, atol=2e-3)
        assert not torch.equal(weight, saved["model"][name]), name


def _states(optimizer, saved):
    """The state of each parameter that a checkpoint has state of, and what the checkpoint has."""
    pairs = zip(saved["param_groups"], optimizer.param_groups, strict=True)
    places = [place for s, group in pairs for place in zip(s["params"], group["params"], strict=True)]
    assert sorted(saved["state"]) == sorted(i for i, p in places if p in optimizer.state)
    return [(optimizer.state[p], saved["state"][i]) for i, p in places if i in saved["state"]]


@pytest.mark.parametrize("case", write.CASES)
def test_loading_an_earlier_checkpoint_loses_no_bit(case, checkpoints):
    saved = checkpoints[case]["optimizer"]
    _, optimizer = _resumed(checkpoints[case], case)
    groups = [{**g, "params": s["params"]} for g, s in zip(optimizer.param_groups, saved["param_groups"], strict=True)]
    assert groups == saved["param_groups"]
    for state, earlier in _states(optimizer, saved):
        assert state.keys() == earlier.keys()
        for key, value in earlier.items():
            assert state[key].dtype == value.dtype, key
            assert torch.equal(state[key], value), key


@pytest.mark.parametrize("case", write.CASES)
def test_state_of_today_has_the_keys_dtypes_and_shapes_of_an_earlier_one(case, checkpoints):
    saved = checkpoints[case]["optimizer"]
    model, optimizer = write.build(case)
    write.take_steps(model, optimizer, seed=1)
    today = optimizer.state_dict()
    assert today.keys() == saved.keys()
    newer = {"decoupled_weight_decay"} - torch.optim.AdamW([torch.zeros(1)]).defaults.keys()  # torch 2.7 has added it
    assert [{*g} for g in today["param_groups"]] == [{*g} - newer for g in saved["param_groups"]]
    for state, earlier in _states(optimizer, saved):
        found = {key: (value.dtype, value.shape) for key, value in state.items()}
        assert found == {key: (value.dtype, value.shape) for key, value in earlier.items()}


@pytest.mark.parametrize("case", write.CASES)
def test_a_checkpoint_of_today_has_the_keys_of_an_earlier_one_and_marks_what_is_no_plain_number(case, checkpoints):
    saved = checkpoints[case]["optimizer"]
    model, optimizer = write.build(case)
    write.take_steps(model, optimizer, seed=1)
    today = optimizer.state_dict()
    assert today["state"].keys() == saved["state"].keys()
    for i, state in saved["state"].items():
        marked = {key for key, value in state.items() if value.dtype in (torch.int8, torch.uint8)}
        if case in ("remainder", "master", "kahan"):
            marked.add("exp_avg")
        expected = {key: (v.dtype, (*v.shape, 1) if key in marked else tuple(v.shape)) for key, v in state.items()}
        if case == "remainder":
            expected["master_param"] = (torch.uint8, (*state["master_param"].shape, 2))
        if "exp_avg_scale" in expected:  # 0.weight is [64, 64], and two of its rows are a block
            expected |= {key: (torch.float32, (32, 1)) for key in ("exp_avg_scale", "exp_avg_sq_scale")}
        assert {key: (v.dtype, tuple(v.shape)) for key, v in today["state"][i].items()} == expected
