"""One command for a bare GPU machine: GPU tests, all benchmarks, one JSON file, one short table.

    make gpu                                        # or: python -m bench.gpu --out results
    python -m bench.gpu --only step host --workloads llama_1b

It takes less than 9 minutes on an H200. It needs torch, triton and numpy. It needs no pytest, no git, no network and no other
files. The docstrings of bench.step, bench.host, bench.memory, bench.train and bench.monitor say what is measured, and how.
The part `suite` runs other tests of the project on this device, if pytest is installed, in the time that is left.

If a part fails, its error is recorded and the other parts still run. The JSON file is written again after each part.
"""

from __future__ import annotations

import argparse
import inspect
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import harness, host, memory, monitor, peers, step, train
from bench.harness import log
from bench.workloads import FOR_GPU, WORKLOADS
from lwadamw.state.combinations import COMBINATIONS

PARTS = ("tests", "step", "storage", "host", "memory", "train", "monitor", "suite")
MINUTES = 8.7
TABLE_SECONDS = 8.0  # time for the rounds of one table of bench.step
STORAGE_WORKLOAD, STORAGE_SECONDS = "llama_1b", 3.0
STORAGE_PEERS = ("fused_mixed", "fused_copies", "optimi", "torchao", "bitsandbytes")
HOST_GROUPS, HOST_TENSORS, HOST_ROUNDS = (1, 28, 500), 500, 20
# Test files for the part `suite`, below tests/.
SUITE = (
    "step/test_backends.py",
    "tables/test_grouping.py",
    "tables/test_launches.py",
    "step/test_norms.py",
    "step/test_clipping.py",
    "step/test_protocol.py",
    "tables/test_changes.py",
    "step/test_modes.py",
    "state/test_checkpoint.py",
    "step/test_torch_parity.py",
    "state/test_storage.py",
    "state/test_storage_kernels.py",
    "state/test_gradient_storage.py",
    "state/test_convergence.py",
    "state/test_codes.py",
    "step/test_amp.py",
    "step/test_gradient_release.py",
    "state/test_decay.py",
    "state/test_decay_checkpoint.py",
    "state/test_huber.py",
    "monitor/test_columns.py",
    "monitor/test_monitor.py",
    "monitor/test_resume.py",
)


def gpu_tests() -> list[Callable[[], None]]:
    """The test functions of tests/kernels/test_gpu.py and test_gpu_storage.py. They need no pytest and no fixtures."""
    from tests.kernels import test_gpu, test_gpu_storage

    return [
        function
        for module in (test_gpu, test_gpu_storage)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("test_")
    ]


def run_tests() -> list[dict[str, str]]:
    """Run every GPU test and return the name and the outcome of each."""
    results = []
    for test in gpu_tests():
        name = test.__name__
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


def run_suite(seconds: float) -> str:
    """Run the test files of SUITE on this device for at most `seconds`, and return the last line that pytest prints.

    Tests that fail are printed, one a line. A failure does not end the run: it would hide what comes after it.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default"]
    command += [f"tests/{name}" for name in SUITE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=harness.ROOT)
    except subprocess.TimeoutExpired as expired:
        print((expired.stdout or b"").decode(errors="replace")[-4000:])
        return f"not finished within {seconds:.0f} s"
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    if done.returncode:
        print(done.stdout[-20000:])
    return lines[-1]


def run_step(names: list[str], device: torch.device, dry: bool, end: float) -> list[dict[str, Any]]:
    """Run bench.step on one workload after the other. No workload starts after `end`, in seconds of time.monotonic."""
    results = []
    for name in names:
        if time.monotonic() > end:
            log(f"step: no time left for {name}")
            continue
        log(f"step: {WORKLOADS[name]}")
        options: dict[str, Any] = {"backend": "triton", "rounds": 2} if dry else {"seconds": TABLE_SECONDS}
        results += step.run([name], device, 1 if dry else None, dry=dry, **options)
    return results


def run_storage(device: torch.device, dry: bool, end: float) -> list[dict[str, Any]]:
    """Run bench.step on one workload in one group, for one storage combination after the other.

    The combination "fp32" is left out, because `run_step` measures it. No combination starts after `end`, in seconds of
    time.monotonic.
    """
    results = []
    for name in COMBINATIONS:
        if name == "fp32":
            continue
        if time.monotonic() > end:
            log(f"storage: no time left for {name}")
            continue
        log(f"storage: {name}")
        options: dict[str, Any] = {"backend": "torch", "rounds": 2} if dry else {"seconds": STORAGE_SECONDS}
        options |= {"storages": [name], "wanted": STORAGE_PEERS}
        results += step.run([STORAGE_WORKLOAD], device, 1, dry=dry, **options)
    return results


def run_host(device: torch.device, dry: bool) -> dict[str, Any]:
    """Run bench.host and print its table."""
    result = host.run(30, (1,), 1, device) if dry else host.run(HOST_TENSORS, HOST_GROUPS, HOST_ROUNDS, device)
    print(f"\n{host.table(result['tensors'], result['columns'])}\n")
    return result


def run_memory(names: list[str], device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.memory and print its table."""
    results = memory.run(names, device, dry=dry)
    print(f"\n{memory.table(results)}\n")
    return results


