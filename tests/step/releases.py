"""Shared by the tests of gradient release: a small model, a backward with random input, and a twin that calls step()."""

import itertools

import torch

from lwadamw import AdamW
from tests.state.storages import assert_same_bits


def model_of_two_layers(device, dtype=torch.float32, sizes=(6, 5, 3)):
    torch.manual_seed(0)
    pairs = itertools.pairwise(sizes)
    return torch.nn.Sequential(*(torch.nn.Linear(a, b, device=device, dtype=dtype) for a, b in pairs))


def backward(model, seed):
    torch.manual_seed(seed)
    p = next(model.parameters())
    model(torch.randn(4, 6, device=p.device, dtype=p.dtype)).square().sum().backward()


class Pair:
    """A model whose gradients are released, and its twin that takes whole steps."""

    def __init__(self, backend, device, dtype=torch.float32, **options):
        self.models = [model_of_two_layers(device, dtype), model_of_two_layers(device, dtype)]
        self.optimizers = [AdamW(m.parameters(), lr=1e-2, backend=backend, **options) for m in self.models]
        self.handle = self.optimizers[0].release_gradients()
        self.seed = 0

    def both(self, change):
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            change(model, optimizer)

    def train(self, steps=1, call_step=True):
        for _ in range(steps):
            self.seed += 1
            for model in self.models:
                backward(model, self.seed)
            if call_step:
                self.optimizers[0].step()
            self.optimizers[1].step()
            self.optimizers[1].zero_grad()

    def check(self):
        assert_same_bits(*self.optimizers)
        for p, q in zip(self.models[0].parameters(), self.models[1].parameters(), strict=True):
            assert torch.equal(p, q)
        held = [p for group in self.optimizers[0].param_groups for p in group["params"]]
        assert all(p.grad is None for p in held)
