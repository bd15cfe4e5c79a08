"""Steps of compiled kernels, every variant that a plan launches: their accesses are right, and so are their results."""

import importlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import codegen, tune
from lwadamw import AdamW
from lwadamw.kernels import layout
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.members import local, wrap_like
from tests.ptx.gpu import pretended

if layout.INTERPRETED or torch.cuda.is_available():
    pytest.skip("make test-compiled runs this", allow_module_level=True)

# Aligned blocks and tails, odd rows, and more than one chunk.
SHAPES = ((), (3,), (0,), (17, 241), (64, 70), (40, 128))
# Shards in 8 bits have rows of whole blocks.
SHARDS = ((), (3,), (33, 256), (40, 128))
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "rounding_seed": 5}
VARIANTS = {v.name: v for v in codegen.variants(codegen.COMPLETE) if v.storage is not None}


@pytest.fixture
def mesh():
    """Two pretended processes, of which this is the second one."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def _params(dtype, mesh=None):
    """Parameters. With a mesh, each process holds half of the columns of a matrix, so its elements are separate runs."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for shape in SHAPES if mesh is None else SHARDS:
        p = torch.randn(shape, generator=generator).to(dtype)
        if mesh is not None and p.dim() == 2:
            wide = (shape[0], 2 * shape[1])
            p = DTensor.from_local(p, mesh, [Shard(1)], shape=wide, stride=(wide[1], 1))
        out.append(torch.nn.Parameter(p))
    return out


def _optimizer(params, combination, backend, package_optimizer=AdamW, **more):
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    return package_optimizer(named, backend=backend, **{**SETTINGS, **COMBINATIONS[combination].options, **more})