def run_train(device: torch.device, dry: bool) -> dict[str, Any]:
    """Run bench.train and print its table."""
    result = train.measure(device, train.config_for(device, dry))
    print(f"\n{train.table(result)}\n")
    return result


def run_monitor(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.monitor and print its table."""
    config = monitor.DRY if dry else monitor.GPU
    results = [monitor.measure(device, config, width) for width in config["widths"]]
    print(f"\n{monitor.table(results, config)}\n")
    return results


def storage_table(results: list[dict[str, Any]]) -> str:
    """A table with a row for each storage combination of `run_storage`."""
    rows = []
    for result in results:
        ours = result["rows"]["lwadamw"]
        figures = [f"{ours['bytes'] / result['elements']:.2f}", f"{ours['ms']['p50']:.3f}", f"{ours['of_copy']:.1%}"]
        rivals = {name: row for name, row in result["rows"].items() if not name.startswith("lwadamw")}
        cells = [f"{name} {row['ms']['p50'] / ours['ms']['p50']:.2f}x" for name, row in rivals.items()]
        rows.append([result["storage"], *figures, "; ".join(cells)])
    title = f"storage, {results[0]['workload']}"
    return harness.table([title, "bytes per element", "lwadamw ms", "of copy", "faster than"], rows)


def summary(record: dict[str, Any]) -> str:
    """The most important results of a record, as tables and lines."""
    rows = []
    for result in record.get("step") or ():
        ours, others = result["rows"]["lwadamw"], result["rows"]

        def over(name: str, reference: str, others: dict[str, Any] = others) -> str:
            if name not in others or reference not in others:
                return "-"
            return f"{others[reference]['ms']['p50'] / others[name]['ms']['p50']:.2f}x"

        ms = f"{ours['ms']['p50']:.3f}"
        figures = [f"{ours['of_copy']:.1%}", f"{ours['vs_fused']:.2f}x", over("lwadamw", "lwadamw, norms off")]
        usual = over("lwadamw, clipping, norms read", peers.PEERS["usual"][0])
        rows.append([result["workload"], result["groups"], result["tensors"], ms, *figures, usual])
    header = ["step", "groups", "tensors", "lwadamw ms", "of copy", "vs fused", "vs norms off", "clip+norms vs usual"]
    lines = [harness.table(header, rows)] if rows else []
    if record.get("storage"):
        lines.append(storage_table(record["storage"]))
    if record.get("host"):
        for column in record["host"]["columns"]:
            us = column["us"]
            wanted = (name for name in ("lwadamw", "lwadamw, launched", "lwadamw, graph replay") if name in us)
            cells = [
                f"{n} {us[n]['p50']:.0f} us ({us[host.reference(n, us)]['p50'] / us[n]['p50']:.1f}x)" for n in wanted
            ]
            lines.append(f"host, {column['groups']} group{'s' * (column['groups'] != 1)}: {', '.join(cells)}")
    if record.get("memory"):
        checked = [
            (r["workload"], row) for r in record["memory"] for n, row in r["rows"].items() if n.startswith("lwadamw")
        ]
        over_limit = sorted({name for name, row in checked if not row["within"]})
        lines.append(
            f"memory beyond state: over the limit in {', '.join(over_limit) or 'none'} of {len(record['memory'])}"
        )
    if record.get("train"):
        cells = [f"{name} {row['tokens_per_second']['p50']:,.0f}" for name, row in record["train"]["rows"].items()]
        lines.append(f"tokens/s: {'; '.join(cells)}")
    if record.get("monitor"):
        cells = [f"width {r['width']} {r['share']:.2%}" for r in record["monitor"]]
        lines.append(f"monitor, of training time: {', '.join(cells)}")
    return "\n".join(lines)


def verdicts(record: dict[str, Any]) -> list[str]:
    """One line for each part that failed, and one each for the results of the GPU tests and of the suite."""
    failed = [t["test"] for t in record.get("tests") or () if t["outcome"] != "passed"]
    lines = [f"{part} did not run: {error}" for part, error in record["errors"].items()]
    if record.get("tests"):
        lines.append(f"GPU tests: {len(record['tests']) - len(failed)} passed, {len(failed)} failed {' '.join(failed)}")
    if record.get("suite"):
        lines.append(f"suite: {record['suite']}")
    return lines


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=harness.ROOT / "bench/results", help="folder for the JSON file")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run only these parts")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(FOR_GPU), help="of step and memory")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="total time for all parts")
    parser.add_argument(
        "--suite-seconds", type=float, default=200, help="time limit of the part suite, or less if less time is left"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="use the CPU and a few small tensors, to check that the script runs"
    )
    return parser.parse_args()


def main() -> None:
    """Run the parts, write the JSON file and print the summary."""
    arguments = parse()
    dry = arguments.dry_run
    if not torch.cuda.is_available() and not dry:
        sys.exit("bench.gpu: torch sees no GPU on this machine. Use --dry-run to try the script on the CPU.")
    device = harness.choose_device("cpu" if dry else "cuda")
    begin = time.monotonic()
    end = begin + 60 * arguments.minutes

    described = harness.machine(device)
    name = "dry_run" if dry else "gpu_" + described["device"].replace(" ", "_").lower()
    path = arguments.out / f"{name}.json"
    record: dict[str, Any] = {"command": harness.command_line("bench.gpu"), "machine": described, "errors": {}}
    parts: dict[str, Callable[[], Any]] = {
        "tests": run_tests,
        # `step` ends 240 s before the end, so 120 s are left for `storage` and 120 s for the parts after it.
        "step": lambda: run_step(arguments.workloads, device, dry, end - 240),
        "storage": lambda: run_storage(device, dry, end - 120),
        "host": lambda: run_host(device, dry),
        "memory": lambda: run_memory(arguments.workloads, device, dry),
        "train": lambda: run_train(device, dry),
        "monitor": lambda: run_monitor(device, dry),
        "suite": lambda: run_suite(min(arguments.suite_seconds, max(30.0, end - time.monotonic()))),
    }
    for part in PARTS:
        if part not in arguments.only or (dry and part in ("tests", "suite")):
            continue
        log(f"{part}, after {time.monotonic() - begin:.0f} s")
        try:
            record[part] = parts[part]()
        except Exception as error:
            traceback.print_exc()
            record["errors"][part] = f"{type(error).__name__}: {error}"
        harness.write_json(path, record)
    log(f"done after {time.monotonic() - begin:.0f} s: {path}")
    print(f"\n{summary(record)}")
    print("\n".join([*verdicts(record), harness.one_line(described)]))
    if record["errors"] or any(t["outcome"] != "passed" for t in record.get("tests") or ()):
        sys.exit(1)


if __name__ == "__main__":
    main()
