"""What kernels read when they run late: the numbers of their own step, on every device and on every stream."""

import pytest
import torch

from lwadamw import AdamW
from lwadamw.kernels import layout
from lwadamw.state.members import members_of
from lwadamw.step.loss_scaling import LossScaling, _Scaled
from lwadamw.tables.request import Request
from tests.driver.twins import SHAPES, Twins, scaled_backward

ORDERS = ("first", "last")


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "nonfinite": "raise"}])
def test_late_kernels_read_the_numbers_of_their_own_step(indices, options, driver):
    twins = Twins(driver, indices, **options)
    for step in range(5):
        twins.give_grads()
        twins.set(lr=1e-3 * (step + 1))
        twins.step()
        driver.run_device(0)  # the current device is idle, the other one is far behind
    assert driver.waits == 0
    twins.assert_equal()


@pytest.mark.parametrize("order", ORDERS)
def test_late_kernels_on_a_side_stream_read_the_numbers_of_their_own_step(order, driver):
    twins = Twins(driver, (1,))
    side = driver.new_stream(1)
    for step in range(4):
        with driver.stream(side):
            twins.give_grads()
            twins.set(lr=1e-3 * (step + 1))
            twins.step()
        driver.current_stream(1).wait_stream(side)
    twins.assert_equal(order)


def test_the_norm_of_a_late_step_is_checked_when_it_has_arrived(driver):
    twins = Twins(driver, (1,), max_grad_norm=1.0, nonfinite="raise")
    optimizer = twins.optimizer
    twins.give_grads()
    twins.params[0].grad = torch.full_like(twins.params[0], float("inf")).detach()
    optimizer.step()
    driver.run_device(0)
    twins.give_grads()
    optimizer.step()
    driver.run()
    with pytest.raises(RuntimeError, match="global gradient norm of a step was inf"):
        optimizer.step()


@pytest.mark.parametrize("order", ORDERS)
def test_a_step_on_another_stream_waits_for_the_tables_of_the_step_before(order, driver):
    """Gradient release takes the steps of two parameters on two streams, as autograd does if forward used two streams."""
    twins = Twins(driver)
    streams = twins.release()
    for step in range(3):
        twins.give_grads()
        twins.set(lr=1e-3 * (step + 1))
        for p, stream in zip(twins.params, streams, strict=True):
            with driver.stream(stream):
                # The user orders what he knows: a parameter is always updated on the stream of its own gradient.
                stream.wait_stream(driver.streams[0]) if step == 0 else None
                twins.optimizer._step_released(p)
        for q in twins.expected:
            twins.twin._step_released(q)
    twins.assert_equal(order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_released_inf_skips_the_step_of_its_own_parameter_on_every_stream(order, driver):
    twins = Twins(driver)
    streams = twins.release()
    with scaled_backward(8.0):
        for _ in range(2):
            twins.give_grads()
            twins.expected[0].grad[0] = float("inf")
            twins.params[0].grad[0] = float("inf")
            for p, stream in zip(twins.params, streams, strict=True):
                with driver.stream(stream):
                    twins.optimizer._step_released(p)
            for q in twins.expected:
                twins.twin._step_released(q)
    twins.assert_equal(order)


@pytest.mark.parametrize("order", ORDERS)
def test_tables_made_again_on_another_stream_wait_for_the_former_ones(order, driver):
    twins = Twins(driver)
    streams = twins.release()
    for step in range(2):
        twins.give_grads()
        for i, (p, stream) in enumerate(zip(twins.params, streams, strict=True)):
            if (step, i) == (1, 1):
                twins.set(amsgrad=True)
            with driver.stream(stream):
                twins.optimizer._step_released(p)
            twins.twin._step_released(twins.expected[i])
    driver.run(order)
    steps = [float(twins.optimizer.state[p]["step"].raw) for p in twins.params]
    assert steps == [float(twins.twin.state[q]["step"]) for q in twins.expected] == [2.0, 2.0, 2.0]


def test_norms_on_another_stream_wait_for_the_step(driver):
    twins = Twins(driver)
    twins.give_grads()
    twins.step()
    with driver.stream(driver.new_stream(0)):
        sums = twins.optimizer.norm_sums()
    driver.run("last")
    assert torch.equal(sums.raw, twins.twin.norm_sums())


def test_the_allocator_learns_of_every_stream_that_uses_the_tables(driver):
    twins = Twins(driver)
    twins.give_grads()
    twins.step()
    assert not driver.recorded
    side = driver.new_stream(0)
    with driver.stream(side):
        twins.step()
    (tracked,) = twins.optimizer._engine._triton._plans
    launches = [*tracked.plan._launches._coefficients, *tracked.plan._launches._update]
    tables = {a.raw.data_ptr() for launch in launches for a in launch._arguments if isinstance(a, torch.Tensor)}
    recorded = {address for address, stream in driver.recorded if stream is side}
    # The launches read the dynamic table from its beginning, and from the first gradient on.
    inner = {tracked.plan._dynamic.gradients.raw.data_ptr()}
    assert tables - inner - {0} <= recorded


@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3)])
def test_gradient_release_costs_no_more_than_its_parameters(lr, driver):
    n = 500
    params = [torch.nn.Parameter(torch.zeros(2).to("cuda:0")) for _ in range(n)]
    optimizer = AdamW(params, lr=lr, backend="triton")
    optimizer.release_gradients()
    for backward in range(3):
        driver.queries = driver.pinned = driver.uploaded = 0
        for p in params:
            p.grad = torch.zeros_like(p).detach()
            optimizer._step_released(p)
            p.grad = None
        assert driver.queries <= 2
        assert driver.pinned <= 2
        assert driver.uploaded <= (layout.HEADER + n + layout.GROUP if backward == 0 else 0) + n


