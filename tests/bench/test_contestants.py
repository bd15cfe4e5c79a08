"""What is timed is what the tables say: workloads, contestants, rounds, ratios, bytes, memory and other revisions."""

import os
import sys
import types
from pathlib import Path

import pytest
import torch

import lwadamw
from bench import harness, memory, peers, revision, step, workloads
from bench.stubs import stubbed_kernels
from lwadamw.step.engine import Engine

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
IN_GIT = harness.output("git", "rev-parse", "HEAD") is not None


def test_every_workload_has_the_tensors_and_elements_of_its_model():
    counts = {name: (len(w.shapes), w.elements) for name, w in workloads.WORKLOADS.items()}
    assert counts["gpt2_124m"] == (148, 124_439_808)
    assert counts["llama_1b"] == (146, 1_235_814_400)
    assert counts["llama_7b_shard"][1] == 6_738_415_616 // 8
    assert counts["vit_465"][0] == 465
    assert counts["many_small"] == (10_000, 640_000)
    assert counts["one_huge"] == (1, 2**30)
    assert abs(counts["cpu_30m"][1] / 30e6 - 1) < 0.01
    assert counts["efficientnet_b5"] == (506, 30_389_784)
    assert workloads.WORKLOADS["llama_1b"].counts() == [1, 28, 146]
    assert workloads.WORKLOADS["vit_465"].counts() == [28, 465]
    assert workloads.WORKLOADS["one_huge"].counts(28) == [1]


def test_groups_hold_every_parameter_once_in_at_most_28_settings():
    params = [torch.zeros(1) for _ in range(100)]
    groups = workloads.make_groups(params, 60)
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, params))
    assert len({g["lr"] for g in groups}) == 28


def test_quantiles_interpolate():
    assert harness.quantiles([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert harness.quantiles([3.0]) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}


def test_a_ratio_compares_within_rounds():
    """A machine that slows down in the middle of a measurement does not change a ratio."""
    times = {"fast": [1.0, 1.0, 10.0], "slow": [2.0, 2.0, 20.0]}
    assert harness.ratio(times, "fast", "slow") == 2.0


def test_every_contestant_runs_in_every_round():
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = harness.interleaved(harness.Timer(CPU, steps=4, seconds=1e-9), calls, rounds=5)
    assert {name: len(values) for name, values in times.items()} == {"a": 5, "b": 5, "c": 5}
    # Three calls warm up. Then there is one call per round, because one call takes longer than the time asked for.
    assert seen.count("a") == 3 + 5


def test_bytes_per_element_are_the_bytes_of_each_algorithm():
    workload = workloads.WORKLOADS["cpu_30m"].shrunk()
    rows = step.measure(workload, 1, CPU, backend="torch", wanted=["foreach", "usual"], rounds=1)["rows"]
    per_element = {name: row["bytes"] / workload.elements for name, row in rows.items()}
    assert per_element["lwadamw"] == per_element[peers.FUSED] == 4 * 4 + 3 * 4
    assert per_element["lwadamw, clipping"] == 32
    assert per_element["usual way: clip_grad_norm_, fused, norms"] == 28 + 12 + 8


def test_contestants_step_parameters_of_their_own_over_the_same_memory():
    """Every optimizer has its own Parameter objects over the same memory.

    If another optimizer stepped the same Parameter object, lwadamw would have to compare it with its master weight. That
    comparison is no part of a normal step, so it must not be timed.
    """
    shapes = workloads.WORKLOADS["cpu_30m"].shrunk()
    field = peers.Field(workloads.make_params(shapes, CPU, torch.bfloat16), 2, "bf16, master")
    first, second, *_ = peers.ours(field, lwadamw, "torch").values()
    held = [[p for g in c.optimizer.param_groups for p in g["params"]] for c in (first, second)]
    assert {p.data_ptr() for p in held[0]} == {p.data_ptr() for p in held[1]} == {p.data_ptr() for p in field.params}
    versions = [p._version for p in held[1]]
    first.step()
    assert versions == [p._version for p in held[1]]
    assert all(p._version > version for p, version in zip(held[0], versions, strict=True))


def test_a_step_of_a_contestant_leaves_moments_unverified(monkeypatch):
    """The benchmark hands shared moments to lwadamw. That must not make lwadamw verify every moment at every step.

    A plain training loop never pays for this verification, so it must not be timed.
    """
    verified, step_of_engine = [], Engine.step

    def spy(*args, verify_state, **options):
        verified.append(verify_state)
        return step_of_engine(*args, verify_state=verify_state, **options)

    monkeypatch.setattr(Engine, "step", spy)
    field = peers.Field(workloads.make_params(workloads.WORKLOADS["cpu_30m"].shrunk(), CPU), 2)
    entered = peers.ours(field, lwadamw, "triton")["lwadamw"]
    entered.step()
    assert verified == [False]
    state = entered.optimizer.state[entered.optimizer.param_groups[0]["params"][0]]
    assert state["exp_avg"] is field.moments[0]["exp_avg"]
    assert float(state["step"]) == 2
    entered.step()
    assert verified == [False, True]  # The test has read `optimizer.state` in between.


def test_memory_counts_bytes_that_stay_and_bytes_that_are_freed():
    params = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(3)]
    kept = []

    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            kept.append(torch.zeros(100))  # 400 bytes that stay
            torch.zeros(2500)  # 10,000 bytes that are freed

    measured = memory.measure_optimizer(params, lambda: Greedy(params, lr=1.0), memory.plain)
    assert measured == {"first": 10_400, "step": 400 + 400 + 10_000}


