"""Decay laws and checkpoints: a run goes on bit for bit, another law is refused, and torch gets what it can express."""

import copy
import io
import re

import pytest
import torch

from lwadamw import AdamW
from lwadamw.state.decay import LAWS
from tests.cases import GROUP_KEYS, clone_params, make_params, set_grads
from tests.state.decays import PEAK, WIDTHS


def test_a_plain_adamw_has_no_new_keys():
    params = make_params([(3,)])
    ours, theirs = AdamW(params), torch.optim.AdamW(params)
    explicit = AdamW(params, decay="coupled", huber_scale=1.0, peak_lr=None)
    assert ours.state_dict()["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    assert explicit.state_dict() == ours.state_dict()


@pytest.mark.parametrize("law", LAWS)
def test_a_checkpoint_goes_on_bit_for_bit(law, backend, device):
    params = make_params([(40,), (9, 9)], device)
    optimizer = AdamW(params, lr=PEAK, weight_decay=2.0, decay=law, backend=backend, huber_scale=0.5)
    for lr in (0.01, 0.02):
        optimizer.param_groups[0]["lr"] = lr
        set_grads(params)
        optimizer.step()
    copies = clone_params(params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    # As in torch, the numbers of the checkpoint count, and not the lr of the new optimizer.
    resumed = AdamW(copies, lr=7.0, weight_decay=2.0, decay=law, backend=backend)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0].get("peak_lr") == (PEAK if law in ("independent", "corrected") else None)
    for _ in range(2):
        set_grads(params, copies)
        optimizer.step()
        resumed.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(v, resumed.state[q][key]) for key, v in optimizer.state[p].items())


def test_a_checkpoint_of_torch_keeps_the_law(backend, device):
    params = make_params([(40,)], device)
    theirs = torch.optim.AdamW(params, lr=0.01)
    set_grads(params)
    theirs.step()
    for law in LAWS[1:]:
        optimizer = AdamW(params, lr=PEAK, decay=law, backend=backend)
        optimizer.load_state_dict(theirs.state_dict())
        group = optimizer.param_groups[0]
        assert (group["decay"], group["lr"]) == (law, 0.01)
        assert group.get("peak_lr") == (None if law == "huber" else PEAK)
        set_grads(params)
        optimizer.step()
        assert ("huber_threshold" in optimizer.state[params[0]]) == (law == "huber")


@pytest.mark.parametrize(
    ("saved", "here"), [("independent", "coupled"), ("huber", "corrected"), ("corrected", "huber")]
)
def test_a_checkpoint_of_another_law_is_refused(saved, here):
    params = make_params([(40,)])
    state_dict = AdamW(params, decay=saved).state_dict()
    optimizer = AdamW(params, decay=here)
    with pytest.raises(
        ValueError, match=re.escape(f"group 0 has decay={saved!r} in the checkpoint and {here!r} here")
    ) as error:
        optimizer.load_state_dict(state_dict)
    exec(str(error.value).splitlines()[-1].strip(), {"state_dict": state_dict})
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0].get("decay", "coupled") == here


def test_independent_decay_is_exported_to_torch_exactly_and_other_laws_are_refused(device):
    params = make_params([(40,)], device)
    copies = clone_params(params)
    optimizer = AdamW([{"params": params, **{k: WIDTHS[k] for k in GROUP_KEYS}}], lr=PEAK, decay="independent")
    set_grads(params, copies)
    optimizer.step()
    theirs = torch.optim.AdamW(copies)
    theirs.load_state_dict(copy.deepcopy(optimizer.to_torch_state_dict()))
    assert theirs.param_groups[0].keys() == torch.optim.AdamW(copies).param_groups[0].keys()
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p)
    for factor in (1.0, 0.3):
        for o in (optimizer, theirs):
            o.param_groups[0]["lr"] *= factor
        set_grads(params, copies)
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(params[0], copies[0], rtol=1.3e-6, atol=1e-6)
    for law in ("corrected", "huber"):
        with pytest.raises(ValueError, match=f"group 0 has decay='{law}'"):
            AdamW(params, decay=law).to_torch_state_dict()


def test_laws_survive_a_copy():
    params = make_params([(3,)])
    optimizer = copy.deepcopy(AdamW(params, lr=PEAK, decay="independent"))
    optimizer.add_param_group({"params": make_params([(2,)]), "lr": 0.5})
    assert [(g["decay"], g["peak_lr"]) for g in optimizer.param_groups] == [("independent", PEAK), ("independent", 0.5)]
