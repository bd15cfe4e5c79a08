"""Compares launch constants of csrc_triton/layout.py. Each candidate is the package with some constants replaced.

    python -m bench.tune                              # all candidates, on LLaMA 1B and GPT-2 124M
    python -m bench.tune --workloads one_huge --only "block 2048,tail 512"
    python -m bench.tune --storage "bf16, remainder, 8-bit moments" --only "4 programs of random ones"

All candidates step the same tensors in one process, in turn. A candidate replaces the constants if it is faster on every
workload, by more than its spread from p20 to p80. The other candidates are written to LOG.md. Whether a candidate spills
registers, and how many programs fit, is a question for `bench.codegen`.
"""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench import harness, peers, revision
from bench.step import make_copy
from bench.workloads import WORKLOADS, make_params
from lwadamw.state.combinations import COMBINATIONS

# Key: the name of a candidate. Value: the constants that it replaces.
CANDIDATES: dict[str, dict[str, object]] = {
    "as it is": {},
    "block 512": {"BLOCK": 512},
    "block 2048": {"BLOCK": 2048},
    "block 512, 4 warps": {"BLOCK": 512, "THREADS": 128},
    "block 2048, 16 warps": {"BLOCK": 2048, "THREADS": 512, "TAIL": 512},
    "tail 512": {"TAIL": 512},
    "4 programs of twice the block": {"DOUBLE_REGISTERS": 64},
    "4 programs of random ones": {"RANDOM_REGISTERS": 64},
    "gradient block 4096": {"GRAD_BLOCK": 4096},
    "gradient block 8192": {"GRAD_BLOCK": 8192},
    "chunks up to 4096": {"MAX_CHUNK": 4096},
    "chunks up to 65536": {"MAX_CHUNK": 65536},
    "chunks from 4096": {"MIN_CHUNK": 4096},
    "loads .cg": {"LOAD_CACHE": ".cg"},
    "loads evict first": {"LOAD_EVICTION": "evict_first"},
    "stores evict first": {"STORE_EVICTION": "evict_first"},
    "all evict first": {"LOAD_EVICTION": "evict_first", "STORE_EVICTION": "evict_first"},
}
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


def measure(
    workload_name: str,
    packages: Mapping[str, ModuleType],
    device: torch.device,
    *,
    dry: bool,
    rounds: int,
    storage: str = "fp32",
) -> dict[str, Any]:
    """Measure every candidate on one workload, without and with clipping. Norms are on.

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
    backend = "triton" if device.type == "cpu" else None
    entered = {}
    for name, package in packages.items():
        entrants = peers.ours(field, package, backend, name)
        entered |= {key: entrants[key] for key in (name, f"{name}, clipping")}
    copy, copied = make_copy(workload.elements * field.bytes_per_element, device)
    calls = {"copy": copy, **{name: contestant.step for name, contestant in entered.items()}}
    times = harness.interleaved(harness.Timer(device, seconds=0.03), calls, rounds)
    bandwidth = copied / harness.quantiles(times["copy"])["p50"]
    first = next(iter(packages))
    rows = {}
    for name, contestant in entered.items():
        quantiles = harness.quantiles(times[name])
        reference = f"{first}, clipping" if name.endswith(", clipping") else first
        rows[name] = {
            "ms": {key: value * 1e3 for key, value in quantiles.items()},
            "of_copy": workload.elements * contestant.bytes_per_element / quantiles["p50"] / bandwidth,
            "vs_first": harness.ratio(times, name, reference),
        }
    return {"workload": str(workload), "storage": storage, "copy_gb_s": bandwidth / 1e9, "rows": rows}


def table(result: Mapping[str, Any]) -> str:
    """A table with a row for each candidate, the fastest first."""
    rows = [
        [
            name,
            *[f"{row['ms'][p]:.4f}" for p in ("p20", "p50", "p80")],
            f"{row['of_copy']:.1%}",
            f"{row['vs_first']:.3f}x",
        ]
        for name, row in sorted(result["rows"].items(), key=lambda item: item[1]["ms"]["p50"])
    ]
    return harness.table([result["workload"], "ms p20", "p50", "p80", "of copy", "vs as it is"], rows)


def main() -> None:
    """Measure, print the tables and write the JSON file."""
    parser = harness.parser_for(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["llama_1b", "gpt2_124m"])
    parser.add_argument("--storage", choices=COMBINATIONS, default="fp32", metavar="NAME", help="see bench.step")
    parser.add_argument("--only", help="names of candidates, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device = harness.choose_device(arguments.device)
    wanted = ["as it is", *arguments.only.split(",")] if arguments.only else list(CANDIDATES)
    unknown = set(wanted) - set(CANDIDATES)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} not in {', '.join(CANDIDATES)}")
    packages = {name: variant(CANDIDATES[name]) for name in dict.fromkeys(wanted)}
    results = []
    for name in arguments.workloads:
        rounds = 2 if arguments.dry_run else arguments.rounds
        options = {"dry": arguments.dry_run, "rounds": rounds, "storage": arguments.storage}
        results.append(measure(name, packages, device, **options))
        print(f"\n{table(results[-1])}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    harness.finish(arguments.json, "bench.tune", device, {"results": results})


if __name__ == "__main__":
    main()
