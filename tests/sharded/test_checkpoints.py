"""torch's distributed checkpoint: every storage is bitwise the same in another layout, or is refused on every process."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES

from . import checkpoints as c
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
MATRIX = pytest.mark.matrix
BACKENDS = ("torch", "triton")
LAYOUTS = ("whole", "FSDP2, 1", "FSDP2, 2", "FSDP2, 3", "row-parallel, 2", "FSDP2 x TP")


def _same(found, saved):
    assert saved.keys() == found.keys()
    for key, value in saved.items():
        assert value.dtype == found[key].dtype, key
        assert torch.equal(value, found[key]), key


def _stepped(name, layout, mesh, backend="torch", seed=0):
    model, optimizer = c.make(name, layout, mesh, seed=seed, backend=backend)
    for i in (1, 2):
        c.step(model, optimizer, seed + i)
    return model, optimizer


def _assert_that_a_step_undoes_nothing(model, optimizer):
    before = c.snapshot(model, optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    c.step(model, optimizer, 6)
    for key, value in c.snapshot(model, optimizer).items():
        if key.endswith(".whole"):
            assert torch.equal(value, before[key]), key
        if key.endswith(".step"):
            assert value == before[key] + 1


# Other layouts and other numbers of processes.


def _other_layouts(folder, cases, backend):
    """Return for each (layout, name, flattened or not) how the load ended."""
    warnings.simplefilter("ignore")
    meshes, saved = c.meshes(), {}
    for name in dict.fromkeys(name for _, name, _ in cases):
        model, optimizer = _stepped(name, "FSDP2, 4", meshes["FSDP2, 4"], backend)
        for flat in {flat for _, other, flat in cases if other == name}:
            c.save(model, optimizer, f"{folder}/{name}.{flat}", flat, dist.group.WORLD)
        saved[name] = c.snapshot(model, optimizer)
    outcomes = {}
    for layout, name, flat in cases:
        if c.is_member(meshes[layout]):
            path = f"{folder}/{name}.{flat}"
            outcomes[layout, name, flat] = _load(path, name, layout, meshes[layout], flat, saved[name], backend)
    return outcomes


def _load(path, name, layout, mesh, flat, saved, backend):
    model, optimizer = c.make(name, layout, mesh, seed=7, backend=backend)
    c.step(model, optimizer, 5)  # there is state already, which the checkpoint replaces
    c.load(model, optimizer, path, flat, c.group_of(mesh))
    _same(c.snapshot(model, optimizer), saved)
    _assert_that_a_step_undoes_nothing(model, optimizer)
    return "bitwise"


def _assert_bitwise(results):
    outcomes = {key: outcome for found in results for key, outcome in found.items()}
    for (layout, name, flat), outcome in outcomes.items():
        assert outcome == "bitwise", (layout, name, flat, outcome)
    return outcomes


@MATRIX
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", range(5))
def test_four_processes_save_what_other_layouts_load_bitwise(part, backend, tmp_path):
    names = list(COMBINATIONS)[part::5]
    cases = list(itertools.product(LAYOUTS, names, (False, True)))
    if backend == "triton":  # slow on the interpreter
        cases = list(itertools.product(("FSDP2, 2", "FSDP2 x TP"), names, (part % 2 == 1,)))
    outcomes = _assert_bitwise(run(4, _other_layouts, str(tmp_path), cases, backend))
    assert outcomes.keys() == set(cases)


# Other storage options.


def _refuses(saved, loads):
    """Whether torch's distributed checkpoint cannot load one storage into another."""
    if not COMBINATIONS[loads].options.keys() <= COMBINATIONS[saved].options.keys():
        return True  # the checkpoint has to have every key of a group
    of = [COMBINATIONS[name].storage for name in (saved, loads)]
    companions = [s.weight if s.companion else "" for s in of]
    codes = [(s.exp_avg in CODES, s.exp_avg_sq in CODES) for s in of]
    return companions[0] != companions[1] or codes[0] != codes[1]


