"""Compares launch constants of csrc_triton/layout.py. Each candidate is the package with some constants replaced.

    make gpu-tune                                     # or: python -m bench.tune
    make gpu-tune MINUTES=8                           # or: python -m bench.tune --minutes 8
    python -m bench.tune --workloads one_huge --only "block 2048" "tail 512"
    python -m bench.tune --storages "bf16, remainder, 8-bit moments" --only "2 stages"

All candidates of a workload and a storage step the same tensors in one process, in turn. A candidate wins if it is faster on
every workload of a storage, by more than the spread from p20 to p80 of its ratio to the present constants. The winner is
printed as the lines of layout.py to paste, with its gain. The other candidates are written to LOG.md. Whether a candidate
spills registers, and how many programs fit, is a question for `bench.codegen`.

On a GPU, the kernels of all candidates are compiled first, in a process for each candidate; Triton keeps what it has compiled
in a folder that all processes share. Then comes the first workload in every storage, then the next workload. After --minutes
the command ends with what it has.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import harness, peers, revision
from bench.step import make_copy
from bench.workloads import WORKLOADS, Workload, make_params
from lwadamw.state.combinations import COMBINATIONS

AS_IT_IS = "as it is"
# Key: the name of a candidate. Value: the constants that it replaces.
CANDIDATES: dict[str, dict[str, object]] = {
    AS_IT_IS: {},
    "2 stages": {"STAGES": 2},
    "3 stages": {"STAGES": 3},
    "1 stage of 8-bit moments": {"CODED_STAGES": 1},
    "3 stages of 8-bit moments": {"CODED_STAGES": 3},
    "3 stages of 8-bit moments without spills": {"CODED_STAGES": 3, "DOUBLE_REGISTERS": 96, "RANDOM_REGISTERS": 80},
    "tail 512": {"TAIL": 512},
    "block 512": {"BLOCK": 512},
    "block 2048": {"BLOCK": 2048},
    "block 512 and 4 warps": {"BLOCK": 512, "THREADS": 128},
    "block 2048 and 16 warps": {"BLOCK": 2048, "THREADS": 512, "TAIL": 512},
    "4 programs of twice the block": {"DOUBLE_REGISTERS": 64},
    "3 programs of random ones": {"RANDOM_REGISTERS": 80},
    "gradient block 4096": {"GRAD_BLOCK": 4096},
    "gradient block 8192": {"GRAD_BLOCK": 8192},
    "chunks up to 8192": {"MAX_CHUNK": 8192},
    "chunks up to 65536": {"MAX_CHUNK": 65536},
    "chunks from 4096": {"MIN_CHUNK": 4096},
    "loads .cg": {"LOAD_CACHE": ".cg"},
    "loads evict first": {"LOAD_EVICTION": "evict_first"},
    "stores evict first": {"STORE_EVICTION": "evict_first"},
    "all evict first": {"LOAD_EVICTION": "evict_first", "STORE_EVICTION": "evict_first"},
}
# Chunks count on small models, bytes in flight on large ones.
WORKLOADS_TO_TUNE = ("llama_1b", "gpt2_124m", "cpu_30m")
STORAGES_TO_TUNE = ("fp32", "bf16, remainder, bf16 moments", "bf16, stochastic, 8-bit moments")
MINUTES = 2.0
ROUNDS = 8
COMPILE_SECONDS = 60.0  # at most
_numbers = itertools.count()


def variant(constants: Mapping[str, object]) -> ModuleType:
    """Import the package of the working tree under a new name, with replaced constants.

    Args:
        constants: new values, by name of the constant in layout.py.

    Raises:
        ValueError: layout.py does not define one of the constants.
    """
    text = (harness.ROOT / "csrc_triton" / "layout.py").read_text()
    for constant, value in constants.items():
        text, replaced = re.subn(rf"^{constant} = .*$", f"{constant} = {value!r}", text, flags=re.MULTILINE)
        if replaced != 1:
            raise ValueError(f"layout.py defines no constant {constant}. Check its name in csrc_triton/layout.py.")
    folder = tempfile.TemporaryDirectory(prefix="lwadamw_variant_")
    for part in ("csrc_triton", "lwadamw"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(harness.ROOT / part, Path(folder.name) / part, symlinks=True, ignore=ignored)
    (Path(folder.name) / "csrc_triton" / "layout.py").write_text(text)
    return revision.import_from(folder, f"lwadamw_variant_{next(_numbers)}")


def contestants(field: peers.Field, packages: Mapping[str, ModuleType]) -> dict[str, peers.Contestant]:
    """Every candidate without and with clipping, by name. Norms are on. Each has taken a step.

    A candidate that cannot be compiled or launched is logged and left out.

    Args:
        field: the parameters.
        packages: the packages, by name of the candidate.
    """
    entered = {}
    for name, package in packages.items():
        entrants = peers.ours(field, package, "triton", name)
        pair = {key: entrants[key] for key in (name, f"{name}, clipping")}
        try:
            for contestant in pair.values():
                contestant.step()
        except Exception as error:  # Whatever the compiler or the driver says about this one, the others are measured.
            if name == AS_IT_IS:
                raise
            harness.log(f"{name} fails: {type(error).__name__}: {str(error).strip()[:200]}")
            continue
        entered |= pair
    return entered


def measure(
    workload_name: str,
    packages: Mapping[str, ModuleType],
    device: torch.device,
    *,
    dry: bool,
    rounds: int,
    storage: str = "fp32",
) -> dict[str, Any]:
    """Measure every candidate on one workload, see `contestants`.

    Args:
        workload_name: a key of WORKLOADS.
        packages: the packages, by name of the candidate. The first one is the reference.
        device: the device of the parameters.
        dry: use tiny sizes.
        rounds: number of rounds.
        storage: a key of COMBINATIONS.

    Returns:
        The result as it is written to JSON, with `rows` by candidate.
    """
    workload = WORKLOADS[workload_name].shrunk() if dry else WORKLOADS[workload_name]
    field = peers.Field(make_params(workload, device, COMBINATIONS[storage].param), 1, storage)
    entered = contestants(field, packages)
    copy, copied = make_copy(workload.elements * field.bytes_per_element, device)
    calls = {"copy": copy, **{name: contestant.step for name, contestant in entered.items()}}
    times = harness.interleaved(harness.Timer(device, seconds=0.03), calls, rounds)
    bandwidth = copied / harness.quantiles(times["copy"])["p50"]
    first = next(iter(packages))
    rows = {}
    for name, contestant in entered.items():
        quantiles = harness.quantiles(times[name])
        reference = f"{first}, clipping" if name.endswith(", clipping") else first
        ratios = [r / t for r, t in zip(times[reference], times[name], strict=True)]
        rows[name] = {
            "ms": {key: value * 1e3 for key, value in quantiles.items()},
            "of_copy": workload.elements * contestant.bytes_per_element / quantiles["p50"] / bandwidth,
            "vs_first": harness.quantiles(ratios),
        }
    return {"workload": workload.name, "storage": storage, "copy_gb_s": bandwidth / 1e9, "rows": rows}


def winners(results: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the best candidate of each storage that is certainly faster than the constants as they are.

    Args:
        results: what `measure` returned, for one or more workloads of each storage.

    Returns:
        By storage: the name of the candidate and its gain on each workload, as quantiles of the ratio. A storage without a
        winner is left out.
    """
    out = {}
    for storage in dict.fromkeys(result["storage"] for result in results):
        own = {r["workload"]: r["rows"] for r in results if r["storage"] == storage}
        names = [n for n in CANDIDATES if n != AS_IT_IS and all(n in rows for rows in own.values())]
        gains = {name: {w: rows[name]["vs_first"] for w, rows in own.items()} for name in names}
        certain = {name: g for name, g in gains.items() if all(ratio["p20"] > 1 for ratio in g.values())}
        if certain:
            best = max(certain, key=lambda name: min(ratio["p50"] for ratio in certain[name].values()))
            out[storage] = best, certain[best]
    return out


