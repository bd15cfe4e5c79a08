"""How long a step should take on a GPU: a model from bytes, instructions, occupancy and waves. This command needs no GPU.

    python -m bench.predict                         # LLaMA 1B in every storage, and float32 workloads, on six devices
    python -m bench.predict --measured bench/results/gpu_nvidia_h200.json

The update is one launch. Three things may limit it, and the model takes them together as a smooth maximum:

    bytes         what the step moves, over MEMORY_SHARE of the bandwidth of a copy
    instructions  of the aligned loop as bench.codegen counts them, over ISSUE_SHARE of what the multiprocessors can issue
    latency       what the step loads, over what all programs together have in flight, times LATENCY. While a program begins, it
                  has nothing in flight, so short chunks cost PROLOGUE each.

Two more terms count for small models. LAUNCHES is the time of what runs before the update. The tail is the time for which too
few programs are left to keep the memory busy: the last programs run alone, one iteration per LATENCY.

The three shares were fitted to 15 storages of LLaMA 1B on an H200 (bench/results/gpu_nvidia_h200.json), with the machine code
of the kernels as they were then. They are not fitted to other devices or workloads. bench/LOG.md tells what the fit is worth.
Bandwidths of copies on an H100 and an H200 were measured. Those of other devices are assumed to be the same share of what the
vendor says. The model knows no host: with thousands of small tensors the host limits the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import harness
from bench.workloads import WORKLOADS
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.tables.chunks import chunk_length

COPY_OF_DATASHEET = 0.896  # 3.0 of 3.35 TB/s on an H100, 4.3 of 4.8 on an H200
MEMORY_SHARE = 0.95
ISSUE_SHARE = 0.70
SHARPNESS = 8  # of the smooth maximum: the root of the sum of powers
LATENCY = 1e-6  # seconds from a load to its use while the memory is busy
PROLOGUE = 2.4e-6  # seconds of a program before its first block arrives: four loads, each of which needs the one before
LAUNCHES = 10e-6  # seconds of the small kernel before the update, and of the gap between them
LANES = 128  # instructions of threads that a multiprocessor can issue in a clock cycle
STORAGE_WORKLOAD = "llama_1b"
FP32_WORKLOADS = ("one_huge", "llama_1b", "llama_7b_shard", "mixtral_experts", "vit_465", "gpt2_124m", "cpu_30m")


class Device(NamedTuple):
    """A GPU.

    Attributes:
        target: target of bench.codegen whose machine code it runs, or the nearest one.
        multiprocessors: their number.
        hertz: boost clock.
        copy: bytes per second of a copy in device memory, read and written.
    """

    target: str
    multiprocessors: int
    hertz: float
    copy: float


DEVICES = {
    "A100 80GB": Device("sm_80", 108, 1.41e9, COPY_OF_DATASHEET * 2.039e12),
    "H100": Device("sm_90", 132, 1.98e9, 3.0e12),
    "H200": Device("sm_90", 132, 1.98e9, 4.3e12),
    "B200": Device("sm_100", 148, 1.965e9, COPY_OF_DATASHEET * 8.0e12),
    "L4": Device("sm_80", 58, 2.04e9, COPY_OF_DATASHEET * 0.3e12),
    "RTX 4090": Device("sm_80", 128, 2.52e9, COPY_OF_DATASHEET * 1.008e12),
}


@dataclass(frozen=True)
class Code:
    """What the compiler made of the update kernel for one storage.

    Attributes:
        target: the target of this machine code.
        block: elements of an iteration of the aligned loop.
        moved: bytes that it loads and stores per element.
        loaded: bytes that it loads per element.
        instructions: instructions per element.
        in_flight: bytes that all programs of a multiprocessor load before they wait.
        programs: programs on a multiprocessor.
    """

    target: str
    block: int
    moved: float
    loaded: float
    instructions: float
    in_flight: float
    programs: int


def codes(reports: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Code]:
    """Return the code of each (target, storage), from reports of bench.codegen.

    A target without a storage has the code of sm_90.
    """
    found = {
        (r["target"], r["variant"]): Code(
            r["target"],
            int(r["constants"]["BLOCK"]),
            r["moved_bytes"],
            (r["moved_bytes"] + COMBINATIONS[r["variant"]].grad.itemsize) / 2,  # all but the gradient is written too
            r["instructions"],
            r["bytes_in_flight"],
            r["programs"],
        )
        for r in reports
        if r["kernel"] == "adamw_kernel" and r["variant"] in COMBINATIONS and r["programs"]
    }
    targets = {device.target for device in DEVICES.values()}
    return {(t, name): found.get((t, name), found["sm_90", name]) for t in targets for name in COMBINATIONS}


def tail(elements: int, device: Device, code: Code, length: int | None = None) -> float:
    """Return for how many seconds a step lasts longer because the last programs cannot keep the memory busy.

    Args:
        elements: number of elements of all parameters, which are taken as one.
        device: the device.
        code: the update kernel.
        length: number of elements of a chunk; None: as tables/chunks.py chooses it.
    """
    length = length or chunk_length(elements)
    slots = device.multiprocessors * code.programs
    last = -(-elements // length) % slots or slots
    alone = PROLOGUE + -(-length // code.block) * LATENCY
    shared = last * length * code.moved / (MEMORY_SHARE * device.copy)
    return max(0.0, alone - shared)


def seconds(elements: int, device: Device, code: Code, length: int | None = None) -> float:
    """Return the predicted time of a step. The arguments are those of `tail`."""
    busy = -(-(length or chunk_length(elements)) // code.block) * LATENCY
    terms = (
        elements * code.moved / (MEMORY_SHARE * device.copy),
        elements * code.instructions / (ISSUE_SHARE * LANES * device.multiprocessors * device.hertz),
        elements * code.loaded * LATENCY / (device.multiprocessors * code.in_flight) * (1 + PROLOGUE / busy),
    )
    body: float = sum(term**SHARPNESS for term in terms) ** (1 / SHARPNESS)
    return body + LAUNCHES + tail(elements, device, code, length)


def of_copy(elements: int, device: Device, code: Code) -> float:
    """Return the predicted bandwidth of a step as a share of a copy's."""
    return elements * code.moved / seconds(elements, device, code) / device.copy


