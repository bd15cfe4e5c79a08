"""Readings, spectra, profiles and drift of split parameters are those of the single process, and one process writes."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import lwadamw
from lwadamw.loggers import TensorBoardLogger, WandbLogger
from lwadamw.monitor import profile_file
from lwadamw.monitor.comparison import compare
from lwadamw.monitor.drift import DriftWatch
from lwadamw.monitor.probe import Probe

from . import models
from .places import give_gradients, places_of
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
MATRIX = pytest.mark.matrix
SPECTRA = ("top", "second", "bulk", "calibrated_at")
# A tau of 10 steps.
OPTIONS = {"lr": 1e-2, "weight_decay": 10.0, "betas": (0.9, 0.95)}


class Counter:
    """A writer that counts what it is given."""

    count = 0

    def add_scalar(self, *_):
        self.count += 1

    def log(self, *_, **__):
        self.count += 1


def _gathered(value):
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def _bits(reading):
    return {name: column.tobytes() for name, column in reading.columns.items()}


def _watched(model, backend, reference):
    optimizer = lwadamw.AdamW(model.named_parameters(), backend=backend, **OPTIONS)
    monitor = lwadamw.Monitor(optimizer, every=2, spectrum_every=4)
    watch, board, run = DriftWatch(reference, after=0.1), Counter(), Counter()
    monitor.on_reading += [watch, TensorBoardLogger(board), WandbLogger(run)]
    return optimizer, monitor, watch, board, run


def _profile_to_watch(model):
    """The profile of a run whose weights are a quarter of what they will be."""
    optimizer = lwadamw.AdamW(model.named_parameters(), **OPTIONS)
    with lwadamw.Monitor(optimizer, every=2, spectrum_every=4) as monitor:
        for step in range(6):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    profile = profile_file.Profile.of(monitor.readings)
    lowered = [
        dataclasses.replace(s, values=s.values | {"weight_rms": s.values["weight_rms"] / 4}) for s in profile.segments
    ]
    return dataclasses.replace(profile, segments=tuple(lowered))


def _layout(name, layout, backend, folder):
    single, sharded = layout.whole(), layout.wrap(layout.whole())
    places = places_of(layout.whole(), layout.wrap)
    reference = _profile_to_watch(layout.whole())
    one, alone, first_watch, *_ = _watched(single, backend, reference)
    many, monitor, watch, board, log = _watched(sharded, backend, reference)
    measured = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            give_gradients(single, sharded, places, step)
            one.step()
            warned = len(caught)
            many.step()
            warned = len(caught) - warned
            found, expected = monitor.latest, alone.latest
            assert found.names == expected.names
            for column, values in expected.columns.items():
                loose = 1e-2 if column in SPECTRA else 1e-3
                known = ~np.isnan(found.columns[column]) if column in SPECTRA else np.ones(len(values), bool)
                if "rotation" in column:  # a bias that was 0 has no angle
                    known &= [not expected_name.endswith("bias") for expected_name in expected.names]
                np.testing.assert_allclose(found.columns[column][known], values[known], rtol=loose, err_msg=column)
            if np.nanmax(found.columns["calibrated_at"]) == step + 1:
                _check_spectra(name, found, single)
                measured += 1
    assert all(bits == _bits(found) for bits in _gathered(_bits(found)))
    assert measured > 1
    assert watch.warned == first_watch.warned is True
    path = f"{folder}/{name}.{backend}.{dist.get_rank()}.json"
    profile, own = profile_file.save(monitor, path), profile_file.save(alone, path + ".single")
    written = _gathered(os.path.exists(path))
    assert written == [True] + [False] * (dist.get_world_size() - 1)
    assert [count > 0 for count in _gathered(board.count)] == written
    assert [count > 0 for count in _gathered(log.count)] == written
    assert [s.shape for s in profile.segments] == [s.shape for s in own.segments]
    judged = [
        {(f.layers, f.statistic): f.verdict for f in compare(reference, each, after=0.1).findings}
        for each in (profile, own)
    ]
    # No process has the spectrum of a matrix that is split by rows and by columns.
    unknown = {("layers.*.down.weight", "top")} if name == "FSDP2 x TP" else set()
    assert judged[0].keys() ^ judged[1].keys() <= unknown
    assert judged[0] == {key: verdict for key, verdict in judged[1].items() if key not in unknown}
    assert len(judged[0]) > 20
    with pytest.raises(RuntimeError, match="is sharded over processes, and a shard has no gain"):
        Probe(many, sharded, models.batch(0, None)[0])


def _check_spectra(layout, reading, model):
    """Every matrix but those that are split by rows and by columns has its singular values."""
    for name, p in model.named_parameters():
        i = reading.names.index(name)
        both = layout == "FSDP2 x TP" and name.endswith("down.weight")
        if p.ndim < 2 or both:
            assert math.isnan(reading.columns["top"][i]), name
            continue
        values = torch.linalg.svdvals(p.detach().double())
        assert reading.columns["top"][i] == pytest.approx(float(values[0]), rel=1e-2), name
        assert reading.columns["second"][i] == pytest.approx(float(values[1]), rel=3e-2), name


def _layouts(world, chosen, folder):
    for name, layout in models.layouts(world).items():
        for backend in chosen.get(name, ()):
            _layout(name, layout, backend, folder)
    return True


CHOSEN = [
    (2, {"FSDP2": ["torch"]}),
    pytest.param(2, {"FSDP2": ["triton"], "TP": ["torch"]}, marks=MATRIX),
    pytest.param(3, {"FSDP2": ["torch"]}, marks=MATRIX),
    pytest.param(4, {"HSDP": ["torch"], "FSDP2 x TP": ["torch"]}, marks=MATRIX),
]


@pytest.mark.parametrize(("world", "chosen"), CHOSEN)
def test_readings_profiles_and_drift_of_sharded_models_are_those_of_the_single_process(world, chosen, tmp_path):
    assert run(world, _layouts, world, chosen, str(tmp_path)) == [True] * world


def _spectra(world):
    """Every shape and placement by itself: small, wide, one row, an empty shard, columns, a convolution, experts."""
    mesh = init_device_mesh("cpu", (world,))
    shapes = {
        "tall": ((37, 9), 0), "wide": ((5, 40), 0), "row": ((1, 12), 0), "few rows": ((2, 30), 0),
        "columns": ((12, 31), 1), "wide by columns": ((3, 50), 1), "one column": ((30, 1), 1),
        "whole": ((8, 6), None), "double": ((20, 10), 0), "broken": ((10, 10), 0),
    }  # fmt: skip
    torch.manual_seed(0)
    wholes = {
        name: torch.randn(shape, dtype=torch.double if name == "double" else None)
        for name, (shape, _) in shapes.items()
    }
    wholes["broken"][3, 3] = math.inf
    params = {
        name: nn.Parameter(distribute_tensor(wholes[name], mesh, [Replicate() if dim is None else Shard(dim)]))
        for name, (_, dim) in shapes.items()
    }
    optimizer = lwadamw.AdamW(params.items(), lr=0.0, backend="torch")
    monitor = lwadamw.Monitor(optimizer, every=1, spectrum_every=1)
    for p in params.values():
        p.grad = torch.ones_like(p)
    with CommDebugMode() as calls:
        optimizer.step()
    # The norms, and the iterations of all matrices together.
    assert calls.get_total_counts() <= 64
    for name, whole in wholes.items():
        i = monitor.latest.names.index(name)
        top, second = (monitor.latest.columns[key][i] for key in ("top", "second"))
        if name == "broken":
            assert math.isnan(top)
            continue
        values = torch.linalg.svdvals(whole.double())
        assert top == pytest.approx(float(values[0]), rel=1e-2), name
        assert math.isnan(second) if min(whole.shape) == 1 else second == pytest.approx(float(values[1]), rel=3e-2), (
            name
        )
    assert all(bits == _bits(monitor.latest) for bits in _gathered(_bits(monitor.latest)))
    return True


@MATRIX
@pytest.mark.parametrize("world", [1, 2, 3])
def test_spectra_of_every_shape_equal_a_full_svd(world):
    assert run(world, _spectra, world) == [True] * world


def _flat_shards(world, folder):
    """Flat pieces, and a parameter that only one process holds. No spectrum, everything else is that of the whole."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    weights = {"a": torch.randn(7, 5), "b": torch.randn(9), "mine": torch.randn(6)}
    cuts = {"a": 17, "b": 0}

    def part(name, whole):
        flat = whole.flatten()
        return whole.clone() if name == "mine" else (flat[: cuts[name]] if rank == 0 else flat[cuts[name] :]).clone()

    params = {name: nn.Parameter(part(name, weights[name])) for name in weights if name != "mine" or rank == 1}
    reference = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
    ours = lwadamw.AdamW(params.items(), shard_group=dist.group.WORLD, **OPTIONS)
    theirs = lwadamw.AdamW(reference.items(), **OPTIONS)
    monitor, alone = (lwadamw.Monitor(o, every=2, spectrum_every=2) for o in (ours, theirs))
    for step in range(4):
        for name, p in reference.items():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            if name in params:
                params[name].grad = part(name, p.grad)
        ours.step()
        theirs.step()
    found, expected = monitor.latest, alone.latest
    order = [found.names.index(name) for name in expected.names]
    for column, values in expected.columns.items():
        if column in SPECTRA:
            assert np.isnan(found.columns[column]).all()
        else:
            np.testing.assert_allclose(found.columns[column][order], values, rtol=1e-4, err_msg=column)
    assert all(bits == _bits(found) for bits in _gathered(_bits(found)))
    path = f"{folder}/{rank}.json"
    profile = profile_file.save(monitor, path)
    assert _gathered(os.path.exists(path)) == [True, False]
    assert {s.shape for s in profile.segments} == {()}
    with pytest.raises(RuntimeError, match="built with shard_group"):
        Probe(ours, nn.Linear(2, 2), torch.zeros(1, 2))
    return True


@MATRIX
def test_readings_of_flat_shards_are_those_of_the_whole(tmp_path):
    assert run(2, _flat_shards, 2, str(tmp_path)) == [True] * 2