def advice(results: Sequence[Mapping[str, Any]]) -> str:
    """The lines of layout.py to paste for each storage, with the gain, or the statement that nothing is certainly faster."""
    won, lines = winners(results), []
    for storage in dict.fromkeys(result["storage"] for result in results):
        if storage not in won:
            lines.append(f"{storage}: no candidate is certainly faster on every workload. Change nothing.")
            continue
        name, gain = won[storage]
        told = ", ".join(f"{w} {r['p50']:.3f}x ({r['p20']:.3f} to {r['p80']:.3f})" for w, r in gain.items())
        lines.append(f"{storage}: {name}, {told}")
        lines += [f"    {constant} = {value!r}" for constant, value in CANDIDATES[name].items()]
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """A table with a row for each candidate, the fastest first."""
    rows = [
        [
            name,
            *[f"{row['ms'][p]:.4f}" for p in ("p20", "p50", "p80")],
            f"{row['of_copy']:.1%}",
            f"{row['vs_first']['p50']:.3f}x",
        ]
        for name, row in sorted(result["rows"].items(), key=lambda item: item[1]["ms"]["p50"])
    ]
    title = f"{result['workload']}, {result['storage']}"
    return harness.table([title, "ms p20", "p50", "p80", "of copy", "vs as it is"], rows)


