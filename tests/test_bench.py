"""The benchmark commands run on a machine without a GPU and end with a table."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_host_cost_prints_a_column_per_grouping(tmp_path):
    lines = _run("bench.host_cost", "--tensors", "30", "--rounds", "1", "--json", str(tmp_path / "host.json"))
    assert lines[1].split() == ["1", "groups", "28", "groups", "30", "groups"]
    columns = json.loads((tmp_path / "host.json").read_text())["us_by_groups"]
    assert set(columns) == {"1", "28", "30"}
    assert all(us["lwadamw"] > 0 for us in columns.values())


def test_gpu_dry_run_writes_what_a_real_one_would(tmp_path):
    lines = _run("bench.gpu", "--dry-run", "--out", str(tmp_path), "--workloads", "gpt2_124m", "one_huge")
    (path,) = tmp_path.glob("gpu_*.json")
    record = json.loads(path.read_text())
    assert {"device", "driver", "torch", "triton", "commit"} <= record["machine"].keys()
    assert [r["workload"] for r in record["results"]] == ["gpt2_124m", "one_huge"]
    assert set(record["results"][0]["rows"]) >= {"lwadamw", "torch fused", "torch foreach"}
    assert "vs fused" in "\n".join(lines)


def test_gpu_without_a_gpu_says_so():
    import torch

    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "sees no GPU" in done.stderr
