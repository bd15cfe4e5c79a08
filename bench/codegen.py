"""What the compiler makes of each kernel variant: registers, spills, access widths, bytes in flight. Needs no GPU.

python -m bench.codegen            # table for sm_80, sm_90, sm_100, gfx942
python -m bench.codegen --json results.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lwadamw import kernels
from lwadamw.kernels import layout

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Per multiprocessor: registers, threads, shared memory bytes. NVIDIA's occupancy tables for 8.0, 9.0, 10.0.
LIMITS = {"sm_80": (65536, 2048, 163840), "sm_90": (65536, 2048, 232448), "sm_100": (65536, 2048, 232448)}
# Triton before 3.3 compiles ahead of time through another interface.
SUPPORTED = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 3)
TYPES = {"PARAM": tl.float32, "GRAD": tl.float32, "STATE": tl.float32}


@dataclass
class Report:
    kernel: str
    target: str
    registers: int
    spills: int
    wide: int  # 16-byte accesses of bulk arrays
    narrow: int  # 4-byte accesses: scalars, masked path
    occupancy: int  # programs per multiprocessor
    bytes_in_flight: (
        int  # per multiprocessor, if every resident program has one block of every array it reads on its way
    )
    constants: dict[str, str] = field(default_factory=dict)


def variants() -> list[tuple[object, dict[str, str], dict[str, object], int]]:
    """(kernel, signature of its run-time arguments, constants, bytes one block of it reads) of all the plan launches."""
    chunks = {"chunk_row": "*i32", "chunk_span": "*i64"}
    update = {
        **chunks,
        "addresses": "*i64",
        "gradients": "*i64",
        "coefficients": "*fp32",
        "partials": "*fp32",
        "n_rows": "i32",
    }
    out: list[tuple[object, dict[str, str], dict[str, object], int]] = []
    array = layout.BLOCK * 4
    for amsgrad in (False, True):
        for norms in (False, True):
            constants = {**TYPES, "AMSGRAD": amsgrad, "NORMS": norms}
            out.append((kernels.adamw_kernel, update, constants, (5 if amsgrad else 4) * array))
    gradient = {**chunks, "gradients": "*i64", "partials": "*fp32"}
    out.append((kernels.grad_norm_kernel, gradient, {"GRAD": tl.float32}, layout.GRAD_BLOCK * 4))
    total = {"partials": "*fp32", "total": "*fp64", "n_chunks": "i32"}
    out.append((kernels.total_kernel, total, {"BITS": 44}, 0))
    for clip in (False, True):
        signature = {
            "words": "*i64",
            "row_group": "*i32",
            "steps": "*fp32",
            "total": "*fp64",
            "coefficients": "*fp32",
            "grad_norm": "*fp32",
            "n_rows": "i32",
        }
        out.append((kernels.coefficients_kernel, signature, {"CLIP": clip}, 0))
    signature = {
        "partials": "*fp32",
        "segment_chunk": "*i32",
        "chunk_row": "*i32",
        "coefficients": "*fp32",
        "sums": "*fp64",
    }
    out.append((kernels.norms_kernel, signature, {}, 0))
    return out


def compile_variant(
    kernel: object, signature: dict[str, str], constants: dict[str, object], target: GPUTarget
) -> object:
    names = list(kernel.arg_names)
    full = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")}
    source = ASTSource(kernel, full, constexprs=constants, attrs=aligned)
    options = {"num_warps": layout.WARPS[target.backend], "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def _cuobjdump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as f:
        f.write(cubin)
    try:
        return subprocess.run([str(tool), flag, f.name], capture_output=True, text=True, check=True).stdout
    finally:
        os.unlink(f.name)


def report(
    kernel: object, signature: dict[str, str], constants: dict[str, object], block_bytes: int, name: str
) -> Report:
    compiled = compile_variant(kernel, signature, constants, TARGETS[name])
    shown = {k: str(v) for k, v in constants.items() if k not in TYPES}
    if name.startswith("gfx"):
        asm = compiled.asm["amdgcn"]
        wide = len(re.findall(r"\b(?:global|flat|buffer)_(?:load|store)_dwordx4\b", asm))
        narrow = len(re.findall(r"\b(?:global|flat|buffer)_(?:load|store)_dword\b", asm))
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", asm).group(1))
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", asm).group(1))
        return Report(kernel.__name__, name, registers, spills, wide, narrow, 0, 0, shown)
    cubin = compiled.asm["cubin"]
    usage = _cuobjdump(cubin, "-res-usage")
    sass = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)\b[.A-Z0-9]*", _cuobjdump(cubin, "-sass")))
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    shared = int(re.search(r"SHARED:(\d+)", usage).group(1))
    spills = sum(n for op, n in sass.items() if op[:3] in ("LDL", "STL"))
    wide = sum(n for op, n in sass.items() if op.endswith(".128"))
    narrow = sum(n for op, n in sass.items() if op[:3] in ("LDG", "STG") and not re.search(r"\.(64|128)$", op))
    threads = layout.WARPS["cuda"] * 32
    # Registers are handed out to a warp in units of 256, which is 8 for each of its threads.
    all_registers, all_threads, all_shared = LIMITS[name]
    occupancy = min(
        all_registers // (-(-registers // 8) * 8 * threads), all_threads // threads, all_shared // max(shared, 1)
    )
    flight = occupancy * block_bytes
    return Report(kernel.__name__, name, registers, spills, wide, narrow, occupancy, flight, shown)


def reports(targets: list[str]) -> list[Report]:
    return [report(*variant, name) for name in targets for variant in variants()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the reports there too")
    arguments = parser.parse_args()
    if not SUPPORTED:
        parser.error(f"needs Triton 3.3 or newer, whose ahead-of-time interface it uses; this is {triton.__version__}")
    rows = reports(list(TARGETS))
    print(f"triton {triton.__version__}, block {layout.BLOCK}, tail {layout.TAIL}, warps {layout.WARPS}")
    print(
        f"{'target':8}{'kernel':22}{'variant':32}{'regs':>5}{'spills':>8}{'16 B':>6}{'4 B':>6}{'CTAs':>6}{'KB in flight':>14}"
    )
    for r in rows:
        variant = " ".join(f"{k}={v}" for k, v in r.constants.items())
        print(
            f"{r.target:8}{r.kernel:22}{variant:32}{r.registers:5}{r.spills:8}{r.wide:6}{r.narrow:6}"
            f"{r.occupancy or '-':>6}{r.bytes_in_flight / 1024 or '-':>14}"
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "reports": [asdict(r) for r in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
