"""A monitor takes every model that its optimizer trains in whole or in part, in any wrapper, and refuses another model."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import lwadamw
from lwadamw import AdamW, Monitor


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_another_model_is_refused_with_the_name_of_a_parameter_and_nothing_is_attached():
    model, other = _model(), _model()
    optimizer = AdamW(model.named_parameters())
    said = r"none of its 4 trainable parameters belongs to the optimizer, for instance '0.weight' \(6, 4\).* leave model out"
    with pytest.raises(ValueError, match=said):
        Monitor(optimizer, other)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    muon = torch.optim.SGD([p for p in _model().parameters()], lr=0.1)
    with pytest.raises(ValueError, match=said):
        Monitor(optimizer, other, others=[muon])


def test_the_remedy_with_others_works():
    adamw, matrices = _model(), _model()
    optimizer = AdamW([(f"a.{name}", p) for name, p in adamw.named_parameters()])
    with pytest.raises(ValueError, match=r"give it in others=\[\.\.\.\]"):
        Monitor(optimizer, matrices)
    Monitor(optimizer, matrices, others=[torch.optim.SGD(matrices.named_parameters(), lr=0.1)])


def test_a_stage_a_larger_model_a_frozen_model_and_a_hybrid_are_taken():
    model = _model()
    head, tail = AdamW(model[0].named_parameters()), AdamW(model[1].named_parameters())
    whole = AdamW(model.named_parameters())
    Monitor(whole, model[0])
    Monitor(head, model)
    Monitor(tail, nn.ModuleDict({"more": nn.Linear(2, 2), "tail": model[1]}))
    Monitor(head, model[1], others=[torch.optim.SGD(model[1].named_parameters("1"), lr=0.1)])
    Monitor(whole, _model().requires_grad_(False))
    Monitor(whole, model.requires_grad_(False))
    Monitor(whole, nn.ReLU())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", ["compile", "DataParallel", "DDP", "fully_shard", "FSDP", "FSDP flat", "bare in FSDP"])
def test_a_wrapped_model_is_taken(wrap, one_process):
    bare = model = _model()
    if wrap == "compile":
        model = torch.compile(bare)
    elif wrap == "DataParallel":
        model = nn.DataParallel(bare)
    elif wrap == "DDP":
        model = nn.parallel.DistributedDataParallel(bare)
    elif wrap == "fully_shard":
        fully_shard(bare, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    else:
        device = torch.device("cpu")
        model = FullyShardedDataParallel(bare, device_id=device, use_orig_params=wrap != "FSDP flat")
    Monitor(AdamW(model.named_parameters()), bare if wrap == "bare in FSDP" else model)


def test_groups_that_were_built_before_fully_shard_are_refused_until_they_are_bound_anew(one_process):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.RMSNorm(4))
    groups = lwadamw.param_groups(model, base_width=4, width=4, roles={"1.weight": "matrix"})
    stale = AdamW(groups)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="build the optimizer after every conversion"):
        Monitor(stale, model)
    Monitor(AdamW(lwadamw.rebind(groups, model)), model)


def test_flat_pieces_of_an_engine_are_taken():
    model = nn.Linear(4, 4, bias=False)
    piece = torch.zeros(8)
    lwadamw.place_flat_shard(piece, (4, 4), 8, name="weight")
    Monitor(AdamW([piece]), model)
