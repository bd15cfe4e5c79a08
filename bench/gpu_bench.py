"""All benchmarks that need a GPU, the goals of the project first, one JSON file and one short table.

    make gpu-bench                                  # or: python -m bench.gpu_bench --out results
    make gpu-bench MINUTES=9                        # or: python -m bench.gpu_bench --minutes 9
    python -m bench.gpu_bench --only step host --workloads llama_1b

It needs torch, triton and numpy. It needs no pytest, no git, no network and no other files. LWADAMW_COMMIT names the commit
where there is no git. Peers that are not installed can be carried in a folder of PYTHONPATH. The docstrings of bench.step,
bench.host, bench.memory, bench.train and bench.monitor say what is measured, and how.

The work is a list of units, such as one workload of bench.step in one number of groups. The first ones answer the goals of
bench.goals. The JSON file is written again after each unit, with the states of the GPU that were seen during the unit: clocks,
power, temperature and reasons for throttling. If a unit fails, its error is recorded, and the others still run. After
--minutes the command ends, also in the middle of a unit.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import goals, gpu_state, harness, host, memory, monitor, peers, step, train
from bench.harness import log
from bench.workloads import WORKLOADS
from lwadamw.state.combinations import COMBINATIONS

PARTS = ("step", "storage", "host", "train", "compile", "memory", "monitor")
MINUTES = 6.5
TABLE_SECONDS = 5.0  # time for the rounds of one table of bench.step
STORAGE_WORKLOAD, STORAGE_SECONDS = "llama_1b", 2.5
STORAGE_PEERS = ("fused_mixed", "fused_copies", "optimi", "flashoptim", "torchao", "bitsandbytes")
# torch.compile is measured on these, apart from the other peers: it compiles for long.
COMPILED = ("llama_1b", "one_huge")
HOST_GROUPS, HOST_TENSORS, HOST_ROUNDS = (1, 28, 500), 500, 10
TRAIN_ROUNDS, MONITOR_ROUNDS = 6, 10
FIRST = ("llama_1b", "one_huge", "vit_465")  # the goals are about these
THEN = ("gpt2_124m", "many_small")
LAST = ("llama_7b_shard", "mixtral_experts")
ALL = (*FIRST, *THEN, *LAST)


class Unit(NamedTuple):
    """A piece of work that ends with a result.

    Attributes:
        part: one of PARTS.
        name: what the log calls it.
        measure: does the work. A list is added to the results of the part, anything else is the result of the part.
    """

    part: str
    name: str
    measure: Callable[[], Any]


def units(device: torch.device, workloads: Sequence[str], dry: bool) -> list[Unit]:
    """Return all pieces of work, the largest questions first.

    Args:
        device: what to measure.
        workloads: keys of WORKLOADS, for bench.step and bench.memory.
        dry: use tiny sizes.
    """

    def steps(names: Sequence[str]) -> list[Unit]:
        found = [(name, n) for name in names if name in workloads for n in _groups(name, dry)]
        return [Unit("step", f"{WORKLOADS[w]}, groups: {n}", partial(run_step, w, n, device, dry)) for w, n in found]

    def storages(names: Sequence[str]) -> list[Unit]:
        return [Unit("storage", name, partial(run_storage, name, device, dry)) for name in names]

    others = [name for name in workloads if name not in ALL]
    rest = [name for name in COMBINATIONS if name != "fp32" and name not in goals.CODED]  # bench.step measures fp32
    return [
        *steps(FIRST),
        *storages(goals.CODED),
        Unit("host", "host", partial(run_host, device, dry)),
        *storages(rest),
        Unit("train", "train", partial(run_train, device, dry)),
        *steps((*THEN, *others)),
        *(
            Unit("compile", name, partial(run_compile, name, device, dry))
            for name in ([] if dry else COMPILED)
            if name in workloads
        ),
        *steps(LAST),
        Unit("memory", "memory", partial(run_memory, workloads, device, dry)),
        Unit("monitor", "monitor", partial(run_monitor, device, dry)),
    ]


def _groups(name: str, dry: bool) -> list[int]:
    return [1] if dry else WORKLOADS[name].counts()


def run_step(name: str, n_groups: int, device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.step on one workload in one number of groups, with every peer but torch.compile."""
    options: dict[str, Any] = {"rounds": 2} if dry else {"seconds": TABLE_SECONDS}
    options |= {"backend": "triton", "wanted": [key for key in peers.PEERS if key != "compile"]}
    return step.run([name], device, n_groups, dry=dry, **options)


