"""Steps in inference mode, in a compiled training step and in the capture of a CUDA graph."""

import copy

import pytest
import torch

from lwadamw import AdamW
from lwadamw.step import engine
from lwadamw.tables import upload
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


def test_a_capture_that_would_go_wrong_is_refused(backend, device, monkeypatch):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend=backend)
    set_grads(params)
    monkeypatch.setattr(engine, "capturing", lambda: True)
    monkeypatch.setattr(upload, "capturing", lambda: True)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="group 0 has capturable=False"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(RuntimeError, match="Take one uncaptured step first"):
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert torch.equal(p, b)


def test_a_capture_with_new_gradient_tensors_is_refused(device, monkeypatch):
    params = make_params(FEW_SHAPES, device)
    optimizer = AdamW(params, backend="triton", capturable=True)
    set_grads(params)
    optimizer.step()
    monkeypatch.setattr(engine, "capturing", lambda: True)
    monkeypatch.setattr(upload, "capturing", lambda: True)
    optimizer.step()
    params[0].grad = params[0].grad.clone()
    with pytest.raises(RuntimeError, match="gradients or hyperparameters changed"):
        optimizer.step()