def predictions(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return milliseconds, share of a copy and share of the tail, by what is stepped, then by device.

    Args:
        reports: reports of bench.codegen.
    """
    code = codes(reports)
    elements = WORKLOADS[STORAGE_WORKLOAD].elements
    cases = [(f"{STORAGE_WORKLOAD}, {name}", elements, name) for name in COMBINATIONS]
    cases += [(name, WORKLOADS[name].elements, "fp32") for name in FP32_WORKLOADS if name != STORAGE_WORKLOAD]
    return {
        case: {
            name: {
                "ms": 1e3 * seconds(n, device, code[device.target, storage]),
                "of_copy": of_copy(n, device, code[device.target, storage]),
                "tail": tail(n, device, code[device.target, storage])
                / seconds(n, device, code[device.target, storage]),
            }
            for name, device in DEVICES.items()
        }
        for case, n, storage in cases
    }


def measured(record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the measured figures of a record of bench.gpu_bench, by the names of `predictions`."""
    out = {}
    for result in (*record.get("storage", ()), *record.get("step", ())):
        row = result["rows"]["lwadamw"]
        name = result["workload"]
        if name == STORAGE_WORKLOAD:
            name = f"{name}, {result['storage']}"
        if result["groups"] in (1, min(WORKLOADS[result["workload"]].counts())):
            out[name] = {"ms": row["ms"]["p50"], "of_copy": row["of_copy"]}
    return out


def table(predicted: Mapping[str, Mapping[str, Mapping[str, float]]], record: Mapping[str, Any] | None) -> str:
    """A row for each case: milliseconds and share of a copy on each device, then what was measured and the error."""
    known = {} if record is None else measured(record)
    on = next((name for name in DEVICES if record is not None and name in record["machine"]["device"]), None)
    rows = []
    for case, by_device in predicted.items():
        cells = [f"{figures['ms']:.2f} ({figures['of_copy']:.0%})" for figures in by_device.values()]
        if on is not None:
            there = known.get(case)
            error = "" if there is None else f"{by_device[on]['ms'] / there['ms'] - 1:+.1%}"
            cells += ["" if there is None else f"{there['ms']:.2f} ({there['of_copy']:.0%})", error]
        rows.append([case, *cells])
    header = ["ms (share of a copy), predicted", *DEVICES]
    return harness.table([*header, *([f"{on}, measured", "error"] if on is not None else [])], rows)


def main() -> None:
    """Print the table, and write it as JSON if asked for."""
    parser = harness.parser_for(__doc__)
    parser.add_argument("--measured", type=Path, help="a JSON file of bench.gpu_bench to compare with")
    arguments = parser.parse_args()
    record = json.loads(arguments.measured.read_text()) if arguments.measured else None
    # A measurement is compared with what its own kernels should take.
    source = json.loads(harness.CODE.read_text()) if record is None or "reports" not in record else record
    predicted = predictions(source["reports"])
    print(table(predicted, record))
    harness.finish(arguments.json, "bench.predict", harness.choose_device("cpu"), {"predictions": predicted})


if __name__ == "__main__":
    main()