def test_memory_of_a_real_step_is_the_memory_of_its_tables():
    params, moments, move = memory.untouched(workloads.Workload("three", [(5000,), (3, 7), (1,)], (1,)))
    made = []

    def make():
        made.append(lwadamw.AdamW(params, backend="triton"))
        return made[0]

    with stubbed_kernels():
        measured = memory.measure_optimizer(params, make, memory.plain, moments=moments, move=move)
    buffer = params[0].untyped_storage().data_ptr()
    tables = [t for t in _tensors(made[0]) if t.untyped_storage().data_ptr() != buffer]
    # The steps of the parameters are state, 4 bytes each. The table of groups is one row of 16 words on the host.
    assert 0 <= measured["step"] - (memory.storage_bytes(tables) - 4 * len(params)) <= 16 * 8 + 64


def _tensors(thing, seen=None):
    """Every tensor that an object holds in its attributes, lists, tuples and dicts, at any depth."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
        return []
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, (list, tuple, set)):
        held = list(thing)
    elif isinstance(thing, dict):
        held = list(thing.values())
    else:
        slots = [getattr(thing, name, None) for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        held = [*slots, *vars(thing).values()] if hasattr(thing, "__dict__") else slots
    return [t for item in held for t in _tensors(item, seen)]


@pytest.mark.skipif(not IN_GIT, reason="needs the repository")
@pytest.mark.usefixtures("base_is_forgotten")
def test_the_base_revision_is_another_package_and_takes_part():
    base = revision.load("HEAD")
    assert base.__name__ == "lwadamw_base"
    folder = os.path.dirname(os.path.dirname(base.__file__))
    assert not folder.startswith(str(ROOT))
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    optimizer = base.AdamW([p], lr=0.5, weight_decay=0.0, backend="triton")
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((5,), 0.5))
    assert sys.modules["lwadamw_base.kernels"].__file__.startswith(folder)
    assert not isinstance(optimizer, lwadamw.AdamW)

    small = workloads.Workload("small", [(4, 5), (3,)], (1,))
    rows = step.measure(small, 1, CPU, backend="torch", wanted=[], rounds=1, base=("HEAD", base))["rows"]
    assert {"lwadamw", "lwadamw, clipping", "lwadamw at HEAD", "lwadamw at HEAD, clipping"} <= rows.keys()


def test_base_without_git_or_revision_is_a_clear_error(monkeypatch):
    if IN_GIT:
        with pytest.raises(RuntimeError, match=r"--base no-such-thing: git archive failed"):
            revision.load("no-such-thing")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="needs git"):
        revision.load("HEAD")


def test_commit_can_be_given(monkeypatch):
    monkeypatch.setenv("LWADAMW_COMMIT", "abc")
    assert harness.commit() == "abc"
    monkeypatch.delenv("LWADAMW_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert harness.commit() == "unknown"


def test_a_gpu_is_busy_before_the_first_event(monkeypatch):
    """Else the time in which an idle device waits for the host would count as the time of the first call."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("event")

        def elapsed_time(self, _):
            return 6.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    seconds = harness.Timer(torch.device("cuda"))(lambda: done.append("call"), 2)
    assert done == ["wait", "call", "event", "call", "call", "event", "wait"]
    assert seconds == 0.003
