"""Time of an optimizer step: lwadamw and its peers take turns in one process, on the same tensors.

    python -m bench.step                                       # all workloads for this kind of device
    python -m bench.step --workloads llama_1b --groups 28 --peers fused,foreach --json step.json
    python -m bench.step --storage all --workloads llama_1b    # every combination of lwadamw/state/combinations.py
    python -m bench.step --base HEAD~1                         # also the package of another revision

In every round each contestant takes several consecutive steps. They are timed by two device events on a GPU, by the clock on
a CPU. On a GPU one more step comes before the first event, so that the device does not wait for the host of the first step. So
the result is the time that a step adds to a training loop: the time on the device or the time on the host, whichever is longer.
Gradients stay at their addresses. `bench.host` measures the cost of moving them. No cache is flushed: a note under the table
says whether the tensors of a step fit into the L2 cache of the GPU.

    bytes       bytes that the implementation reads and writes, of p, g, m, v and everything else that it keeps. With float32
                and one pass over memory this is 28 per parameter.
    of copy     bytes per second of the step, divided by bytes per second of a copy. The copy runs on the same device in the
                same rounds and moves as many bytes as a step. On a CPU a copy also reads the cache lines that it overwrites,
                so an update in place may be faster than the copy.
    vs fused    time of torch fused / time of this row, both with the same groups: the median over rounds. torch fused keeps
                everything in the type of the parameter, for every storage combination.
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
TURN = {"cuda": 0.06, "cpu": 0.1}  # approximate seconds of one turn of a contestant
DRY_LENGTH = 64  # A matrix of this size is large enough for 8-bit moments.
COPY_MEMORY = 0.2  # both buffers of the copy together take at most this share of the free device memory


def make_copy(n_bytes: float, device: torch.device) -> tuple[Any, int]:
    """Make a copy that moves as many bytes as a step.

    Args:
        n_bytes: bytes that the copy should read and write together.
        device: the device of both buffers.

    Returns:
        A function that copies, and the bytes that it moves. They are fewer than n_bytes if memory is short.
    """
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
    """Measure one workload with one number of groups.

    Args:
        workload: the parameter list.
        n_groups: number of parameter groups.
        device: the device of the parameters.
        storage: a key of COMBINATIONS.
        backend: the backend of lwadamw; None: the default.
        wanted: keys of peers.PEERS; None: all.
        rounds: number of rounds.
        seconds: stop after this time, but not before three rounds are done; None: no limit.
        base: name and package of another revision to measure too.

    Returns:
        The result as it is written to JSON: `rows` by contestant, `missing` with the reasons, and the bandwidth of the copy.
    """
    import lwadamw

    field = peers.Field(make_params(workload, device, COMBINATIONS[storage].param), n_groups, storage)
    entered, missing = peers.peers(field, wanted)
    entered = {**peers.ours(field, lwadamw, backend), **entered}
    if base is not None:
        label = f"lwadamw at {base[0]}"
        try:
            entered |= peers.ours(field, base[1], backend, label)
        except TypeError as error:  # The other revision does not know an argument.
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
        "notes": _notes(field, device),
        "rows": rows,
        "missing": missing,
    }


def _notes(field: peers.Field, device: torch.device) -> list[str]:
    """What a reader has to know about the figures of this device and this version of torch."""
    if device.type != "cuda":
        return []
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    held = sum(p.numel() for p in field.params) * field.bytes_per_element / 2  # most of it is read and written
    notes = [
        f"the tensors of a step {'fit into' if held < cache else 'are larger than'} the L2 cache ({cache >> 20} MiB)"
    ]
    if torch.__version__ < (2, 12):
        notes.append(
            "torch fused of 2.12 and later, on CUDA 13, launches fewer kernels than this version: larger arguments"
        )
    return notes


def run(
    names: Sequence[str],
    device: torch.device,
    groups: int | None = None,
    *,
    storages: Sequence[str] = ("fp32",),
    dry: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Run `measure` on every workload, storage combination and number of groups, and print each table.

    Args:
        names: keys of WORKLOADS.
        device: the device of the parameters.
        groups: number of groups; None: the numbers of the workload; 0: one group per tensor.
        storages: keys of COMBINATIONS.
        dry: use tiny sizes.
        **options: further arguments of `measure`.
    """
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
    """A table for each result, with notes about the copy and the missing contestants."""
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
        out += result["notes"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in result["missing"].items():
            by_reason.setdefault(reason, []).append(name)
        out += [f"without {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return "\n".join(out)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = harness.parser_for(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, help="default: all for this kind of device")
    combinations = f"any of {', '.join(map(repr, COMBINATIONS))}, or 'all'; default: fp32"
    parser.add_argument("--storage", nargs="+", default=["fp32"], metavar="NAME", help=combinations)
    parser.add_argument(
        "--groups", type=int, help="number of groups; 0: one group per tensor; default: see bench.workloads"
    )
    parser.add_argument("--backend", choices=("triton", "torch"), help="backend of lwadamw; default on a CPU: torch")
    parser.add_argument("--peers", help=f"any of {','.join(peers.PEERS)}, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    limit = "stop the rounds of a table after this time, but not before three are done"
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
    """Measure, print the tables and write the JSON file."""
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
