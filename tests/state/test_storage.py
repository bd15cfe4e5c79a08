"""Storage options: what they cost, what they create, and which of them exclude each other."""

import pytest
import torch

from lwadamw import AdamW
from lwadamw.kernels import layout
from lwadamw.state import blocks, random_bits
from lwadamw.state.combinations import COMBINATIONS
from tests.state.storages import B, F, H, give_grads, make


@pytest.mark.parametrize("name", COMBINATIONS)
def test_state_takes_the_bytes_of_the_table(name):
    c = COMBINATIONS[name]
    (p,), optimizer = make(c, [(256, 1024)])
    give_grads(c, [p])
    optimizer.step()
    held = sum(t.numel() * t.element_size() for key, t in optimizer.state[p].items() if key != "step")
    assert held / p.numel() == c.storage.state_bytes()


def test_kernels_and_state_repeat_the_same_numbers():

    assert blocks.QUANT == layout.QUANT
    assert layout.MIN_CHUNK % layout.QUANT == 0
    assert (random_bits.DRAW, random_bits.PHILOX_ROUNDS) == (layout.DRAW, layout.PHILOX_ROUNDS)


def test_bytes_moved_are_at_the_floor():
    moved = {name: c.storage.moved_bytes() for name, c in COMBINATIONS.items()}
    assert moved["fp32"] == 28
    assert moved["bf16"] == 14
    assert moved["bf16, remainder"] == 26
    assert moved["bf16, remainder, bf16 moments"] == 18
    assert moved["bf16, remainder, 8-bit moments"] <= 14.5


REFUSED = {
    "unsigned exp_avg": ({"exp_avg_dtype": torch.uint8}, F, "The dtype of the first moment's codes is torch.int8"),
    "signed exp_avg_sq": ({"exp_avg_sq_dtype": torch.int8}, F, "A second moment has no sign"),
    "fp16 moments": ({"exp_avg_dtype": H}, H, r"exp_avg_dtype=torch.float16 is not one of None, torch.float32"),
    "master true": ({"master_weights": True}, B, "'remainder' 2 beside a bfloat16"),
    "master and rounding": ({"master_weights": F, "rounding": "kahan"}, B, "Leave one of them out"),
    "fp16 remainder": ({"master_weights": "remainder"}, H, "Use master_weights=torch.float32"),
    "fp16 stochastic": ({"rounding": "stochastic"}, H, "Use rounding='kahan'"),
    "fp64 moments": ({"exp_avg_dtype": B}, torch.float64, "whose state has its own dtype"),
    "amsgrad 8-bit": ({"amsgrad": True, "exp_avg_sq_dtype": torch.uint8}, F, "Use torch.bfloat16 or torch.float32"),
    "foreach": ({"foreach": True, "rounding": "kahan"}, B, "foreach=True asks for torch's implementation"),
    "seed": ({"rounding_seed": -1}, B, "not an int from 0"),
    "attribute": ({"grad_attribute": "grads"}, B, "not one of 'grad', 'main_grad', 'decoupled_grad'"),
    "nonfinite": ({"nonfinite": "ignore"}, F, "not one of 'skip', 'raise', 'pass'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_work_are_refused_with_a_remedy(case):
    options, dtype, message = REFUSED[case]
    p = torch.nn.Parameter(torch.zeros(3, 5, dtype=dtype))
    with pytest.raises(ValueError, match=message) as raised:
        AdamW([("layer.w", p)], **options)
    if "fp16 " in case and "moments" not in case:
        assert "'layer.w' (3, 5)" in str(raised.value)


def test_groups_may_store_differently(backend, device):
    a, b = (torch.nn.Parameter(torch.randn(33, 64, device=device).to(B)) for _ in range(2))
    groups = [{"params": [a], "master_weights": "remainder"}, {"params": [b], "rounding": "kahan"}]
    optimizer = AdamW(groups, exp_avg_dtype=B, backend=backend, max_grad_norm=1.0)
    a.grad, b.grad = torch.randn_like(a), torch.randn_like(b)
    optimizer.step()
    assert optimizer.state[a]["master_param"].dtype == torch.int16
    assert "kahan_comp" in optimizer.state[b]
    assert optimizer.state[a]["exp_avg"].dtype == optimizer.state[b]["exp_avg"].dtype == B
    expected = torch.stack([a.grad.float().norm(), b.grad.float().norm()]).norm()
    torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-5, atol=0)


def test_small_parameters_keep_32_bit_moments_and_float32_ones_have_no_master_weight(backend, device):
    small, vector = torch.nn.Parameter(torch.randn(100, device=device).to(B)), torch.nn.Parameter(torch.randn(9))
    vector = torch.nn.Parameter(vector.detach().to(device))
    optimizer = AdamW(
        [small, vector], backend=backend, exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8, master_weights=F
    )
    small.grad, vector.grad = torch.randn_like(small), torch.randn_like(vector)
    optimizer.step()
    assert optimizer.state[small]["exp_avg"].dtype == F
    assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}