@pytest.mark.parametrize("released", [False, True])
def test_copies_of_gradients_do_not_outlive_their_step(released, driver):
    params = [torch.nn.Parameter(torch.randn(6, 5).to("cuda:0")) for _ in range(2)]
    optimizer = AdamW(params, backend="triton")
    if released:
        optimizer.release_gradients()
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros(5, 6).to("cuda:0").t()
            if released:
                optimizer._step_released(p)
        if not released:
            optimizer.step()
        held = [t for tracked in optimizer._engine._triton._plans for t in tracked.gradients.copies]
        assert not held


def test_pinned_memory_is_on_the_cpu_whatever_the_default_device(driver):
    twins = Twins(driver, shapes=SHAPES[:1], max_grad_norm=1.0, nonfinite="raise", capturable=True)
    twins.give_grads()
    torch.set_default_device("meta")
    try:
        twins.step()
    finally:
        torch.set_default_device(None)
    assert driver.pinned == 3, "a page of the table, a page for a capture, and a norm"
    twins.assert_equal()


def _beside_the_cpu(driver, **options):
    """A parameter on the CPU before one on a device, and equal parameters on the CPU, each with gradients and an optimizer."""
    expected = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    params = [torch.nn.Parameter(expected[0].detach().clone()), torch.nn.Parameter(expected[1].detach().to("cuda:0"))]
    for p, q in zip(params, expected, strict=True):
        q.grad = torch.randn_like(q).detach()
        p.grad = q.grad.clone().to(p.device)
    return params, AdamW(params, **options), expected, AdamW(expected, **options)


@pytest.mark.parametrize("foreach", [None, False])
def test_a_clipped_step_on_the_cpu_waits_for_the_gradients_of_a_device(foreach, driver):
    params, optimizer, expected, twin = _beside_the_cpu(driver, max_grad_norm=0.5, foreach=foreach, lr=1e-2, eps=1.0)
    optimizer.step()
    twin.step()
    torch.testing.assert_close(params[0], expected[0])
    assert optimizer._engine.grad_norm is not None
    driver.run()
    torch.testing.assert_close(params[1].detach().raw, expected[1].detach())


def test_norms_on_the_cpu_wait_for_those_of_a_device(driver):
    _, optimizer, _, twin = _beside_the_cpu(driver)
    optimizer.step()
    twin.step()
    torch.testing.assert_close(optimizer.norm_sums(), twin.norm_sums(), rtol=1e-5, atol=1e-12)


def test_a_released_gradient_on_the_cpu_waits_for_the_scale_of_a_device(driver):
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = AdamW([p], lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, eps=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaling = LossScaling(optimizer)
    p.grad = torch.full((3,), 8.0)
    (member,) = members_of(optimizer.param_groups)
    scale = torch.full((), 8.0).to("cuda:0")
    request = scaling._scaled_request(member, Request(), _Scaled(scaler, scale))
    scaling.close()
    assert float(request.grad_scale) == 8.0


def test_clipped_parameters_of_the_torch_backend_may_be_on_several_devices(driver):
    twins = Twins(driver, (0, 1), backend="torch", foreach=True, max_grad_norm=0.5, eps=1.0, capturable=True)
    twins.twin.param_groups[0]["capturable"] = False
    twins.give_grads()
    twins.step()
    driver.run()
    for p, q in zip(twins.params, twins.expected, strict=True):
        torch.testing.assert_close(p.detach().raw, q.detach())


def test_kernels_on_the_interpreter_get_no_address_on_a_real_device(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(2).to("cuda:0"))], backend="triton")
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2).to("cuda:0")
    with pytest.raises(RuntimeError, match=r"cannot update '0.0' \(2,\): TRITON_INTERPRET is set"):
        optimizer.step()