def compile_only(packages: Mapping[str, ModuleType], storages: Sequence[str], device: torch.device) -> None:
    """Take small steps that need the kernels of candidates, so that Triton compiles them and keeps them."""
    for storage in storages:
        # Vectors have no moments in 8 bits, so another kernel steps them.
        params = make_params(Workload("small", [(64, 128)] * 2 + [(128,)], (1,)), device, COMBINATIONS[storage].param)
        contestants(peers.Field(params, 1, storage), packages)


def compile_in_parallel(names: Sequence[str], storages: Sequence[str]) -> None:
    """Compile the kernels of candidates, in one process for each. What fails here fails again in `measure`, which tells it."""
    begin = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "bench.tune",
        "--device",
        "cuda",
        "--compile-only",
        "--storages",
        *storages,
        "--only",
    ]
    processes = [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL, cwd=harness.ROOT) for name in names]
    try:
        for process in processes:
            process.wait(max(COMPILE_SECONDS + begin - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
    harness.log(f"compiled {len(names)} candidates in {time.monotonic() - begin:.0f} s")


def main() -> None:
    """Measure, print the tables and what to paste, and write the JSON file after each table."""
    parser = harness.parser_for(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS_TO_TUNE)
    parser.add_argument("--storages", nargs="+", choices=COMBINATIONS, default=STORAGES_TO_TUNE, metavar="NAME")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, metavar="NAME", help="candidates; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="the command ends after this time")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = harness.choose_device(arguments.device)
    names = list(dict.fromkeys([AS_IT_IS, *(arguments.only or CANDIDATES)]))
    if arguments.compile_only:
        compile_only({n: variant(CANDIDATES[n]) for n in arguments.only}, arguments.storages, device)
        return
    results: list[dict[str, Any]] = []
    left = [(storage, name) for name in arguments.workloads for storage in arguments.storages]

    def tell() -> int:
        print(f"\n{advice(results)}" + "".join(f"\nno time left for {name}, {storage}" for storage, name in left))
        harness.finish(arguments.json, "bench.tune", device, {"results": results})
        return 0

    limit = harness.Limit(arguments.minutes, tell)
    if device.type == "cuda":
        compile_in_parallel(names, arguments.storages)
    packages = {name: variant(CANDIDATES[name]) for name in names}
    rounds = 2 if arguments.dry_run else arguments.rounds
    for storage, name in list(left):
        results.append(measure(name, packages, device, dry=arguments.dry_run, rounds=rounds, storage=storage))
        left.remove((storage, name))
        print(f"\n{table(results[-1])}", flush=True)
        harness.write_json(arguments.json, {"results": results})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    limit.cancel()
    tell()


if __name__ == "__main__":
    main()
