"""One command for a bare GPU machine: GPU tests, then the step against its peers. Needs torch, triton, numpy only.

    make gpu                     # or: python -m bench.gpu --out results
    python -m bench.gpu --only bench --workloads llama_1b

Every optimizer of a workload is timed in turn, in the same process, by device events around several consecutive steps,
so a figure is what one step adds to a training loop: device time or host time, whichever is longer. The copy is a
device-to-device copy of as many bytes, counting what it reads and writes.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from bench.workloads import GROUPS, WORKLOADS, Shapes

STEPS, ROUNDS = 10, 9
DRY_TENSORS, DRY_SCALE, DRY_STEPS, DRY_ROUNDS = 6, 256, 1, 2
FP32_BYTES = 28  # read p, g, m, v; write p, m, v


def log(message: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {message}", flush=True)


def run_tests() -> list[dict[str, str]]:
    """Every test of tests/test_gpu.py, as plain functions; then, where there is pytest, the suite on this device."""
    from tests import test_gpu

    results = []
    for name, test in inspect.getmembers(test_gpu, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            test()
            outcome = "passed"
        except Exception:
            outcome = "FAILED"
            traceback.print_exc()
        log(f"{outcome} {name} ({time.perf_counter() - start:.1f} s)")
        results.append({"test": name, "outcome": outcome})
        torch.cuda.empty_cache()
    return results


def run_suite(seconds: int) -> str:
    """The rest of the tests with kernels on this device; the last line pytest prints."""
    files = ("backends", "grouping", "launches", "norms", "clipping", "protocol", "checkpoint", "torch_parity")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command += [f"tests/test_{name}.py" for name in files]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds} s"
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode:
        print(done.stdout[-4000:])
    return lines[-1]


class Timer:
    """Seconds per call over several consecutive calls, by device events; on the CPU, for a dry run, by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(DRY_STEPS):
                call()
            return (time.perf_counter() - start) / DRY_STEPS
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(STEPS):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000 / STEPS