def run_compile(name: str, device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.step on one workload in one group, with torch fused and torch.compile."""
    return step.run([name], device, 1, dry=dry, backend="triton", wanted=["compile"], seconds=TABLE_SECONDS)


def run_storage(name: str, device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.step on one workload in one group, for one storage combination."""
    # The default backend would fall back to torch where the kernels cannot run. Interpreted, they would take minutes.
    options: dict[str, Any] = (
        {"backend": "torch", "rounds": 2} if dry else {"backend": "triton", "seconds": STORAGE_SECONDS}
    )
    options |= {"storages": [name], "wanted": STORAGE_PEERS}
    return step.run([STORAGE_WORKLOAD], device, 1, dry=dry, **options)


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
    config = train.config_for(device, dry)
    result = train.measure(device, config if dry else {**config, "rounds": TRAIN_ROUNDS})
    print(f"\n{train.table(result)}\n")
    return result


def run_monitor(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.monitor and print its table."""
    config = monitor.DRY if dry else {**monitor.GPU, "rounds": MONITOR_ROUNDS}
    results = [monitor.measure(device, config, width) for width in config["widths"]]
    print(f"\n{monitor.table(results, config)}\n")
    return results


def storage_lines(results: list[dict[str, Any]]) -> list[str]:
    """Four storage combinations a line: milliseconds and share of a copy's bandwidth."""
    cells = []
    for result in results:
        ours = result["rows"]["lwadamw"]
        cells.append(f"{result['storage']}: {ours['ms']['p50']:.3f} ms, {ours['of_copy']:.1%} of copy")
    return ["; ".join(cells[i : i + 4]) for i in range(0, len(cells), 4)]


def step_table(results: list[dict[str, Any]]) -> str:
    """A row for each result of bench.step."""
    rows = []
    for result in results:
        ours, others = result["rows"]["lwadamw"], result["rows"]

        def over(name: str, reference: str, others: dict[str, Any] = others) -> str:
            if name not in others or reference not in others:
                return "-"
            return f"{others[reference]['ms']['p50'] / others[name]['ms']['p50']:.2f}x"

        ms = f"{ours['ms']['p50']:.3f}"
        figures = [f"{ours['of_copy']:.1%}", f"{ours['vs_fused']:.2f}x", over("lwadamw", goals.OFF)]
        figures.append(over(goals.CLIPPED, goals.USUAL))
        rows.append([result["workload"], result["groups"], result["tensors"], ms, *figures])
    header = ["step", "groups", "tensors", "lwadamw ms", "of copy", "vs fused", "vs norms off", "clip+norms vs usual"]
    return harness.table(header, rows)


def host_line(columns: list[dict[str, Any]]) -> str:
    """Host time in every number of groups, and how many times faster it is than torch's."""
    cells = []
    for column in columns:
        us = column["us"]
        wanted = [name for name in ("lwadamw", "lwadamw, launched", "lwadamw, graph replay") if name in us]
        told = [f"{n} {us[n]['p50']:.0f} us ({us[host.reference(n, us)]['p50'] / us[n]['p50']:.1f}x)" for n in wanted]
        cells.append(f"groups {column['groups']}: {', '.join(told)}")
    return f"host, {'; '.join(cells)}"


def summary(record: dict[str, Any]) -> str:
    """The most important results of a record, the goals first, in at most 30 lines."""
    lines = [goal.line() for goal in goals.goals(record)]
    if record.get("step"):
        lines.append(step_table(record["step"]))
    if record.get("compile"):
        name = peers.PEERS["compile"][0]
        rows = {r["workload"]: r["rows"] for r in record["compile"]}
        cells = [f"{w} {r[name]['vs_fused']:.2f}x" if name in r else f"{w} failed" for w, r in rows.items()]
        lines.append(f"{name}, vs fused: {', '.join(cells)}")
    if record.get("storage"):
        lines += storage_lines(record["storage"])
    if record.get("host"):
        lines.append(host_line(record["host"]["columns"]))
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
    if record["errors"]:
        lines.append(f"errors: {'; '.join(f'{unit}: {error[:100]}' for unit, error in record['errors'].items())}")
    if record["left_out"]:
        lines.append(f"no time left for {'; '.join(record['left_out'])}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=harness.ROOT / "bench/results", help="folder for the JSON file")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="run only these parts")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=ALL, help="of step and memory")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the command ends after this time")
    parser.add_argument(
        "--dry-run", action="store_true", help="use the CPU and a few small tensors, to check that the script runs"
    )
    return parser.parse_args()


def main() -> None:
    """Run the units, write the JSON file and print the summary."""
    arguments = parse()
    dry = arguments.dry_run
    device = harness.choose_device("cpu" if dry else "cuda")
    begin = time.monotonic()
    described = harness.machine(device)
    name = "dry_run" if dry else "gpu_" + described["device"].replace(" ", "_").lower()
    path = arguments.out / f"{name}.json"
    record: dict[str, Any] = {"command": harness.command_line("bench.gpu_bench"), "machine": described}
    record |= {"errors": {}, "left_out": [], "states": {"before": gpu_state.read(device)}}
    record["reports"] = json.loads(harness.CODE.read_text())["reports"]  # what bench.predict compares the times with
    left = {_label(unit): unit for unit in units(device, arguments.workloads, dry) if unit.part in arguments.only}

    def tell() -> int:
        record["left_out"] = list(left)
        harness.write_json(path, record)
        log(f"done after {time.monotonic() - begin:.0f} s: {path}")
        print(f"\n{summary(record)}\n{harness.one_line(described)}")
        return min(len(record["errors"]), 1)

    limit = harness.Limit(arguments.minutes, tell)
    for label, unit in list(left.items()):
        start = time.monotonic()
        log(f"{label}, after {start - begin:.0f} s")
        states: dict[str, Any] = {}
        try:
            with gpu_state.watched(device) as states:
                result = unit.measure()
            record[unit.part] = [*record.get(unit.part, []), *result] if isinstance(result, list) else result
        except Exception as error:
            traceback.print_exc()
            record["errors"][label] = f"{type(error).__name__}: {error}"
        record["states"][label] = {"seconds": time.monotonic() - start, **states}
        del left[label]
        gc.collect()  # What a failed unit held has to make room for the next one.
        if device.type == "cuda":
            torch.cuda.empty_cache()
        harness.write_json(path, record)
    limit.cancel()
    if tell():
        sys.exit(1)


def _label(unit: Unit) -> str:
    return unit.part if unit.name == unit.part else f"{unit.part}: {unit.name}"


if __name__ == "__main__":
    main()
