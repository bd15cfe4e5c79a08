"""Code generation for sm_80, sm_90, sm_100 and gfx942: wide accesses, no spills, enough bytes in flight. Needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.codegen import SUPPORTED

ROOT = Path(__file__).parent.parent
# 16-byte accesses of the aligned loop: p, g, m, v (and the largest v) read, all but g written.
BULK = {("adamw_kernel", "False"): 4 + 3, ("adamw_kernel", "True"): 5 + 4}
NVIDIA = ("sm_80", "sm_90", "sm_100")
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="Triton before 3.3 compiles ahead of time otherwise")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Compiled in a process of its own: this one may have imported the kernels to interpret them."""
    path = tmp_path_factory.mktemp("codegen") / "reports.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.codegen", "--json", str(path)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True)
    return json.loads(path.read_text())["reports"]


def test_every_variant_compiles_for_every_target(reports):
    targets = {r["target"] for r in reports}
    assert targets == {*NVIDIA, "gfx942"}
    variants = {(r["kernel"], *r["constants"].values()) for r in reports}
    assert len(reports) == len(targets) * len(variants)
    assert {v[0] for v in variants} == {
        "adamw_kernel",
        "coefficients_kernel",
        "grad_norm_kernel",
        "norms_kernel",
        "total_kernel",
    }
    assert sum(v[0] == "adamw_kernel" for v in variants) == 4


def test_no_variant_spills(reports):
    assert {(r["target"], r["kernel"], *r["constants"].values()): r["spills"] for r in reports if r["spills"]} == {}


def test_bulk_arrays_move_16_bytes_at_a_time(reports):
    for r in reports:
        if r["kernel"] == "adamw_kernel":
            expected = BULK["adamw_kernel", r["constants"]["AMSGRAD"]]
            # Compilers may unroll the loop, or write the four sums of a chunk at once; never fewer than all.
            assert r["wide"] >= expected, r
            if r["target"] in NVIDIA:
                assert r["wide"] == expected, r
        if r["kernel"] == "grad_norm_kernel":
            assert r["wide"] >= 2, r


def test_bytes_in_flight_fill_the_memory_system(reports):
    """At least 32 KB per multiprocessor: about what Little's law asks of an H200, 29 KB, and some."""
    for r in reports:
        if r["target"] in NVIDIA and r["kernel"] in ("adamw_kernel", "grad_norm_kernel"):
            assert r["bytes_in_flight"] >= 32 * 1024, r
