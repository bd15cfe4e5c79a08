"""Captured steps: a replay works on the tensors and numbers of its own capture, whatever happens in between."""

import weakref

import pytest
import torch

from lwadamw import AdamW
from tests.driver.twins import Twins, scaled_backward


def _capture(driver, twins, value):
    """Capture a whole training step on the device: clear the gradients, compute them from `value`, and step.

    Returns the graph, and a function that does the same on the CPU.
    """

    def train(optimizer, params, inputs):
        optimizer.zero_grad(set_to_none=True)
        for p, x in zip(params, inputs, strict=True):
            p.grad = (x * 2.0).detach()
        optimizer.step()

    inputs = [v.to(p.device) for v, p in zip(value, twins.params, strict=True)]
    with driver.capture() as graph:
        train(twins.optimizer, twins.params, inputs)
    return graph, inputs, lambda: train(twins.twin, twins.expected, value)


def _values(twins):
    return [torch.randn_like(q).detach() for q in twins.expected]


def _warm_up(twins, **options):
    twins.give_grads()
    twins.step()
    return twins


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}, {"decay": "huber", "weight_decay": 0.5}])
def test_a_captured_training_step_replays_between_uncaptured_steps(options, driver):
    twins = _warm_up(Twins(driver, capturable=True, **options))
    value = _values(twins)
    graph, inputs, same = _capture(driver, twins, value)
    for step in range(3):
        graph.replay()
        same()
        twins.give_grads()
        twins.set(lr=1e-2 / (step + 1))  # an uncaptured step, which rewrites the plan's own table
        twins.step()
        for x, v in zip(inputs, value, strict=True):
            v.normal_()
            x.copy_(v)
        twins.set(lr=1e-3)  # the graph keeps the learning rate of its capture
    twins.assert_equal()
    assert int(twins.twin.steps_taken()) == int(twins.optimizer._engine._triton._plans[0].plan.steps.raw[0]) == 7


@pytest.mark.parametrize("master", [torch.float32, "remainder"])
def test_a_replay_follows_what_others_have_written_to_a_parameter(master, driver):
    twins = _warm_up(Twins(driver, dtype=torch.bfloat16, capturable=True, master_weights=master, lr=1e-2))
    graph, _, same = _capture(driver, twins, _values(twins))
    for value in (0.5, -2.0):
        for p, q in zip(twins.params, twins.expected, strict=True):
            p.detach().fill_(value)
            q.detach().fill_(value)
        graph.replay()
        same()
    twins.assert_equal()
    for p in twins.expected:
        assert (p + 2.0).abs().max() < 0.1


def test_norm_sums_of_a_captured_step_may_be_in_its_graph(driver):
    twins = _warm_up(Twins(driver, capturable=True))
    value = _values(twins)
    inputs = [v.to(p.device) for v, p in zip(value, twins.params, strict=True)]
    with driver.capture() as graph:
        for p, x in zip(twins.params, inputs, strict=True):
            p.grad = x
        twins.optimizer.step()
        sums = twins.optimizer.norm_sums()
    for q, v in zip(twins.expected, value, strict=True):
        q.grad = v
    for _ in range(2):
        graph.replay()
        twins.twin.step()
        driver.run()
        assert torch.equal(sums.raw, twins.twin.norm_sums())


@pytest.mark.parametrize("captured", [True, False])
def test_a_replay_and_a_step_clip_by_their_own_gradients(captured, driver):
    """The torch backend has a gradient either in the captured step or in the uncaptured ones, not in both."""
    ours, other = (torch.nn.Parameter(torch.zeros(4).to("cuda:0")) for _ in range(2))
    groups = [{"params": [ours]}, {"params": [other], "foreach": True}]
    optimizer = AdamW(groups, max_grad_norm=1.0, nonfinite="pass", capturable=True)
    gradient = torch.full((4,), 3.0).to("cuda:0")

    def norm_of(step):
        step()
        driver.run()
        return float(optimizer.grad_norm.raw)

    ours.grad, other.grad = torch.full((4,), 2.0).to("cuda:0"), gradient
    optimizer.step()
    if not captured:
        other.grad = None
        optimizer.step()
    with driver.capture() as graph:
        optimizer.step()
    other.grad = None if captured else gradient
    alone, together = 4.0, pytest.approx(52.0**0.5)
    for _ in range(2):
        assert norm_of(optimizer.step) == (alone if captured else together)
        assert norm_of(graph.replay) == (together if captured else alone)


def test_two_graphs_keep_their_own_numbers(driver):
    twins = Twins(driver, capturable=True)
    steps = []
    for lr in (1e-3, 1e-1):
        twins.set(lr=lr)
        _warm_up(twins)
        graph, _, same = _capture(driver, twins, _values(twins))
        steps.append((lr, graph, same))
    for lr, graph, same in (*steps, *steps):
        graph.replay()
        twins.set(lr=lr)
        same()
    twins.assert_equal()


def test_a_replay_reads_hyperparameters_that_are_tensors_on_the_device(driver):
    params = [torch.nn.Parameter(torch.zeros(5).to("cuda:0"))]
    lr = torch.tensor(0.5).to("cuda:0")
    optimizer = AdamW(params, lr=lr, betas=(0.0, 0.0), weight_decay=0.0, capturable=True, backend="triton")
    params[0].grad = torch.ones(5).to("cuda:0")
    optimizer.step()
    with driver.capture() as graph:
        optimizer.step()
    for value in (1.0, 2.0):
        lr.fill_(value)
        graph.replay()
    driver.run()
    torch.testing.assert_close(params[0].detach().raw, torch.full((5,), -3.5))


