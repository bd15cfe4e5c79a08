"""Steps through the C launcher of the installed Triton: what a CUDA driver gets is what the tables say."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.launchers import CANDIDATE

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(shutil.which("cc") is None, reason="the pretended CUDA driver is compiled with cc")
@pytest.mark.skipif(torch.version.hip is not None, reason="the launcher is that of CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a real driver")
def test_first_and_direct_launches_hand_over_what_the_tables_say():
    """Of the package that gpu-test and gpu-bench run, and of a candidate of gpu-tune; whole steps and single parameters."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, "-m", "bench.launchers", "--storages", "fp32"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[3:-1]]
    launched = {(package, kernel): (int(first), int(direct)) for package, _, kernel, first, direct in rows}
    kernels = ("grad_norm_kernel", "total_kernel", "coefficients_kernel", "adamw_kernel")
    assert launched.keys() == {(package, kernel) for package in ("lwadamw", CANDIDATE) for kernel in kernels}
    assert all(first and direct for first, direct in launched.values())
