"""Steps in inference mode, in a compiled training step, under FakeTensorMode and in another thread."""

import copy
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lwadamw import AdamW
from tests.cases import FEW_SHAPES, assert_equal, make_params, make_twins, set_grads


def test_state_created_in_inference_mode_can_be_updated_outside_of_it(backend, device):
    ours, theirs, mine, torchs = make_twins(backend, device)
    for inference in (True, False, True):
        set_grads(ours, theirs)
        with torch.inference_mode(inference):
            mine.step()
        torchs.step()
        assert_equal(ours, theirs)
    assert not any(value.is_inference() for value in mine.state[ours[0]].values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_training_step_may_contain_the_optimizer_step(backend, device):
    def train(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).to(device)
    twin, start = copy.deepcopy(model), [p.detach().clone() for p in model.parameters()]
    ours, theirs = (AdamW(m.parameters(), lr=1e-2, backend=backend, max_grad_norm=0.1) for m in (model, twin))
    compiled = torch.compile(train, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(7, 6, device=device)
        torch.testing.assert_close(compiled(model, ours, x), train(twin, theirs, x))
    assert ours.steps_taken() == 3
    for p, q, old in zip(model.parameters(), twin.parameters(), start, strict=True):
        torch.testing.assert_close(p, q)
        assert not torch.equal(p, old)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("named", [True, False])
def test_an_optimizer_may_be_built_and_stepped_inside_a_compiled_function(named, backend, device):
    def train(model, x):
        params = model.named_parameters() if named else model.parameters()
        optimizer = AdamW(params, lr=1e-2, backend=backend)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    torch._dynamo.reset()
    model = torch.nn.Linear(6, 5).to(device)
    twin, x = copy.deepcopy(model), torch.randn(7, 6, device=device)
    ours, theirs = torch.compile(train, backend="eager")(model, x), train(twin, x)
    assert ours.steps_taken() == 2
    assert ours.norms().names == theirs.norms().names
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_real_parameter_is_not_updated_under_fake_tensor_mode(backend, device):
    """Not in the first step, which makes state, and not in a later one, for which everything is ready."""
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    for taken in range(2):
        before = [p.detach().clone() for p in params]
        for allowed in (True, False):
            with (
                FakeTensorMode(allow_non_fake_inputs=allowed),
                pytest.raises(RuntimeError, match=r"under FakeTensorMode, but '0.0' \(30,\) is a real"),
            ):
                optimizer.step()
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
            assert bool(optimizer.state) == bool(taken)
        optimizer.step()
        assert optimizer.steps_taken() == taken + 1


def test_fake_parameters_step_on_the_torch_backend_only():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.ones(3, 4))
        p.grad = torch.ones(3, 4)
        optimizer = AdamW([p])
        optimizer.step()
        assert optimizer.state[p]["exp_avg"].shape == (3, 4)
        with pytest.raises(RuntimeError, match="it is a tensor of FakeTensorMode, which has no memory"):
            AdamW([p], backend="triton").step()


def test_a_step_may_be_taken_in_another_thread(backend, device):
    ours, theirs, mine, torchs = make_twins(backend, device)
    for _ in range(2):
        set_grads(ours, theirs)
        thread = threading.Thread(target=mine.step)
        thread.start()
        thread.join()
        torchs.step()
        assert_equal(ours, theirs)
