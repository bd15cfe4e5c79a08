"""Gradient release under torch.amp.GradScaler: steps on unscaled gradients, skipped per parameter, reported to the scaler."""

import gc
import warnings

import pytest
import torch
from torch.amp import GradScaler

from lwadamw import AdamW
from lwadamw.step import loss_scaling
from tests.cases import assert_equal
from tests.step.test_amp import Reads

pytestmark = pytest.mark.matrix

INF = float("inf")


@pytest.fixture(autouse=True)
def scaler_classes_are_left_as_they_were():
    gc.collect()
    before = [dict(cls.__dict__) for cls in (GradScaler, torch.cuda.amp.GradScaler)]
    yield
    gc.collect()
    assert before == [dict(cls.__dict__) for cls in (GradScaler, torch.cuda.amp.GradScaler)]


def _model(device, dtype=torch.float32):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(5, 5, device=device, dtype=dtype) for _ in range(2)))


def _loss(model, seed, factor=1.0):
    torch.manual_seed(seed)
    p = next(model.parameters())
    return model(torch.randn(3, 5, device=p.device, dtype=p.dtype)).square().sum() * factor


def _scaler(device, **options):
    return GradScaler(device.type, **{"init_scale": 1024.0, "growth_interval": 2, **options})


def _pair(backend, device, **options):
    """Return a model that is released, its twin with torch's fused AdamW, and scalers of both."""
    one, two = _model(device), _model(device)
    ours = AdamW(one.named_parameters(), lr=1e-2, backend=backend, **options)
    theirs = torch.optim.AdamW(two.parameters(), lr=1e-2, fused=True)
    return one, two, ours, theirs, _scaler(device), _scaler(device)


