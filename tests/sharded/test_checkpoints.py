"""torch's distributed checkpoint: every storage is bitwise the same in another layout, or is refused."""

import datetime
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lwadamw import AdamW
from lwadamw.state.blocks import holds_blocks
from lwadamw.state.combinations import COMBINATIONS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
SECONDS = 100
CORE = ["bf16, remainder, 8-bit moments", "bf16, kahan"]
OTHERS = [name for name in COMBINATIONS if name not in CORE]
# Rows of whole blocks, bundles of two rows that are whole blocks, a large vector, and fewer elements than processes.
SHAPES = {"rows": (33, 256), "bundles": (24, 192), "vector": (4099,), "few": (3,)}


def _process(rank, function, world, store, arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    try:
        function(world, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # gloo may leave threads that abort an orderly exit.
    os._exit(0)


def _launch(function, world, folder, *arguments):
    store = folder / f"store{len(list(folder.glob('store*')))}"
    context = mp.spawn(_process, (function, world, str(store), (str(folder), *arguments)), nprocs=world, join=False)
    end = datetime.datetime.now() + datetime.timedelta(seconds=SECONDS)
    while not context.join(timeout=1):
        if datetime.datetime.now() > end:
            for process in context.processes:
                process.kill()
            raise AssertionError(f"{function.__name__} hangs")


def _make(name, layout, world, options=None):
    """A model and an optimizer of a combination. `options` replace those of the combination."""
    torch.manual_seed(0)
    c = COMBINATIONS[name]
    model = torch.nn.Module()
    for key, shape in SHAPES.items():
        model.register_parameter(key, torch.nn.Parameter(torch.randn(shape).to(c.param)))
    if layout == "columns":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if p.shape == SHAPES["rows"] else 0))
    elif layout == "rows":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return model, AdamW(model.named_parameters(), lr=1e-2, **(c.options if options is None else options))