def test_a_graph_keeps_what_it_converts_at_each_replay(driver):
    params = [torch.nn.Parameter(torch.zeros(5).to("cuda:0"))]
    lr, found_inf = (torch.zeros((), dtype=torch.bfloat16).to("cuda:0") for _ in range(2))
    optimizer = AdamW(params, lr=lr, capturable=True, backend="triton")
    optimizer.found_inf = found_inf
    params[0].grad = torch.ones(5).to("cuda:0")
    optimizer.step()
    with driver.capture():
        optimizer.step()
    optimizer.param_groups[0]["lr"], optimizer.found_inf = 1e-3, None
    optimizer.step()
    kept = optimizer._engine._triton._plans[0].plan.captures[0].kept
    assert {lr.data_ptr(), found_inf.data_ptr()} <= {t.data_ptr() for t in kept}


@pytest.mark.parametrize("replace", ["group", "state", "checkpoint"])
def test_a_graph_reads_its_own_tables_after_the_plan_was_made_again(replace, driver):
    """With both betas 0, a step moves every weight by lr against the sign of its gradient."""
    p = torch.nn.Parameter(torch.zeros(5).to("cuda:0"))
    other = torch.nn.Parameter(torch.zeros(5).to("cuda:0"))
    optimizer = AdamW([p], lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, capturable=True, backend="triton")
    p.grad = torch.ones(5).to("cuda:0")
    static = p.grad
    optimizer.step()
    with driver.capture() as graph:
        optimizer.step()
    tables = _tables(optimizer)
    if replace == "group":
        optimizer.add_param_group({"params": [other]})
        other.grad = torch.ones(5).to("cuda:0")
    elif replace == "state":
        optimizer.state[p]["exp_avg"] = torch.zeros_like(p).detach()
    else:
        driver.run()
        optimizer.load_state_dict(optimizer.state_dict())
    p.grad = torch.full((5,), -1.0).to("cuda:0")
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert all(table() is not None for table in tables), "the graph's tables have been freed"
    static.fill_(5.0)
    graph.replay()
    driver.run()
    torch.testing.assert_close(p.detach().raw, torch.full((5,), -1.0 + 0.25 - 1.0))


def _tables(optimizer):
    """Weak references to what the captured step reads."""
    plan = optimizer._engine._triton._plans[0].plan
    dynamic = plan.captures[0].dynamic
    return [weakref.ref(t) for t in (dynamic.words, plan.steps, plan._tables.coefficients, dynamic._upload._only_page)]


def test_a_capture_without_prepared_tables_is_refused(driver):
    twins = _warm_up(Twins(driver, capturable=True))
    with driver.capture():
        twins.optimizer.step()
        with pytest.raises(RuntimeError, match="Take one uncaptured step with capturable=True before each capture"):
            twins.optimizer.step()
    _warm_up(twins)
    with driver.capture():
        twins.optimizer.step()


def test_a_captured_first_step_is_refused(backend, driver):
    twins = Twins(driver, backend=backend)
    twins.give_grads()
    with driver.capture(), pytest.raises(RuntimeError, match="group 0 has capturable=False"):
        twins.optimizer.step()
    twins.optimizer.param_groups[0]["capturable"] = True
    with driver.capture(), pytest.raises(RuntimeError, match="Take one uncaptured step first"):
        twins.optimizer.step()
    assert not twins.optimizer.state
    twins.assert_equal()


@pytest.mark.parametrize("current", [0, 1])
def test_a_capture_of_some_devices_only_is_refused(current, driver):
    twins = _warm_up(Twins(driver, (0, 1), capturable=True))
    with driver.capture(1), driver.device(current), pytest.raises(RuntimeError, match="captured"):
        twins.optimizer.step()
    with driver.capture(0, 1):
        twins.optimizer.step()


def test_a_captured_gradient_release_is_refused(driver):
    twins = _warm_up(Twins(driver, capturable=True))
    twins.optimizer.release_gradients()
    with (
        scaled_backward(1.0),
        driver.capture() as graph,
        pytest.raises(RuntimeError, match="releases the gradient of '0.0' .* being captured"),
    ):
        twins.optimizer._step_released(twins.params[0])
    assert not graph.calls


def test_state_of_the_torch_backend_is_not_created_in_a_capture(driver):
    params = [torch.nn.Parameter(torch.zeros(5).to("cuda:0")) for _ in range(2)]
    optimizer = AdamW(params, capturable=True, backend="torch", foreach=False)
    params[0].grad = torch.ones(5).to("cuda:0")
    optimizer.step()
    params[1].grad = torch.ones(5).to("cuda:0")
    with driver.capture(), pytest.raises(RuntimeError, match="has no state yet"):
        optimizer.step()
    assert not optimizer.state[params[1]]


def test_a_captured_step_that_the_host_may_skip_is_refused(driver):
    p = torch.nn.Parameter(torch.zeros(5).to("cuda:0"))
    optimizer = AdamW([p], capturable=True, backend="torch", foreach=True, max_grad_norm=1.0)
    p.grad = torch.ones(5).to("cuda:0")
    optimizer.step()
    with driver.capture(), pytest.raises(RuntimeError, match="'0.0' takes its step is decided on the host"):
        optimizer.step()