def _other_options(folder, pairs):
    warnings.simplefilter("ignore")
    mesh, layout, saved = c.all_of_them(), "FSDP2", {}
    for name in sorted({name for name, _ in pairs}):
        model, optimizer = _stepped(name, layout, mesh)
        for flat in (False, True):
            c.save(model, optimizer, f"{folder}/{name}.{flat}", flat, dist.group.WORLD)
        saved[name] = c.snapshot(model, optimizer)
    for i, (name, other) in enumerate(pairs):
        flat = bool(i % 2)
        model, optimizer = _stepped(other, layout, mesh, seed=7)
        before = c.snapshot(model, optimizer)
        if _refuses(name, other):
            with pytest.raises(CheckpointException) as raised:
                c.load(model, optimizer, f"{folder}/{name}.{flat}", flat, dist.group.WORLD)
            reasons = {str(reason[0]) for reason in raised.value.failures.values()}
            assert len(raised.value.failures) == dist.get_world_size()
            assert len(reasons) == 1
            (reason,) = reasons
            assert "Size mismatch between saved" in reason or "Missing key in checkpoint" in reason, reason
            assert "optim.state." in reason or "optim.param_groups." in reason, reason
            c.alike(reason, dist.group.WORLD)
            _same(c.snapshot(model, optimizer), before)
        else:
            c.load(model, optimizer, f"{folder}/{name}.{flat}", flat, dist.group.WORLD)
            _assert_converted(c.snapshot(model, optimizer), saved[name], other)
    return True


def _assert_converted(found, saved, other):
    """Every value has been converted once to the dtype that the optimizer asks for."""
    for key, value in found.items():
        expected = saved[key]
        if key.endswith(".whole") and COMBINATIONS[other].storage.companion is None:
            expected = expected.to(COMBINATIONS[other].param)
        assert torch.equal(value, expected.to(value.dtype)), key


PAIRS = [pair for pair in itertools.product(COMBINATIONS, repeat=2) if pair[0] != pair[1]]


@MATRIX
@pytest.mark.parametrize("part", range(6))
def test_other_storage_options_are_refused_before_anything_is_written_or_convert_once(part, tmp_path):
    assert run(2, _other_options, str(tmp_path), PAIRS[part::6]) == [True] * 2


# Whole tensors, `full_state_dict=True`.


def _full_state(pairs):
    """Return for each pair, with and without a broadcast, how the load ended."""
    warnings.simplefilter("ignore")
    mesh, outcomes = c.all_of_them(), []
    for name, other in pairs:
        model, optimizer = _stepped(name, "FSDP2", mesh)
        saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
        before = c.snapshot(model, optimizer)
        for broadcast in (False, True):
            twin, other_optimizer = _stepped(other, "FSDP2", mesh, seed=7)
            twin.load_state_dict(model.state_dict())
            given = saved if not broadcast or dist.get_rank() == 0 else {}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
            try:
                set_optimizer_state_dict(twin, other_optimizer, given, options=options)
            except (ValueError, KeyError, RuntimeError) as error:
                outcomes.append(type(error).__name__)
                text = str(error)
                assert "load_state_dict: " in text or "The size of tensor" in text or "param_groups.0." in text, text
            else:
                outcomes.append("bitwise")
                _same(c.snapshot(twin, other_optimizer), before)
    c.alike(outcomes, dist.group.WORLD)
    return outcomes


@MATRIX
@pytest.mark.parametrize("part", range(3))
def test_every_storage_goes_through_whole_tensors_bitwise(part):
    pairs = [(name, name) for name in list(COMBINATIONS)[part::3]]
    assert run(2, _full_state, pairs) == [["bitwise"] * 2 * len(pairs)] * 2


CHANGED = [
    ("bf16, remainder, 8-bit moments", "bf16, remainder"),
    ("bf16, remainder", "bf16, remainder, 8-bit moments"),
    ("bf16, kahan", "bf16"),
    ("bf16, master", "bf16"),
    ("bf16, master", "bf16, remainder"),
    ("bf16, remainder", "bf16, master"),
]


@MATRIX
def test_whole_tensors_of_another_storage_are_refused_or_kept_as_they_are():
    for outcomes in run(2, _full_state, CHANGED):
        assert "bitwise" not in outcomes[1::2]  # broadcasts copy into the tensors that are there
        assert outcomes[::2].count("bitwise") == 2  # between the two exact ways to keep a weight: the state decides


@MATRIX
def test_layouts_that_cut_blocks_are_refused_by_name_with_a_remedy():
    assert run(2, _all_cuts) == [True] * 2


# Layouts that cut blocks.


def _all_cuts():
    return all(_cut_blocks(shape, placement) for shape, placement in CUT)


CUT = [
    ((64, 70), Shard(0)),
    ((64, 128), Shard(1)),
    ((64, 192), Shard(1)),
    ((4099, 2), Shard(0)),
    ((8, 9, 70), Shard(0)),
]


