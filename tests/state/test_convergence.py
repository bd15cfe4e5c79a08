"""Every storage combination trains within its documented bound: on a noisy quadratic, and on a small language model."""

import functools

import numpy as np
import pytest
import torch
from torch.func import functional_call

from lwadamw import AdamW, reference
from lwadamw.lab.data import batches, split_files
from lwadamw.lab.model import ModelConfig, Transformer
from lwadamw.state.combinations import COMBINATIONS
from tests.state.storages import ALIKE, BETAS, NEAREST, B

LOSS_BOUND = 0.03  # nats; the loss falls from 5.5 by more than 1.5
LOSS_BOUND_NEAREST = 0.2  # for the combinations that lose small updates


@pytest.mark.parametrize("name", COMBINATIONS)
def test_200_noisy_steps_stay_within_the_documented_bound(name, device):
    assert _distance(COMBINATIONS[name], "torch", torch.device("cpu"), 8192) < COMBINATIONS[name].bound


@pytest.mark.slow
@pytest.mark.parametrize("name", COMBINATIONS)
def test_200_noisy_steps_of_the_kernels_stay_within_the_documented_bound(name, device):
    assert _distance(COMBINATIONS[name], "triton", device, 4096) < COMBINATIONS[name].bound


def _distance(c, backend, device, n):
    """Return the distance between the weights and those of float64 after 200 steps, over the way of the float64 weights."""
    curvature = torch.logspace(0, -2, n, dtype=torch.float64)[torch.randperm(n)]
    start = torch.randn(n).to(c.param)
    p = torch.nn.Parameter(start.clone().to(device).view(-1, 128))
    optimizer = AdamW([("w", p)], lr=1e-3, weight_decay=0.1, betas=BETAS, backend=backend, **c.options)
    group = reference.Group(lr=1e-3, weight_decay=0.1, betas=BETAS)
    exact = reference.Parameter(start.double().numpy().copy(), group)
    for _ in range(200):
        noise = 0.1 * torch.randn(n, dtype=torch.float64)
        p.grad = (curvature * p.detach().double().cpu().view(-1) + noise).to(c.grad).to(device).view(p.shape)
        reference.step([exact], [(curvature * torch.from_numpy(exact.value) + noise).numpy()])
        optimizer.step()
    weight = optimizer.master_weight(p).double().cpu().view(-1).numpy()
    return np.linalg.norm(weight - exact.value) / np.linalg.norm(exact.value - start.double().numpy())


@pytest.fixture(scope="module")
def corpus():
    """Bytes with some structure: 300 words, drawn by Zipf's law."""
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, size=generator.integers(2, 8))) for _ in range(300)]
    drawn = generator.choice(300, p=(p := 1 / np.arange(1, 301)) / p.sum(), size=40_000)
    return split_files([b" ".join(words[i] for i in drawn[j : j + 1000]) for j in range(0, 40_000, 1000)])[0]


def _losses(corpus, c, lr, steps=150):
    """Return the loss of every step of a small LLaMA, trained by a combination, or by the float64 reference if c is None."""
    dtype = torch.float64 if c is None else torch.float32
    model = Transformer(ModelConfig(32, depth=1, head_dim=16, context=32), seed=0).to(dtype)
    start = {name: p.detach().to(B) for name, p in model.named_parameters()}
    params = {name: torch.nn.Parameter(p.to(dtype if c is None else c.param)) for name, p in start.items()}
    if c is None:
        group = reference.Group(lr=lr, weight_decay=0.1, betas=BETAS)
        exact = [reference.Parameter(p.detach().numpy().copy(), group) for p in params.values()]
    else:
        optimizer = AdamW(params.items(), lr=lr, weight_decay=0.1, betas=BETAS, **c.options)
    losses = []
    whole = torch.nn.Module()
    whole.model, whole.forward = model, model.loss
    for _, windows in zip(range(steps), batches(corpus, 8, 32, seed=0), strict=False):
        loss = functional_call(whole, {f"model.{name}": p.to(dtype) for name, p in params.items()}, (windows,))
        losses.append(loss.item())
        loss.backward()
        if c is None:
            reference.step(exact, [p.grad.numpy() for p in params.values()])
            for p, r in zip(params.values(), exact, strict=True):
                p.data.copy_(torch.from_numpy(r.value))
                p.grad = None
        else:
            optimizer.step()
            optimizer.zero_grad()
    return np.array(losses)


@pytest.fixture(scope="module")
def exact_losses(corpus):
    """Returns the losses of the float64 reference at a lr. It trains once for each lr that a test of this process asks for."""
    return functools.cache(lambda lr: _losses(corpus, None, lr))


BY_DEFAULT = ("fp32", "bf16, stochastic, 8-bit moments")  # the others run with the matrix


def _marks(name):
    return [pytest.mark.slow] if name in ALIKE else [pytest.mark.matrix] * (name not in BY_DEFAULT)


# The other combinations are held to their bound on the noisy quadratic.
@pytest.mark.parametrize("name", [pytest.param(n, marks=_marks(n)) for n in COMBINATIONS])
def test_a_small_llama_follows_the_float64_reference(name, corpus, exact_losses):
    losses, exact = _losses(corpus, COMBINATIONS[name], 3e-3), exact_losses(3e-3)
    assert abs(losses - exact)[-20:].mean() < (LOSS_BOUND_NEAREST if name in NEAREST else LOSS_BOUND)
    assert exact[-20:].mean() < exact[0] - 1.5


def test_stochastic_rounding_reaches_the_loss_where_nearest_rounding_stalls(corpus, exact_losses):
    exact = exact_losses(1e-4)
    gained = exact[0] - exact[-20:].mean()
    nearest = _losses(corpus, COMBINATIONS["bf16"], 1e-4)[-20:].mean() - exact[-20:].mean()
    stochastic = _losses(corpus, COMBINATIONS["bf16, stochastic"], 1e-4)[-20:].mean() - exact[-20:].mean()
    assert nearest > 0.08 * gained
    assert abs(stochastic) < 0.01 * gained
