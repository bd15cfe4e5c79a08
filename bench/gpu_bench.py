"""All benchmarks that need a GPU, the largest questions first, one JSON file and one short table.

    make gpu-bench                                  # or: python -m bench.gpu_bench --out results
    python -m bench.gpu_bench --only step host --workloads llama_1b

It takes less than 9 minutes on an H200. It needs torch, triton and numpy. It needs no pytest, no git, no network and no other
files. LWADAMW_COMMIT names the commit where there is no git. Peers that are not installed can be carried in a folder of
PYTHONPATH. The docstrings of bench.step, bench.host, bench.memory, bench.train and bench.monitor say what is measured, and how.

The work is a list of units, such as one workload of bench.step. The JSON file is written again after each unit, with the state
of the GPU at that moment: clocks, power, temperature and reasons for throttling. If a unit fails, its error is recorded, and
the others still run. When the time is over, no further unit starts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import harness, host, memory, monitor, peers, predict, step, train
from bench.harness import log
from bench.workloads import WORKLOADS
from lwadamw.state.combinations import COMBINATIONS

PARTS = ("step", "storage", "host", "memory", "train", "monitor")
MINUTES = 8.7
TABLE_SECONDS = 8.0  # time for the rounds of one table of bench.step
STORAGE_WORKLOAD, STORAGE_SECONDS = "llama_1b", 3.0
STORAGE_PEERS = ("fused_mixed", "fused_copies", "optimi", "flashoptim", "torchao", "bitsandbytes")
HOST_GROUPS, HOST_TENSORS, HOST_ROUNDS = (1, 28, 500), 500, 20
FIRST = ("one_huge", "llama_1b", "gpt2_124m", "vit_465", "many_small")  # before the other parts
LAST = ("llama_7b_shard", "mixtral_experts")


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


def units(device: torch.device, workloads: list[str], dry: bool) -> list[Unit]:
    """Return all pieces of work, the largest questions first.

    Args:
        device: what to measure.
        workloads: keys of WORKLOADS, for bench.step and bench.memory.
        dry: use tiny sizes.
    """
    first = [name for name in FIRST if name in workloads]
    last = [name for name in workloads if name not in first]
    storages = [name for name in COMBINATIONS if name != "fp32"]  # bench.step measures fp32
    return [
        *(Unit("step", str(WORKLOADS[name]), partial(run_step, name, device, dry)) for name in first),
        *(Unit("storage", name, partial(run_storage, name, device, dry)) for name in storages),
        Unit("host", "host", partial(run_host, device, dry)),
        *(Unit("step", str(WORKLOADS[name]), partial(run_step, name, device, dry)) for name in last),
        Unit("memory", "memory", partial(run_memory, workloads, device, dry)),
        Unit("train", "train", partial(run_train, device, dry)),
        Unit("monitor", "monitor", partial(run_monitor, device, dry)),
    ]


def run_step(name: str, device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.step on one workload, in every number of groups."""
    options: dict[str, Any] = {"backend": "triton", "rounds": 2} if dry else {"seconds": TABLE_SECONDS}
    return step.run([name], device, 1 if dry else None, dry=dry, **options)


def run_storage(name: str, device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.step on one workload in one group, for one storage combination."""
    options: dict[str, Any] = {"backend": "torch", "rounds": 2} if dry else {"seconds": STORAGE_SECONDS}
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
    result = train.measure(device, train.config_for(device, dry))
    print(f"\n{train.table(result)}\n")
    return result


def run_monitor(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """Run bench.monitor and print its table."""
    config = monitor.DRY if dry else monitor.GPU
    results = [monitor.measure(device, config, width) for width in config["widths"]]
    print(f"\n{monitor.table(results, config)}\n")
    return results


def storage_lines(results: list[dict[str, Any]]) -> list[str]:
    """Three storage combinations a line: milliseconds and share of a copy's bandwidth."""
    cells = []
    for result in results:
        ours = result["rows"]["lwadamw"]
        cells.append(f"{result['storage']}: {ours['ms']['p50']:.3f} ms, {ours['of_copy']:.1%} of copy")
    title = f"storage, {results[0]['workload']}"
    return [title, *("; ".join(cells[i : i + 3]) for i in range(0, len(cells), 3))]


def summary(record: dict[str, Any]) -> str:
    """The most important results of a record, in at most 30 lines."""
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
        lines += storage_lines(record["storage"])
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
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*FIRST, *LAST], help="of step and memory")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no unit starts later than this")
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
    record |= {"errors": {}, "left_out": [], "states": {"before": harness.gpu_state(device)}}
    record["reports"] = json.loads(predict.CODE.read_text())["reports"]  # what bench.predict compares the times with
    for unit in units(device, arguments.workloads, dry):
        if unit.part not in arguments.only:
            continue
        label = unit.part if unit.name == unit.part else f"{unit.part}: {unit.name}"
        if time.monotonic() - begin > 60 * arguments.minutes:
            record["left_out"].append(label)
            continue
        log(f"{label}, after {time.monotonic() - begin:.0f} s")
        try:
            result = unit.measure()
            record[unit.part] = [*record.get(unit.part, []), *result] if isinstance(result, list) else result
        except Exception as error:
            traceback.print_exc()
            record["errors"][label] = f"{type(error).__name__}: {error}"
        record["states"][label] = harness.gpu_state(device)
        harness.write_json(path, record)
    log(f"done after {time.monotonic() - begin:.0f} s: {path}")
    print(f"\n{summary(record)}")
    print(harness.one_line(described))
    if record["errors"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