def _cut_blocks(shape, placement):
    """A parameter that is in 8 bits as a whole is refused, and not kept in another type, where shards would cut blocks."""
    mesh = c.all_of_them()
    p = nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [placement]))
    optimizer = AdamW([("w", p)], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8)
    before, p.grad = c.whole(p), torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"^'w' .* has moments in 8 bits and is sharded as") as raised:
        optimizer.step()
    c.alike(str(raised.value), dist.group.WORLD)
    assert torch.equal(c.whole(p), before)
    assert not optimizer.state
    remedy = [line.strip() for line in str(raised.value).splitlines() if line.startswith("    ")]
    exec("\n".join(remedy), {"optimizer": optimizer, "torch": torch})
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    whole = nn.Parameter(torch.randn(shape))
    single = AdamW([("w", whole)], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8, backend="torch")
    whole.grad = torch.ones_like(whole)
    single.step()
    assert single.state[whole]["exp_avg"].dtype == torch.int8
    with pytest.raises(ValueError, match=r"load_state_dict: .*'w' ") as raised:
        optimizer.load_state_dict(single.state_dict())
    c.alike(str(raised.value), dist.group.WORLD)
    return True


# Loads in place.


def _in_place(folder, backend):
    """torch's distributed checkpoint writes into the local tensors of parameters and state. Nobody tells the optimizer."""
    warnings.simplefilter("ignore")
    mesh = c.all_of_them()
    for name in ("bf16, master", "bf16, remainder", "bf16, kahan"):
        model, optimizer = _stepped(name, "FSDP2", mesh, backend)
        path = f"{folder}/{name}.{backend}"
        c.save(model, optimizer, path, False, dist.group.WORLD)
        saved = c.snapshot(model, optimizer)
        other, other_optimizer = _stepped(name, "FSDP2", mesh, backend, seed=7)
        old = {key: c.whole(p) for key, p in other.named_parameters()}
        dcp.load({"model": get_model_state_dict(other)}, checkpoint_id=path)
        for group in other_optimizer.param_groups:
            group["lr"] = 0.0
        c.step(other, other_optimizer, 6)
        for key, p in other.named_parameters():
            weight = c.whole(other_optimizer.master_weight(p))
            # Beside an fp32 master, what has been written is the weight. Otherwise the old lower half may stay.
            written = saved[key].float()
            bound = written.abs() * 2**-8 * (saved[key] == old[key] if name == "bf16, master" else 1)
            assert ((weight - written).abs() <= bound).all(), (name, key)
        dcp.load(c.tensors_of(other, other_optimizer, False), checkpoint_id=path)
        found = c.snapshot(other, other_optimizer)
        assert all(torch.equal(found[key], value) for key, value in saved.items())
        _assert_that_a_step_undoes_nothing(other, other_optimizer)
    return True


@MATRIX
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_load_in_place_is_not_undone_by_the_next_step(backend, tmp_path):
    assert run(2, _in_place, str(tmp_path), backend) == [True] * 2


# The core of all of this in one start of processes.


def _core(folder):
    cases = [("FSDP2, 3", "bf16, remainder, 8-bit moments", False), ("FSDP2 x TP", "bf16, kahan", True)]
    outcomes = _other_layouts(f"{folder}/layouts", cases, "torch")
    _other_options(f"{folder}/options", [("fp32, 8-bit moments", "fp32")])
    assert _full_state([("bf16, remainder", "bf16, remainder")]) == ["bitwise"] * 2
    _cut_blocks((64, 70), Shard(0))
    return outcomes


def test_four_processes_save_what_others_load_bitwise_and_other_storage_and_cut_blocks_are_refused_alike(tmp_path):
    _assert_bitwise(run(4, _core, str(tmp_path)))


def _one_row():
    """Process 0 holds all of a parameter of one row, so a replicated array has the shape of its shard there."""
    mesh = init_device_mesh("cpu", (2,))
    w = torch.ones(1, 6)
    optimizer = AdamW([("w", nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])))])
    replicated = distribute_tensor(w, mesh, [Replicate()])
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": torch.tensor(1.0), "exp_avg": replicated, "exp_avg_sq": replicated}}
    with pytest.raises(ValueError, match="exp_avg of 'w' .* is a DTensor with other shards") as refused:
        optimizer.load_state_dict(saved)
    c.alike(str(refused.value), dist.group.WORLD)
    return True


@MATRIX
def test_a_replicated_array_for_a_shard_of_one_row_is_refused_on_every_process():
    assert run(2, _one_row) == [True] * 2
