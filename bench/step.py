"""Time of an optimizer step: this package and its peers in one process, on the same tensors, in turn.

    python -m bench.step                                       # on a GPU: all its workloads; on a CPU: cpu_30m
    python -m bench.step --workloads llama_1b --groups 28 --peers fused,foreach --json step.json
    python -m bench.step --storage all --workloads llama_1b    # every storage combination of lwadamw/combinations.py
    python -m bench.step --base HEAD~1                         # and the package as it was then

In every round each contestant takes several consecutive steps, between two device events on a GPU, by the clock on a CPU,
so a figure is what a step adds to a training loop: time on the device or on the host, whichever is longer. Gradients stay
where they are; `bench.host` measures what it costs when they move.

    bytes       what the implementation reads and writes of p, g, m, v and what else it keeps: of float32, 28 per parameter
                in one pass
    of copy     bytes per second over those of a copy on the same device that moves as many bytes as a step, in the same rounds;
                on a CPU a copy also fetches the lines it overwrites, so an update in place may exceed it
    vs fused    torch fused's time over this one's, both with the same groups: the median over rounds. Torch fused keeps
                everything in the parameter's type, whatever the combination
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from bench import harness, peers, revision
from bench.workloads import FOR_CPU, FOR_GPU, WORKLOADS, Workload, make_params
from lwadamw.state.combinations import COMBINATIONS

ROUNDS = 15
SECONDS = 45.0
TURN = {"cuda": 0.06, "cpu": 0.1}  # seconds of a contestant's turn, about
DRY_LENGTH = 64  # so that a matrix is large enough for 8-bit moments
COPY_MEMORY = 0.2  # share of the device's free memory that the copy's two buffers take at most


def make_copy(n_bytes: float, device: torch.device) -> tuple[Any, int]:
    """A copy that moves so many bytes, as a step does, where memory allows, and how many it moves."""
    n = int(n_bytes) // 8
    n = min(n, int(torch.cuda.mem_get_info(device)[0] * COPY_MEMORY) // 8 if device.type == "cuda" else 2**27)
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 8 * n


def measure(
    workload: Workload,
    n_groups: int,
    device: torch.device,
    *,
    storage: str = "fp32",
    backend: str | None = None,
    wanted: Sequence[str] | None = None,
    rounds: int = ROUNDS,
    seconds: float | None = None,
    base: tuple[str, ModuleType] | None = None,
) -> dict[str, Any]:
    """One workload in one number of groups.

    Args:
        storage: a key of COMBINATIONS.
        backend: this package's; None lets it choose.
        wanted: keys of peers.PEERS; None: all.
        seconds: ends the rounds early.
        base: another revision and its package.
    """
    import lwadamw

    field = peers.Field(make_params(workload, device, COMBINATIONS[storage].param), n_groups, storage)
    entered, missing = peers.peers(field, wanted)
    entered = {**peers.ours(field, lwadamw, backend), **entered}
    if base is not None:
        label = f"lwadamw at {base[0]}"
        try:
            entered |= peers.ours(field, base[1], backend, label)
        except TypeError as error:  # an argument it does not know
            missing[label] = str(error)
    copy, copied = make_copy(workload.elements * field.bytes_per_element, device)
    calls = {"copy": copy, **{name: contestant.step for name, contestant in entered.items()}}
    timer = harness.Timer(device, seconds=TURN[device.type])
    times = harness.interleaved(timer, calls, rounds, seconds)
    bandwidth = copied / harness.quantiles(times["copy"])["p50"]
    rows = {}
    for name, contestant in entered.items():
        moved = round(workload.elements * contestant.bytes_per_element)
        time = harness.quantiles(times[name])
        rows[name] = {
            "ms": {key: value * 1e3 for key, value in time.items()},
            "bytes": moved,
            "of_copy": moved / time["p50"] / bandwidth,
            "vs_fused": harness.ratio(times, name, peers.FUSED),
        }
    return {
        "workload": workload.name,
        "storage": storage,
        "tensors": len(workload.shapes),
        "elements": workload.elements,
        "groups": n_groups,
        "rounds": len(times["copy"]),
        "copy_gb_s": bandwidth / 1e9,
        "copy_bytes": copied,
        "rows": rows,
        "missing": missing,
    }


def run(
    names: Sequence[str],
    device: torch.device,
    groups: int | None = None,
    *,
    storages: Sequence[str] = ("fp32",),
    dry: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """`measure` every workload in every storage and number of groups, printing each table as it is done."""
    results = []
    for name, storage in itertools.product(names, storages):
        workload = WORKLOADS[name].shrunk(length=DRY_LENGTH) if dry else WORKLOADS[name]
        for n_groups in workload.counts(groups):
            results.append(measure(workload, n_groups, device, storage=storage, **options))
            print(f"\n{tables(results[-1:])}", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return results


def tables(results: Sequence[dict[str, Any]]) -> str:
    out: list[str] = []
    for result in results:
        stored = "" if result["storage"] == "fp32" else f"{result['storage']}: "
        title = f"{stored}{result['workload']}, {result['tensors']:,} tensors, {result['elements']:,} elements, "
        title += f"{result['groups']} group{'s' * (result['groups'] != 1)}"
        rows = []
        for name, row in result["rows"].items():
            ms = [f"{row['ms'][p]:.3f}" for p in ("p20", "p50", "p80")]
            rows.append([name, *ms, f"{row['bytes'] / 1e9:.3f}", f"{row['of_copy']:.1%}", f"{row['vs_fused']:.2f}x"])
        out.append(harness.table([title, "ms p20", "p50", "p80", "GB", "of copy", "vs fused"], rows))
        out.append(f"copy: {result['copy_gb_s']:.1f} GB/s; {result['rounds']} rounds")
        by_reason: dict[str, list[str]] = {}
        for name, reason in result["missing"].items():
            by_reason.setdefault(reason, []).append(name)
        out += [f"without {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return "\n".join(out)


def parse() -> argparse.Namespace:
    parser = harness.parser_for(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="default: all of the device's kind")
    combinations = f"some of {', '.join(map(repr, COMBINATIONS))}, or 'all'; default: fp32"
    parser.add_argument("--storage", nargs="+", default=["fp32"], metavar="NAME", help=combinations)
    parser.add_argument("--groups", type=int, help="this many groups instead of the workload's own; 0: one per tensor")
    parser.add_argument("--backend", choices=("triton", "torch"), help="lwadamw's; default on a CPU: torch")
    parser.add_argument("--peers", help=f"some of {','.join(peers.PEERS)}, with commas; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    limit = "end the rounds of each table after so long, but not before the third"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"{limit}; default: {SECONDS:.0f}")
    parser.add_argument("--base", metavar="REV", help="also measure this git revision of lwadamw")
    arguments = parser.parse_args()
    unknown = set(arguments.peers.split(",")) - set(peers.PEERS) if arguments.peers else None
    if unknown:
        parser.error(f"--peers: {', '.join(sorted(unknown))} not in {', '.join(peers.PEERS)}")
    if arguments.storage == ["all"]:
        arguments.storage = list(COMBINATIONS)
    unknown = set(arguments.storage) - COMBINATIONS.keys()
    if unknown:
        parser.error(f"--storage: {', '.join(map(repr, unknown))} not in {', '.join(map(repr, COMBINATIONS))}")
    return arguments


def main() -> None:
    arguments = parse()
    device = harness.choose_device(arguments.device)
    base = revision.load_or_exit(arguments.base)
    results = run(
        arguments.workloads or (FOR_CPU if device.type == "cpu" else FOR_GPU),
        device,
        arguments.groups,
        storages=arguments.storage,
        dry=arguments.dry_run,
        backend=arguments.backend or ("torch" if device.type == "cpu" else None),
        wanted=arguments.peers.split(",") if arguments.peers else None,
        rounds=2 if arguments.dry_run else arguments.rounds,
        seconds=arguments.seconds,
        base=None if base is None else (arguments.base, base),
    )
    harness.finish(arguments.json, "bench.step", device, {"results": results})


if __name__ == "__main__":
    main()
