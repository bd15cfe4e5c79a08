"""Code generation for sm_80, sm_90, sm_100 and gfx942: no spills, wide accesses, no unnecessary bytes.

These tests need no GPU.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from bench.codegen import COMPLETE, SUPPORTED, TARGETS, access_width, loaded_early
from lwadamw.kernels import layout
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import CODES

ROOT = Path(__file__).parents[2]
NVIDIA = ("sm_80", "sm_90", "sm_100")
KERNELS = {
    "absolute_kernel",
    "adamw_kernel",
    "coefficients_kernel",
    "grad_norm_kernel",
    "norms_kernel",
    "threshold_kernel",
    "total_kernel",
}
pytestmark = pytest.mark.skipif(
    not SUPPORTED, reason="Triton before 3.3 has another interface for ahead-of-time compilation"
)


@pytest.fixture(
    scope="module", params=[(COMPLETE,), pytest.param(tuple(TARGETS), marks=pytest.mark.matrix)], ids="-".join
)
def targets(request):
    """What is compiled for: the target of all variants, or all targets."""
    return request.param


@pytest.fixture(scope="module")
def reports(targets, tmp_path_factory):
    """Reports of all variants, from another process. This process may have imported the kernels to interpret them.

    Compiling takes half a minute, so the workers of one test run share the reports.
    """
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / f"codegen_{len(targets)}.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.codegen", "--targets", *targets, "--json", str(path)]
    with FileLock(f"{path}.lock"):
        if not path.exists():
            subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    return json.loads(path.read_text())["reports"]


def _updates(reports):
    """(report, storage, has amsgrad) of every variant of the update kernel."""
    for r in reports:
        if r["kernel"] == "adamw_kernel":
            yield r, COMBINATIONS[r["combination"]].storage, r["constants"]["AMSGRAD"] == "True"


def _has_codes(storage):
    return storage.exp_avg in CODES or storage.exp_avg_sq in CODES


def test_every_variant_compiles_for_every_target(reports, targets):
    assert {*NVIDIA, "gfx942"} == TARGETS.keys()
    kernels = {target: {r["kernel"] for r in reports if r["target"] == target} for target in targets}
    assert all(found == KERNELS for found in kernels.values())
    assert {r["target"] for r in reports} == kernels.keys()
    assert {r["combination"] for r, *_ in _updates(reports) if r["target"] == COMPLETE} == COMBINATIONS.keys()
    strided = {r["combination"] for r, *_ in _updates(reports) if r["target"] == COMPLETE and "strided" in r["variant"]}
    assert strided == {name for name, combination in COMBINATIONS.items() if combination.storage.draws}


def test_no_variant_spills(reports):
    assert {(r["target"], r["kernel"], r["variant"]): r["spills"] for r in reports if r["spills"]} == {}


def test_each_access_takes_all_elements_of_a_thread_at_once(reports):
    """A thread has equally many elements of every array: 16 bytes of the widest array, or 8 bytes with 8-bit moments."""
    for r, storage, amsgrad in _updates(reports):
        each = int(r["constants"]["BLOCK"]) // layout.THREADS
        read_and_written = [storage.exp_avg, *[storage.exp_avg_sq] * (1 + amsgrad), *filter(None, [storage.companion])]
        arrays = [storage.grad, *[storage.param, *read_and_written] * 2]
        expected = Counter(each * dtype.itemsize for dtype in arrays)
        assert max(expected) == 16, r
        # Every thread accesses the scale of its elements.
        scales = sum(dtype in CODES for dtype in storage[2:4])
        expected[4] += 2 * scales
        assert {int(width): n for width, n in r["widths"].items()} == {w: n for w, n in expected.items() if n}, r


def test_the_gradient_norm_reads_16_bytes_at_a_time(reports):
    for r in reports:
        if r["kernel"] == "grad_norm_kernel":
            size = {"fp32": 4, "bf16": 2}[r["variant"]]
            assert r["widths"] == {"16": layout.GRAD_BLOCK // layout.THREADS * size // 16}, r
            assert r["moved_bytes"] == size


def test_the_update_moves_the_bytes_that_its_storage_names(reports):
    for r, storage, amsgrad in _updates(reports):
        assert r["moved_bytes"] == storage.moved_bytes(amsgrad), r


def test_bytes_in_flight_fill_the_memory_system(reports):
    """Each multiprocessor loads at least 32 KB at once. Little's law gives 29 KB for an H200.

    Variants with 8-bit moments reach it by copies to shared memory one block ahead.
    """
    for r in reports:
        if r["target"] in NVIDIA and r["kernel"] in ("adamw_kernel", "grad_norm_kernel"):
            assert r["bytes_in_flight"] >= 32 * 1024, r


def test_instructions_per_element_stay_below_their_limits(reports, targets):
    """Instructions limit variants with 8-bit moments on an H200, and not bytes. float32 has the time of 220."""
    limits = {(target, "fp32"): 57 if target == "sm_100" else 54 for target in NVIDIA}
    limits |= {
        (COMPLETE, f"{weight}, 8-bit moments"): 104 for weight in ("fp32", "bf16, remainder", "bf16, stochastic")
    }
    limits |= {(target, "bf16, stochastic, 8-bit moments"): 104 for target in NVIDIA}
    limits |= {(target, f"{name} / strided"): limit for (target, name), limit in limits.items() if "8-bit" in name}
    limits = {(target, name): limit for (target, name), limit in limits.items() if target in targets}
    found = {
        (r["target"], r["variant"]): r["instructions"]
        for r, *_ in _updates(reports)
        if (r["target"], r["variant"]) in limits
    }
    assert found.keys() == limits.keys()
    assert {key: count for key, count in found.items() if count > limits[key]} == {}


def test_the_sum_of_the_norms_loads_one_block_ahead(reports, targets):
    """Each of the two loops takes 16 bytes per access, and a block is on its way while one is added."""
    loads = layout.TOTAL_BLOCK * 4 // layout.THREADS // 16
    found = [r for r in reports if r["kernel"] == "total_kernel" and r["target"] in NVIDIA]
    assert len(found) == len({*NVIDIA} & {*targets})
    for r in found:
        assert [loop["widths"] for loop in r["loops"]] == [{"16": loads}] * 2, r
        assert [loop["ahead"] for loop in r["loops"]] == [1, 1], r
        assert sum(loop["instructions"] for loop in r["loops"]) <= 640, r


def test_access_widths_are_parsed_from_instructions():
    widths = {
        "LDG.E.128 R4, desc[UR18][R12.64] ": 16,
        "@!P2 LDG.E.U16 R8, desc[UR18][R20.64] ": 2,
        "@P4 STG.E desc[UR24][R34.64], R37 ": 4,
        "LDG.E.EF.64 R4, desc[UR18][R12.64] ": 8,
        "FADD R1, R2, R3 ": 0,
        "global_load_dwordx4 v[2:5], v[36:37], off": 16,
        "buffer_load_dword v40, v4, s[24:27], 0 offen": 4,
        "global_store_short_d16_hi v[8:9], v4, off": 2,
        "global_load_ubyte v30, v[8:9], off": 1,
    }
    assert {line: access_width(line) for line in widths} == widths


def test_loads_after_the_first_use_of_a_loaded_register_do_not_count_as_early():
    loop = [
        "LDG.E.128 R4, [R2.64]",
        "IADD3 R2, R2, R9, RZ",
        "LDG.E.64 R12, [R2.64]",
        "FADD R1, R6, R6",
        "LDG.E.64 R14, [R2.64]",
    ]
    assert loaded_early(loop) == 24 / 32
    assert loaded_early(loop[:4]) == 1
