"""Shared by the tests of storage types: shapes, optimizers of a storage combination, and comparison of two optimizers."""

import torch

from lwadamw import AdamW
from lwadamw.state.storage import CODES

B, F, H = torch.bfloat16, torch.float32, torch.float16
BETAS = (0.9, 0.95)

# Elements around the sizes of the kernels' blocks: 256, 1024 and 2048 (a chunk).
SHAPES = [(33, 64), (3,), (0,), (), (1025,)]
# Moments of 8 bits need 4096 elements. One shape has scales per row, the other has a last block of one element.
SHAPES_OF_8_BITS = [(33, 128), (3,), (0,), (), (17, 241)]

# Combinations in which torch rounds weights to nearest, so that small updates are lost.
NEAREST = ("bf16", "bf16, fp32 moments")

# The loads and stores of these combinations are also those of others. On the interpreter they run with the slow tests.
ALIKE = (
    "fp32, bf16 moments",
    "bf16, fp32 moments",
    "bf16, master, bf16 moments",
    "bf16, remainder, bf16 moments",
    "bf16, stochastic, fp32 moments",
)


def shapes_of(c):
    """Return shapes for a combination that are large enough for its moments."""
    return SHAPES_OF_8_BITS if {c.storage.exp_avg, c.storage.exp_avg_sq} & set(CODES) else SHAPES


def make(c, shapes=None, device="cpu", **more):
    """Return named parameters of a combination, and their optimizer."""
    shapes = shapes_of(c) if shapes is None else shapes
    params = [torch.nn.Parameter(torch.randn(s, device=device).to(c.param)) for s in shapes]
    return params, optimizer_of(c, params, **more)


def optimizer_of(c, params, **more):
    """Return an optimizer with the options of a combination, for parameters that it names w0, w1, and so on."""
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": BETAS, **c.options, **more}
    return AdamW([(f"w{i}", p) for i, p in enumerate(params)], **settings)


def give_grads(c, *copies, scale=1.0):
    """Give the same new random gradients, in the combination's dtype, to every list of parameters."""
    for same in zip(*copies, strict=True):
        grad = (torch.randn(same[0].shape, device=same[0].device) * scale).to(c.grad)
        for p in same:
            p.grad = torch.empty_like(p, dtype=c.grad).copy_(grad)


def assert_same_bits(a, b):
    """Assert that parameters and state of two optimizers are equal."""
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            assert torch.equal(value, b.state[q][key]), key