def test_weights_and_scales_equal_those_of_whole_steps(backend, device):
    """The loss of some steps is infinite, so every parameter skips, as in a whole step."""
    one, two, ours, theirs, first, second = _pair(backend, device)
    scales = []
    with ours.release_gradients():
        for step in range(8):
            for model, optimizer, scaler in ((one, ours, first), (two, theirs, second)):
                scaler.scale(_loss(model, step, INF if step in (0, 3, 4) else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                if optimizer is theirs:
                    optimizer.zero_grad()
            assert first.get_scale() == second.get_scale()
            scales.append(first.get_scale())
            assert_equal(list(one.parameters()), list(two.parameters()))
            assert all(p.grad is None for p in one.parameters())
        assert {float(ours.state[p]["step"]) for p in one.parameters()} == {5}
        assert int(ours.skipped_steps) == 3
    assert len(set(scales)) == 3


def test_float16_gradients_are_unscaled_in_the_step(device):
    """Unscaled in float16, the gradient would be 0."""
    p = torch.nn.Parameter(torch.zeros(40, device=device, dtype=torch.float16))
    optimizer = AdamW([p], lr=1e-2, backend="triton", master_weights=torch.float32)
    with optimizer.release_gradients():
        scaler = _scaler(device, init_scale=2.0**16)
        scaler.scale((p.float() * 1e-9).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(
        optimizer.state[p]["exp_avg"], torch.full((40,), 1e-10, device=device), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("fused", [None, True])
def test_only_the_parameter_whose_gradient_is_not_finite_skips(fused, backend, device):
    good, bad = (torch.nn.Parameter(torch.ones(7, device=device)) for _ in range(2))
    optimizer = AdamW([("good", good), ("bad", bad)], backend=backend, fused=fused)
    scaler = _scaler(device)
    with optimizer.release_gradients():
        for value, steps, skipped in ((1.0, (1, 1), 0), (INF, (2, 1), 1), (float("nan"), (3, 1), 2), (1.0, (4, 2), 2)):
            factor = torch.ones(7, device=device)
            factor[3] = value
            before = bad.detach().clone()
            scaler.scale((good * 3 + bad * factor).sum()).backward()
            norms = optimizer.norms()
            scaler.step(optimizer)
            scaler.update()
            assert tuple(float(optimizer.state[p]["step"]) for p in (good, bad)) == steps
            assert torch.equal(bad, before) == (value != 1.0)
            assert int(optimizer.skipped_steps) == skipped
            assert (norms.update > 0).tolist() == [True, value == 1.0]
            assert norms.grad[0] == pytest.approx(3 * 7**0.5, rel=1e-5)
    assert scaler.get_scale() == 256.0
    assert not bad.isnan().any()


def test_a_parameter_without_a_hook_is_unscaled_and_checked_in_the_step(backend, device):
    """It skips together with the parameters whose infs were found in backward: `scaler.step` decides for all that is left."""
    model = _model(device)
    model[0].requires_grad_(False)
    twin = _model(device)
    optimizer = AdamW(model.parameters(), lr=1e-2, backend=backend)
    theirs = AdamW(twin.parameters(), lr=1e-2, backend=backend)
    scaler, other = _scaler(device), _scaler(device)
    with optimizer.release_gradients():
        model[0].requires_grad_(True)
        for factor in (1.0, INF, 1.0):
            for m, o, s in ((model, optimizer, scaler), (twin, theirs, other)):
                s.scale(_loss(m, 1, factor)).backward()
                s.step(o)
                s.update()
                o.zero_grad()
            assert_equal(list(model.parameters()), list(twin.parameters()))
            assert scaler.get_scale() == other.get_scale()
    assert {float(s["step"]) for s in optimizer.state.values()} == {2}


def test_unscale_finds_no_gradients_and_the_step_goes_on(backend, device):
    one, two, ours, theirs, first, second = _pair(backend, device)
    with ours.release_gradients():
        for step in range(4):
            for model, optimizer, scaler in ((one, ours, first), (two, theirs, second)):
                scaler.scale(_loss(model, step, INF if step == 1 else 1.0)).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert first.get_scale() == second.get_scale()
            assert_equal(list(one.parameters()), list(two.parameters()))


def test_several_backward_passes_between_two_updates_all_count(backend, device):
    """An inf of the first backward is not forgotten in the second one."""
    model = _model(device)
    optimizer = AdamW(model.parameters(), backend=backend)
    scaler = _scaler(device)
    with optimizer.release_gradients():
        scaler.scale(_loss(model, 0, INF)).backward()
        scaler.scale(_loss(model, 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0
        assert optimizer.steps_taken() == 1
        scaler.scale(_loss(model, 2)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 512.0


def test_two_optimizers_with_one_scaler(backend, device):
    """An inf in the gradients of one optimizer skips its steps only."""
    models = [_model(device) for _ in range(2)]
    optimizers = [AdamW(m.parameters(), backend=backend) for m in models]
    scaler = _scaler(device)
    handles = [o.release_gradients() for o in optimizers]
    for model, factor in zip(models, (1.0, INF), strict=True):
        scaler.scale(_loss(model, 0, factor)).backward()
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert [o.steps_taken() for o in optimizers] == [1, 0]
    assert [int(o.skipped_steps) for o in optimizers] == [0, 1]
    assert scaler.get_scale() == 512.0
    handles[0].remove()
    scaler.scale(_loss(models[1], 0)).backward()
    scaler.step(optimizers[1])
    scaler.update()
    assert optimizers[1].steps_taken() == 1


@pytest.mark.parametrize("where", ["divided after scaling", "outputs", "grad of a list", "retained"])
def test_wherever_the_scale_is_applied_the_step_is_unscaled(where, backend, device):
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([p], backend=backend)
    scaler = _scaler(device)
    with optimizer.release_gradients():
        if where == "divided after scaling":
            (scaler.scale((p * 2).sum()) / 4).backward()
        elif where == "outputs":
            scaler.scale(p * 0.5).sum().backward()
        elif where == "grad of a list":
            torch.autograd.backward(scaler.scale([(p * 0.25).sum(), (p * 0.25).sum()]))
        else:
            scaled = scaler.scale((p * 0.5).sum())
            (grad,) = torch.autograd.grad(scaled, [p], retain_graph=True)
            assert grad[0] == 512.0
            scaled.backward()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6,), 0.05, device=device))


def test_an_unscaled_backward_between_scaled_ones_stays_unscaled(backend, device):
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([p], backend=backend, betas=(0.0, 0.0))
    scaler = _scaler(device)
    with optimizer.release_gradients():
        for scaled in (True, False, True, False):
            loss = (p * 0.5).sum()
            (scaler.scale(loss) if scaled else loss).backward()
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6,), 0.5, device=device))


def test_a_backward_that_raised_leaves_nothing_behind(backend, device):
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([p], backend=backend, betas=(0.0, 0.0))
    scaler = _scaler(device)

    def fail(grad):
        raise ZeroDivisionError

    with optimizer.release_gradients():
        for _ in range(100):
            hidden = p * 0.5
            hidden.register_hook(fail)
            with pytest.raises(ZeroDivisionError):
                scaler.scale(hidden.sum()).backward()
        (p * 0.5).sum().backward()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6,), 0.5, device=device))
    assert len(loss_scaling._backwards) <= 64


def test_a_disabled_scaler_changes_nothing(backend, device):
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([p], backend=backend)
    scaler = GradScaler(device.type, enabled=False)
    with optimizer.release_gradients():
        scaler.scale((p * 0.5).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6,), 0.05, device=device))


