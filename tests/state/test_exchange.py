"""Exchange of state with frameworks, with other storage and with torch: no value is rounded or dropped on the way."""

import pytest
import torch

from lwadamw import AdamW

_SMALL = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}


def _stepped(p, steps=2, **options):
    optimizer = AdamW([("w", p)], lr=0.1, **options)
    for _ in range(steps):
        p.grad = torch.randn_like(p) * torch.rand(p.shape, dtype=p.real.dtype) ** 4
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_wide_values_are_set_and_read_without_rounding(dtype):
    p = torch.nn.Parameter(torch.randn(3, 7, dtype=dtype))
    optimizer = _stepped(p)
    for name in ("exp_avg", "exp_avg_sq"):
        values = torch.randn(p.shape, dtype=dtype)
        optimizer.set_scaled_state(p, name, values)
        assert torch.equal(optimizer.get_unscaled_state(p, name), values)
    weight = torch.randn(p.shape, dtype=dtype)
    optimizer.set_scaled_state(p, "master_param", weight)
    assert torch.equal(p, weight)
    assert torch.equal(optimizer.master_weight(p), weight)
    assert optimizer.master_weight(p).data_ptr() != p.data_ptr()


@pytest.mark.parametrize("shape", [(64, 128), (50, 100)])
def test_converting_keeps_every_bit_of_moments_that_are_as_asked_already(shape):
    p = torch.nn.Parameter(torch.randn(shape).bfloat16())
    optimizer = _stepped(p, **_SMALL)
    before = {key: value.clone() for key, value in optimizer.state[p].items()}
    optimizer.param_groups[0]["master_weights"] = torch.float32
    optimizer.convert_state()
    assert optimizer.state[p].keys() == {*before, "master_param"}
    assert all(torch.equal(optimizer.state[p][key], value) for key, value in before.items())


def test_converting_the_maximum_of_amsgrad_to_8_bits_is_refused_and_the_state_stays_whole():
    p = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = _stepped(p, amsgrad=True)
    before = dict(optimizer.state[p])
    optimizer.param_groups[0].update(_SMALL, amsgrad=False)
    with pytest.raises(RuntimeError, match=r"exp_avg_sq of 'w' \(64, 128\) would be kept in 8 bits"):
        optimizer.convert_state()
    assert optimizer.state[p].keys() == before.keys()
    assert all(optimizer.state[p][key] is value for key, value in before.items())
    optimizer.state[p].pop("max_exp_avg_sq")
    optimizer.convert_state()
    optimizer.step()
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.uint8


@pytest.mark.parametrize("options", [{"master_weights": "remainder"}, {"rounding": "stochastic"}, {"rounding": "up"}])
def test_a_conversion_that_the_parameter_does_not_allow_is_refused_and_no_digit_of_it_is_lost(options):
    p = torch.nn.Parameter(torch.randn(9).half())
    optimizer = _stepped(p, master_weights=torch.float32)
    before, weight = p.detach().clone(), optimizer.master_weight(p)
    optimizer.param_groups[0].update({"master_weights": None, **options})
    with pytest.raises(ValueError, match=next(iter(options))):
        optimizer.convert_state()
    assert torch.equal(p, before)
    assert torch.equal(optimizer.master_weight(p), weight)


def test_codes_without_scales_are_not_converted_to_zeros():
    p = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = _stepped(p, **_SMALL)
    del optimizer.state[p]["exp_avg_scale"]
    with pytest.raises(RuntimeError, match="exp_avg_scale is missing"):
        optimizer.convert_state()
    assert "exp_avg_scale" not in optimizer.state[p]


def test_a_scheduler_that_goes_on_in_torch_keeps_the_width_ratio():
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = AdamW([{"params": [p], "width_lr_mult": 0.25}], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / 10)
    for _ in range(3):
        p.grad = torch.ones(5)
        optimizer.step()
        schedule.step()
    theirs = torch.optim.AdamW([p])
    theirs.load_state_dict(optimizer.to_torch_state_dict())
    on = torch.optim.lr_scheduler.LambdaLR(theirs, lambda t: 1 - t / 10, last_epoch=2)
    assert theirs.param_groups[0]["lr"] == pytest.approx(0.25 * 0.7)
    theirs.step()
    on.step()
    assert theirs.param_groups[0]["lr"] == pytest.approx(0.25 * 0.6)


def test_8_bit_moments_are_set_in_the_layout_that_the_parameter_has_now():
    p = torch.nn.Parameter(torch.randn(50, 100).T)
    optimizer = _stepped(p, backend="torch", **_SMALL)
    p.data = p.data.contiguous()
    values = {name: optimizer.get_unscaled_state(p, name) for name in ("exp_avg", "exp_avg_sq")}
    for name, value in values.items():
        optimizer.set_scaled_state(p, name, value)
        largest = value.abs().max()
        assert (optimizer.get_unscaled_state(p, name) - value).abs().max() < 0.05 * largest
    p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = optimizer.get_unscaled_state(p, "exp_avg") - 0.9 * values["exp_avg"]
    assert decayed.abs().max() < 0.05 * values["exp_avg"].abs().max()