def _step(params, dtype, seed):
    """Give the parameters gradients that depend on the seed alone. Every fourth element is 0."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        shape = local(p).shape
        grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.25)
        p.grad = wrap_like(p, grad.to(dtype))


def _arrays(optimizer):
    """Every tensor that a step writes, by name."""
    out = {}
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        out[f"w{i}"] = local(p.detach())
        out |= {f"w{i}, {key}": local(value) for key, value in optimizer.state[p].items()}
    return out


def _assert_as_stored(key, found, expected, exact):
    """Assert that two optimizers stored the same, but for what the last bit of an fp32 value changes now and then."""
    if not found.numel() or found.dtype == torch.int16:
        return  # int16 is the lower half of a weight, which is compared as a whole
    whole = found.dtype in (torch.int8, torch.uint8)
    found, expected, short = found.double(), expected.double(), found.dtype in (torch.bfloat16, torch.float16)
    usual = (0, 0) if whole else (1e-5, 1e-6)
    most = (0, 1) if whole else usual if exact and not short else (2**-7, 2e-3)
    assert torch.isclose(found, expected, rtol=usual[0], atol=usual[1]).double().mean() >= 0.99, key
    assert torch.isclose(found, expected, rtol=most[0], atol=most[1]).all(), key


def _take(optimizer, grad, steps=2):
    for seed in range(steps):
        _step(optimizer.param_groups[0]["params"], grad, seed)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_update_is_right(name, request):
    """Right is what the torch backend gives. Two orders in which warps run give the same bits.

    Now and then, the last bit of an fp32 value changes a code or the rounding of a weight.
    """
    variant = VARIANTS[name]
    c, constants = COMBINATIONS[variant.combination], variant.constants
    fp32_moments = {c.storage.exp_avg, c.storage.exp_avg_sq} == {torch.float32}
    fp32_weight = c.param == torch.float32 or c.storage.weight in ("master", "remainder")
    exact = fp32_moments and fp32_weight
    mesh = request.getfixturevalue("mesh") if constants["STRIDED"] else None
    options = {"amsgrad": constants["AMSGRAD"], "norms": constants["NORMS"]}
    if constants["HUBER"]:
        options["decay"] = "huber"
    # The pretended processes cannot add up their norms.
    options["max_grad_norm"] = None if mesh else 1.0
    with pretended() as gpu:
        ours = [
            _take(_optimizer(_params(c.param, mesh), variant.combination, "triton", **options), c.grad) for _ in "ab"
        ]
    assert ("adamw_kernel", constants) in gpu.variants
    twin = _take(_optimizer(_params(c.param, mesh), variant.combination, "torch", **options), c.grad)
    first, second, expected = (_arrays(optimizer) for optimizer in (*ours, twin))
    assert first.keys() == expected.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        _assert_as_stored(key, value, expected[key], exact)
    for p, q in zip(ours[0].param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        _assert_as_stored("weight", local(ours[0].master_weight(p)), local(twin.master_weight(q)), exact)
    if constants["NORMS"]:
        sums = [optimizer.norm_sums(local=True) for optimizer in (*ours, twin)]
        assert torch.equal(sums[0], sums[1])
        # The product of weight and update cancels, so its error is one of the square sums it is made of.
        squares, dots = [s[:, :3] for s in sums], [s[:, 3] for s in sums]
        tolerance = 2e-5 if exact else 2e-3
        torch.testing.assert_close(squares[0], squares[2], rtol=tolerance, atol=1e-12)
        scale = squares[2][:, :2].prod(1).sqrt()
        assert ((dots[0] - dots[2]).abs() <= tolerance * scale).all()


def test_a_loop_that_loads_ahead_has_aligned_addresses_even_if_it_does_not_run():
    """Unaligned parameters leave all elements to the masked loop. Loads ahead of the other loop are copies of 16 bytes."""
    start = torch.randn(33, 128, generator=torch.Generator().manual_seed(1))
    stored = []
    for offset in (0, 1):
        p = torch.nn.Parameter(torch.zeros(4225)[offset : offset + 4224].view(33, 128))
        p.data.copy_(start)
        with pretended():
            optimizer = _take(_optimizer([p], "fp32, 8-bit moments", "triton"), torch.float32)
        assert optimizer.state[p]["exp_avg"].dtype == torch.int8
        stored.append(_arrays(optimizer))
    for key, value in stored[0].items():
        assert torch.equal(value, stored[1][key]), key


# 16 elements per thread of storages without an fp32 array, which the kernels do not take. bench.tune says so and leaves it out.
TOO_LARGE = {"block 2048": "bf16, stochastic, 8-bit moments"}


@pytest.mark.slow
@pytest.mark.parametrize("name", tune.CANDIDATES)
def test_every_candidate_of_the_tuning_changes_no_bit(name):
    """Other blocks, stages, threads, chunks and cache hints change the time only."""
    package = tune.variant(tune.CANDIDATES[name])
    backends = importlib.import_module(f"{package.__name__}.step.backends")
    with pretended(), mock.patch.object(backends, "interpreting", return_value=True):
        for storage in ("fp32", "bf16, stochastic, 8-bit moments"):
            if TOO_LARGE.get(name) == storage:
                continue
            c = COMBINATIONS[storage]
            ours = _take(_optimizer(_params(c.param), storage, "triton"), c.grad)
            theirs = _take(_optimizer(_params(c.param), storage, "triton", package.AdamW), c.grad)
            for (key, value), other in zip(_arrays(ours).items(), _arrays(theirs).values(), strict=True):
                assert torch.equal(value, other), (storage, key)
            torch.testing.assert_close(ours.norm_sums(), theirs.norm_sums(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("capability", [80, 100])
@pytest.mark.parametrize("storage", ["fp32", "bf16, stochastic, 8-bit moments"])
def test_other_gpus_compute_the_same_bits(storage, capability):
    c, arrays = COMBINATIONS[storage], []
    for target in (90, capability):
        with pretended(target):
            optimizer = _take(_optimizer(_params(c.param), storage, "triton", max_grad_norm=1.0), c.grad)
        arrays.append(_arrays(optimizer))
    for (key, value), other in zip(arrays[0].items(), arrays[1].values(), strict=True):
        assert torch.equal(value, other), key