class _Own(GradScaler):
    def scale(self, outputs):
        return super().scale(outputs).clone()


class _Another(GradScaler):
    def scale(self, outputs):
        if self._scale is None:
            self._lazy_init_scale_growth_tracker(outputs.device)
        return outputs * self._scale


@pytest.mark.parametrize("cls", [_Own, _Another, torch.cuda.amp.GradScaler, "defined later"])
def test_subclasses_of_the_scaler_are_seen(cls, backend, device):
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([p], backend=backend)
    with optimizer.release_gradients(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if cls == "defined later":

            class cls(_Another):
                def scale(self, outputs):
                    return outputs * self._scale.clone() if self._scale is not None else super().scale(outputs)

        if cls is torch.cuda.amp.GradScaler:
            scaler = cls()
            if not scaler.is_enabled():
                pytest.skip("needs CUDA")
        else:
            scaler = cls(device.type, init_scale=1024.0)
        for _ in range(2):
            scaler.scale((p * 0.5).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6,), 0.095, device=device))


def test_the_sharded_scaler_is_seen(backend, device, tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("needs gloo")
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        p = torch.nn.Parameter(torch.ones(6, device=device))
        optimizer = AdamW([p], backend=backend)
        scaler = ShardedGradScaler(device.type, init_scale=1024.0, process_group=torch.distributed.group.WORLD)
        with optimizer.release_gradients():
            for value in (0.5, INF):
                scaler.scale((p * value).sum()).backward()
                scaler.step(optimizer)
                scaler.update()
        torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6,), 0.05, device=device))
        assert scaler.get_scale() == 512.0
        assert int(optimizer.skipped_steps) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_several_scalers_in_one_backward_are_refused(backend, device):
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([("w", p)], backend=backend)
    with optimizer.release_gradients():
        loss = _scaler(device).scale((p * 2).sum()) + _scaler(device).scale((p * 3).sum())
        with pytest.raises(RuntimeError, match=r"several GradScalers have scaled the loss .* 'w' \(6,\)"):
            loss.backward()
    assert torch.equal(p, torch.ones_like(p))


def test_a_scaler_that_was_not_seen_is_named_in_its_step(backend, device):
    """A loss that was scaled before gradients were released."""
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([p], backend=backend)
    scaler = _scaler(device)
    loss = scaler.scale((p * 2).sum())
    with optimizer.release_gradients():
        loss.backward()
        with pytest.raises(RuntimeError, match="whose loss no known scaler had scaled"):
            scaler.step(optimizer)


def test_grad_scale_and_found_inf_of_a_framework_are_followed(backend, device):
    p = torch.nn.Parameter(torch.ones(6, device=device))
    optimizer = AdamW([p], backend=backend)
    with optimizer.release_gradients():
        optimizer.grad_scale = torch.tensor(8.0, device=device)
        optimizer.found_inf = torch.tensor(1.0, device=device)
        (p * 4).sum().backward()
        assert torch.equal(p, torch.ones_like(p))
        optimizer.step()
        assert int(optimizer.skipped_steps) == 1
        optimizer.found_inf = torch.tensor(0.0, device=device)
        (p * 4).sum().backward()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((6,), 0.05, device=device))
    assert int(optimizer.skipped_steps) == 1


def test_a_method_that_somebody_wraps_meanwhile_stays_wrapped(device):
    class Sub(GradScaler):
        def scale(self, outputs):
            return super().scale(outputs)

    p = torch.nn.Parameter(torch.ones(6, device=device))
    handle = AdamW([p]).release_gradients()
    ours = Sub.scale
    Sub.scale = theirs = lambda self, outputs: ours(self, outputs)
    handle.remove()
    assert Sub.scale is theirs
    assert Sub(device.type, init_scale=4.0).scale(p.sum()) == 24.0


@pytest.mark.parametrize("options", [{}, {"master_weights": torch.float32}])
def test_a_scaled_backward_does_not_wait_for_the_device(options, device):
    dtype = torch.bfloat16 if options else torch.float32
    model = _model(device, dtype)
    optimizer = AdamW(model.parameters(), backend="triton", **options)
    scaler = _scaler(device)
    with optimizer.release_gradients():
        for step in range(3):
            loss = scaler.scale(_loss(model, step, INF if step == 1 else 1.0))
            with Reads() as reads:
                loss.backward()
                scaler.step(optimizer)
                scaler.update()
            # Without a GPU, torch compares the scale of a scaler on the CPU on the host.
            assert step == 0 or reads.found == []