def make_contestants(shapes: Shapes, n_groups: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; each with parameters, gradients and state of its own only where memory allows."""
    import lwadamw

    params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3

    def groups() -> list[dict[str, Any]]:
        return [{"params": params[i::n_groups], "lr": 1e-5 * (1 + i % 28)} for i in range(n_groups)]

    backend = None if device.type == "cuda" else "triton"
    ours = {
        "lwadamw": lwadamw.AdamW(groups(), backend=backend),
        "lwadamw, norms off": lwadamw.AdamW(groups(), backend=backend, norms=False),
        "lwadamw, clip": lwadamw.AdamW(groups(), backend=backend, max_grad_norm=1.0),
    }
    fused = torch.optim.AdamW(groups(), fused=True)
    foreach = torch.optim.AdamW(groups(), foreach=True)
    # All of them step the same tensors, so they can share their moments too: what is timed does not depend on values.
    fused.step()
    for optimizer in (*ours.values(), foreach):
        for p in params:
            optimizer.state[p] = {k: v.clone() if k == "step" else v for k, v in fused.state[p].items()}
    for p in params:
        foreach.state[p]["step"] = foreach.state[p]["step"].cpu()

    def clip_and_fused() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        fused.step()

    steps: dict[str, Callable[[], object]] = {name: optimizer.step for name, optimizer in ours.items()}
    return {
        **steps,
        "torch fused": fused.step,
        "torch foreach": foreach.step,
        "torch clip_grad_norm_ + fused": clip_and_fused,
    }


def make_copy(elements: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy that moves as many bytes as a step does, and how many that is."""
    n = min(elements * FP32_BYTES // 8, 2**31)
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8 * n


def measure(name: str, device: torch.device) -> dict[str, Any]:
    shapes = WORKLOADS[name]()
    rounds = ROUNDS
    if device.type == "cpu":
        shapes = [tuple(max(1, n // DRY_SCALE) for n in shape if n < 2**20) for shape in shapes[:DRY_TENSORS]]
        rounds = DRY_ROUNDS
    n_groups = min(GROUPS[name], len(shapes))
    elements = sum(math.prod(shape) for shape in shapes)
    log(f"{name}: {len(shapes)} tensors, {elements:,} elements, {n_groups} groups")
    timer = Timer(device)
    contestants = make_contestants(shapes, n_groups, device)
    copy, copy_bytes = make_copy(elements, device)
    seconds: dict[str, list[float]] = {"copy": [], **{key: [] for key in contestants}}
    for round_ in range(rounds + 1):
        for key, call in {"copy": copy, **contestants}.items():
            value = timer(call)
            if round_:  # the first compiles and warms up
                seconds[key].append(value)
    bandwidth = copy_bytes / statistics.median(seconds.pop("copy"))
    fused = statistics.median(seconds["torch fused"])
    rows = {}
    for key, values in seconds.items():
        p20, p50, p80 = (
            statistics.quantiles(values, n=10)[1],
            statistics.median(values),
            statistics.quantiles(values, n=10)[7],
        )
        moved = elements * (FP32_BYTES + (4 if "clip" in key else 0) + (8 if "clip_grad" in key else 0))
        rows[key] = {
            "ms": p50 * 1e3,
            "ms_p20": p20 * 1e3,
            "ms_p80": p80 * 1e3,
            "bytes": moved,
            "of_copy": moved / p50 / bandwidth,
            "vs_fused": fused / p50,
        }
    return {
        "workload": name,
        "tensors": len(shapes),
        "elements": elements,
        "groups": n_groups,
        "copy_gb_s": bandwidth / 1e9,
        "rows": rows,
    }


def machine(device: torch.device) -> dict[str, str]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    cuda = device.type == "cuda"
    commit = os.environ.get("LWADAMW_COMMIT") or output("git", "rev-parse", "HEAD")
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu (dry run)",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "-",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [f"{'workload':14}{'':32}{'ms':>10}{'p20':>10}{'p80':>10}{'of copy':>10}{'vs fused':>10}"]
    for result in results:
        title = f"{result['workload']:14}"
        for name, row in result["rows"].items():
            figures = f"{row['ms']:10.3f}{row['ms_p20']:10.3f}{row['ms_p80']:10.3f}"
            lines.append(f"{title}{name:32}{figures}{row['of_copy']:9.1%} {row['vs_fused']:9.2f}x")
            title = " " * 14
        lines.append(
            f"{title}copy {result['copy_gb_s']:.0f} GB/s; {result['tensors']} tensors in {result['groups']} groups"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder for the JSON")
    parser.add_argument("--only", choices=("tests", "suite", "bench"), help="one part instead of all")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--suite-seconds", type=int, default=200, help="time limit of the pytest part")
    parser.add_argument(
        "--dry-run", action="store_true", help="on the CPU, on a few small tensors: does the script run?"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.dry_run:
        sys.exit("bench.gpu: torch sees no GPU here. --dry-run tries the script out on the CPU.")
    device = torch.device("cpu" if arguments.dry_run else "cuda")

    record: dict[str, Any] = {"machine": machine(device), "steps": STEPS, "rounds": ROUNDS}
    if arguments.only in (None, "tests") and not arguments.dry_run:
        record["tests"] = run_tests()
    if arguments.only in (None, "suite") and not arguments.dry_run:
        record["suite"] = run_suite(arguments.suite_seconds)
        log(record["suite"])
    if arguments.only in (None, "bench"):
        record["results"] = []
        for name in arguments.workloads:
            record["results"].append(measure(name, device))
            if device.type == "cuda":
                torch.cuda.empty_cache()

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"gpu_{record['machine']['device'].split('(')[0].strip().replace(' ', '_').lower()}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(" ".join(f"{k} {v}" for k, v in record["machine"].items()))
    failed = [t["test"] for t in record.get("tests", ()) if t["outcome"] != "passed"]
    if "tests" in record:
        print(f"GPU tests: {len(record['tests']) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}")
    if "suite" in record:
        print(f"suite: {record['suite']}")
    print(table(record.get("results", [])))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