def _step(model, optimizer, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        grad = (torch.randn(p.shape) * 0.01).to(p.dtype)
        p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if isinstance(p, DTensor) else grad
    optimizer.step()


def _whole(tensor):
    if not isinstance(tensor, DTensor):
        return tensor.detach().clone()
    # gloo does not gather int16.
    return (tensor.int() if tensor.dtype == torch.int16 else tensor).full_tensor().detach().to(tensor.dtype)


def _snapshot(model, optimizer):
    found = {}
    for name, p in model.named_parameters():
        found[name] = _whole(p)
        found |= {f"{name}.{key}": _whole(value) for key, value in optimizer.state[p].items()}
    return found


def _tensors(model, optimizer, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}


def _load(model, optimizer, folder, name, flat):
    tensors = _tensors(model, optimizer, flat)
    dcp.load(tensors, checkpoint_id=f"{folder}/{name}.{flat}")
    set_model_state_dict(model, tensors["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, optimizer, tensors["optim"], options=options)


def _save(world, folder, names):
    for name in names:
        model, optimizer = _make(name, "rows", world)
        for seed in (1, 2):
            _step(model, optimizer, seed)
        for flat in (False, True):
            dcp.save(_tensors(model, optimizer, flat), checkpoint_id=f"{folder}/{name}.{flat}")
        found = _snapshot(model, optimizer)
        if dist.get_rank() == 0:
            torch.save(found, f"{folder}/{name}.pt")


def _load_and_compare(world, folder, names, layout):
    for name in names:
        for flat in (False, True):
            model, optimizer = _make(name, layout, world)
            _step(model, optimizer, 5)
            _load(model, optimizer, folder, name, flat)
            saved, found = torch.load(f"{folder}/{name}.pt"), _snapshot(model, optimizer)
            assert saved.keys() == found.keys()
            for key, value in saved.items():
                assert value.dtype == found[key].dtype, (name, key)
                assert torch.equal(value, found[key]), (name, key)
            masters = [_whole(optimizer.master_weight(p)) for p in model.parameters()]
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            _step(model, optimizer, 6)
            for p, master in zip(model.parameters(), masters, strict=True):
                assert torch.equal(_whole(optimizer.master_weight(p)), master), name


@pytest.mark.parametrize(
    ("names", "loads"),
    [
        (CORE, [(3, "rows")]),
        pytest.param(CORE, [(1, "whole"), (1, "rows"), (2, "rows"), (2, "columns")], marks=pytest.mark.slow),
        pytest.param(OTHERS, [(1, "whole"), (2, "rows"), (3, "rows"), (2, "columns")], marks=pytest.mark.slow),
    ],
    ids=["core", "core in other layouts", "others"],
)
def test_four_processes_save_what_other_layouts_load_bitwise(names, loads, tmp_path):
    _launch(_save, 4, tmp_path, names)
    for world, layout in loads:
        _launch(_load_and_compare, world, tmp_path, names, layout)


_REMAINDER = {"master_weights": "remainder"}
_MASTER = {"master_weights": torch.float32}
_FLOATS = {"exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32}
REFUSED = [
    ("fp32, 8-bit moments", {}),
    ("bf16, master", {}),
    ("bf16, kahan", {}),
    ("bf16, remainder", _MASTER),
    ("bf16, master", _REMAINDER),
    ("bf16, remainder, 8-bit moments", _REMAINDER | _FLOATS),
]


def _refuse(world, folder):
    _save(world, folder, sorted({name for name, _ in REFUSED}))
    dist.barrier()
    for name, options in REFUSED:
        for flat in (False, True):
            model, optimizer = _make(name, "rows", world, options)
            with pytest.raises(
                CheckpointException, match="Size mismatch between saved|Missing key in checkpoint"
            ) as raised:
                _load(model, optimizer, folder, name, flat)
            reasons = {str(reason[0]) for reason in raised.value.failures.values()}
            assert len(raised.value.failures) == world
            assert len(reasons) == 1


def _full(world, folder):
    del folder
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    name = "bf16, remainder, 8-bit moments"
    model, optimizer = _make(name, "rows", world)
    _step(model, optimizer, 1)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    before = _snapshot(model, optimizer)
    _, other = twin = _make(name, "rows", world)
    twin[0].load_state_dict(model.state_dict())
    set_optimizer_state_dict(*twin, saved if dist.get_rank() == 0 else {}, options=options)
    after = _snapshot(*twin)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert other.state[twin[0].rows]["master_param"].dtype == torch.int16


def _refuse_layout(world, folder):
    del folder
    mesh = init_device_mesh("cpu", (world,))
    p = torch.nn.Parameter(distribute_tensor(torch.randn(64, 128), mesh, [Shard(1)]))
    assert not holds_blocks(p)
    optimizer = AdamW([("w", p)], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8)
    p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError, match=r"'w' \(64, 128\) is sharded as \(Shard\(dim=1\),\) over a mesh of \(2,\)"
    ) as raised:
        optimizer.step()
    remedy = [line.strip() for line in str(raised.value).splitlines() if line.startswith("    ")]
    exec("\n".join(remedy), {"optimizer": optimizer, "torch": torch})
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16


def _in_two_processes(world, folder):
    _refuse(world, folder)
    _full(world, folder)
    _refuse_layout(world, folder)


def test_other_storage_and_layouts_that_cut_blocks_are_refused_alike_and_full_state_loads(tmp_path):
    _launch(_in_two_processes, 2, tmp_path)


def test_scales_without_codes_are_refused_at_load_and_at_the_step():
    p = torch.nn.Parameter(torch.randn(64, 128))
    optimizer = AdamW([("w", p)], exp_avg_dtype=torch.int8)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg"].shape == (64, 128, 1)
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].float()
    with pytest.raises(ValueError, match=r"'w' \(64, 128\) does not fit: it has exp_avg_scale"):
        optimizer.load_state_dict(saved)
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].float()
    with pytest.raises(RuntimeError, match=r"'w' \(64, 128\) does not fit: it has exp_avg_scale"):
        optimizer.step()
