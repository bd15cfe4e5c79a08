"""Names, roles and evidence are those of the bare model under every wrapper of torch, and groups follow their parameters."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import lwadamw

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")


@pytest.fixture(scope="module", autouse=True)
def _process(tmp_path_factory):
    store = tmp_path_factory.mktemp("names") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class RMSNorm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, d))

    def forward(self, x):
        return x * self.weight


class Conv1D(nn.Module):
    """As transformers' GPT-2 has it, of shape (in, out)."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, 2 * d) / d)

    def forward(self, x):
        return x @ self.weight


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down = RMSNorm(d), Conv1D(d), nn.Linear(2 * d, d)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)))


class Model(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.embed = nn.Embedding(11, d)
        self.layers = nn.ModuleList(Block(d) for _ in range(2))
        self.norm, self.out = RMSNorm(d), nn.Linear(d, 11, bias=False)

    def get_output_embeddings(self):
        return self.out

    def no_weight_decay(self):
        return {"layers.0.down.bias"}

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(self.norm(x))


def _mesh(*sizes):
    return init_device_mesh("cpu", sizes or (1,), mesh_dim_names=("replicate", "shard")[-max(len(sizes), 1) :])


def _each(model, wrap):
    for i, layer in enumerate(model.layers):
        model.layers[i] = wrap(layer)
    model.out, model.norm = wrap(model.out), wrap(model.norm)
    return model


def _fsdp2(model, *sizes):
    mesh = _mesh(*sizes)
    for layer in model.layers:
        fully_shard(layer.norm if hasattr(layer, "norm") else layer, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model.norm, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _fsdp1(model, orig=True):
    return FullyShardedDataParallel(model, use_orig_params=orig, device_id=torch.device("cpu"))


def _compile(module):
    return torch.compile(module, backend="eager")


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "FSDP1": _fsdp1,
    "FSDP1 by blocks": lambda m: _fsdp1(_each(m, _fsdp1)),
    "FSDP2": _fsdp2,
    "HSDP": lambda m: _fsdp2(m, 1, 1),
    "checkpoint": lambda m: _each(m, checkpoint_wrapper),
    "offload": lambda m: _each(m, offload_wrapper),
    "compile": _compile,
    "compiled blocks": lambda m: _each(m, _compile),
    "compiled checkpoint": lambda m: _each(_each(m, checkpoint_wrapper), _compile),
    "checkpoint of compiled": lambda m: _each(_each(m, _compile), checkpoint_wrapper),
    "FSDP2 of checkpoint": lambda m: _fsdp2(_each(m, checkpoint_wrapper)),
    "FSDP2 of compiled": lambda m: _fsdp2(_each(m, _compile)),
    "FSDP2 of compiled checkpoint": lambda m: _fsdp2(_each(_each(m, checkpoint_wrapper), _compile)),
    "compiled FSDP2": lambda m: _compile(_fsdp2(m)),
    "FSDP2 of the compiled model": lambda m: fully_shard(_compile(m), mesh=_mesh()),
    "FSDP1 of checkpoint": lambda m: _fsdp1(_each(m, checkpoint_wrapper)),
    "DDP of compiled": lambda m: DistributedDataParallel(_compile(m)),
    "compiled DDP of checkpoint": lambda m: _compile(DistributedDataParallel(_each(m, checkpoint_wrapper))),
}


def _groups(model, **arguments):
    return lwadamw.param_groups(model, 4, width=8, **arguments)


def _told(groups):
    """Return all of the groups but the parameters."""
    return [{**g, "params": [name for name, _ in g["params"]]} for g in groups], groups.evidence


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_roles_and_evidence_are_those_of_the_bare_model(wrapper):
    assert _told(_groups(WRAPPERS[wrapper](Model()))) == _told(_groups(Model()))


@pytest.mark.parametrize("key", ["Gated", "class"])
def test_registered_roles_hold_under_fully_shard(key, monkeypatch):
    from lwadamw.width import registry

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(8, 2, 4))

    monkeypatch.setattr(registry, "_REGISTERED", {})
    lwadamw.register_role(Gated if key == "class" else key, {"w": lwadamw.Matrix(fan_in=0)})
    bare, wrapped = nn.Sequential(Gated()), fully_shard(nn.Sequential(fully_shard(Gated(), mesh=_mesh())), mesh=_mesh())
    assert _told(_groups(wrapped)) == _told(_groups(bare))


@pytest.mark.filterwarnings("ignore")
def test_the_flat_parameter_of_fsdp1_is_refused():
    with pytest.raises(RuntimeError, match=r"_flat_param.*flattened.*use_orig_params=True"):
        _groups(_fsdp1(Model(), orig=False))
    with pytest.raises(ValueError, match=r"rebind.*\n.*missing.*\n.*new: '_flat_param'"):
        lwadamw.rebind(_groups(Model()), _fsdp1(Model(), orig=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_rebind_gives_the_groups_the_parameters_of_today(wrapper):
    bare = Model()
    bare.layers[1].up.weight.requires_grad_(False)
    groups = _groups(bare, segments={"*.down.weight": 2})
    before, held = _told(groups), [p for g in groups for _, p in g["params"]]
    model = WRAPPERS[wrapper](bare)
    bound = lwadamw.rebind(groups, model)
    assert _told(bound) == before
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for g in bound for _, p in g["params"]} == trained
    assert [id(p) for g in groups for _, p in g["params"]] == list(map(id, held))
    lwadamw.AdamW(bound, lr=1e-3)


def test_rebind_takes_the_groups_of_an_optimizer_and_keeps_ties():
    model = Model()
    model.out.weight = model.embed.weight
    groups = _groups(model)
    optimizer = lwadamw.AdamW(groups, lr=1e-3)
    _fsdp2(model)
    for given in (groups, optimizer.param_groups):
        bound = lwadamw.rebind(given, model)
        found = {name: p for g in bound for name, p in g["params"]}
        assert "out.weight" not in found
        assert found["embed.weight"] is model.out.weight
        assert isinstance(found["embed.weight"], DTensor)
    assert bound[0]["lr"] == 1e-3


def _rename(model):
    model.final = model.out
    del model.out


def _tie(model):
    model.out.weight = model.embed.weight


def _widen(model):
    model.out.weight = nn.Parameter(torch.zeros(11, 16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename, r"missing: 'out\.weight' \(11, 8\)\.\n  new: 'final\.weight' \(11, 8\)"),
        (_tie, r"'embed\.weight' and 'out\.weight' \(11, 8\) were two parameters"),
        (_widen, r"'out\.weight' had shape \(11, 8\).* has shape \(11, 16\)"),
    ],
)
def test_rebind_refuses_another_model(change, message):
    model = Model()
    groups = _groups(model)
    change(model)
    with pytest.raises(ValueError, match=message):
        lwadamw.rebind(groups, model)


def test_rebind_names_what_was_frozen_and_what_was_tied():
    model = Model()
    model.out.weight = model.embed.weight
    model.norm.weight.requires_grad_(False)
    groups = _groups(model)
    model.norm.weight.requires_grad_(True)
    model.out.weight = nn.Parameter(torch.zeros(11, 8))
    with pytest.raises(
        ValueError, match=r"'norm\.weight' \(1, 8\), which was frozen .*'out\.weight' .*tied with 'embed\."
    ):
        lwadamw.rebind(groups, model)


def test_rebind_refuses_groups_without_names():
    model = Model()
    with pytest.raises(ValueError, match=r"group 0 .* without names"):
        lwadamw.rebind([{"params": list(model.parameters())}], model)
