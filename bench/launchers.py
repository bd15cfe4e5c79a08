"""Steps through Triton's own CUDA launcher, on a machine without a GPU: what does the driver get?

    python -m bench.launchers                                         # with the installed Triton
    PYTHONPATH=.:/path/of/another/triton python -m bench.launchers    # with a wheel of another version, unpacked there

The kernels are compiled for sm_90. In the place of the CUDA driver stands bench/recorder.c, which needs a C compiler. It writes
down what a launch hands over and executes nothing. Every launch of an optimizer is looked at twice: the first one goes through
Triton's preparation, the later ones call the compiled kernel with bare addresses (tables/launch.py). Both have to be what the
tables say: grid, threads, each parameter, the current stream, and the same function. Launch hooks have to be called each time.

The packages are the one that `make gpu-test` and `make gpu-bench` run, and a candidate of `make gpu-tune`. The steps are whole
ones that clip and measure norms, and steps of single parameters from a backward.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from bench import harness, tune
from lwadamw.kernels import layout
from lwadamw.state.combinations import COMBINATIONS

STORAGES = ("fp32", "bf16, stochastic, 8-bit moments")
CANDIDATE = "tail 512"
SHAPES = ((128, 64), (5,), (33, 7))
STREAMS = (7, 9)  # the stream of the first step, and of the second


class _Record(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("function", "stream", "launches")),
        *((name, ctypes.c_uint64 * 3) for name in ("grid", "block")),
        ("parameters", ctypes.c_uint64 * 32),
    ]


class Recorder:
    """The pretended driver, as Triton's active one.

    Args:
        folder: where the library is built.
    """

    def __init__(self, folder: Path) -> None:
        library = folder / "libcuda.so.1"
        source = harness.ROOT / "bench" / "recorder.c"
        build = ["cc", "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(library)]
        subprocess.run(build, check=True)
        (folder / "libcuda.so").symlink_to(library.name)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.recorder_last.restype = ctypes.POINTER(_Record)
        self.stream = 0
        pretended = {
            "is_available": lambda: True,
            "get_device_capability": lambda *_: (9, 0),
            "current_device": lambda: 0,
        }
        for name, value in pretended.items():
            mock.patch.object(torch.cuda, name, value).start()
        active = CudaDriver()
        active.get_current_stream = lambda _: self.stream
        active.get_device_capability = lambda *_: (9, 0)
        active.get_current_device = lambda: 0
        driver.set_active(active)

    @property
    def last(self) -> _Record:
        """The last launch."""
        record: _Record = self._library.recorder_last().contents
        return record

    def want(self, n_parameters: int) -> None:
        """Say how many parameters of the next launches are written down."""
        self._library.recorder_want(n_parameters)


def expected_parameters(launch: Any) -> list[tuple[int, int]]:
    """(value, mask of its bits) of the kernel's parameters that are ours. Triton leaves out an integer that is 1."""
    kernel = launch._kernel
    kept = set(kernel.do_not_specialize or ())
    out = []
    for name, value in zip(kernel.arg_names, launch._arguments, strict=False):
        if isinstance(value, torch.Tensor):
            out.append((value.data_ptr(), (1 << 64) - 1))
        elif value != 1 or name in kept:
            out.append((value, (1 << 32) - 1))
    return out


class Watch:
    """A context that compares every launch of a package with its tables.

    Args:
        package: lwadamw, or a copy of it under another name.
        recorder: the pretended driver.
    """

    def __init__(self, package: ModuleType, recorder: Recorder) -> None:
        self.launch_type = importlib.import_module(f"{package.__name__}.tables.launch").Launch
        self.recorder = recorder
        self.seen: dict[str, list[int]] = {}  # kernel -> number of first launches, number of direct launches
        self.wrong: list[str] = []
        self._functions: dict[int, tuple[Any, int]] = {}
        self._call = self.launch_type.__call__

    def __enter__(self) -> Watch:
        self.launch_type.__call__ = lambda launch: self._look(launch)
        return self

    def __exit__(self, *_: object) -> None:
        self.launch_type.__call__ = self._call

    def _look(self, launch: Any) -> None:
        direct, parameters = launch._direct is not None, expected_parameters(launch)
        before = self.recorder.last.launches
        self.recorder.want(len(parameters))
        self._call(launch)
        if not launch._grid[0]:
            return
        record, name = self.recorder.last, launch.kernel_name
        self.seen.setdefault(name, [0, 0])[direct] += 1
        # The launch is kept, so that its id is not given to another one.
        function = self._functions.setdefault(id(launch), (launch, record.function))[1]
        found = [value & mask for value, (_, mask) in zip(record.parameters, parameters, strict=False)]
        checks = {
            "number of launches": (record.launches, before + 1),
            "function": (record.function, function),
            "grid": (list(record.grid), list(launch._grid)),
            "threads": (list(record.block), [layout.THREADS, 1, 1]),
            "parameters": (found, [value for value, _ in parameters]),
            "stream": (record.stream, self.recorder.stream),
        }
        how = "direct" if direct else "first"
        self.wrong += [f"{how} {name}: {what} is {a}, not {b}" for what, (a, b) in checks.items() if a != b]


def steps(package: ModuleType, storage: str, recorder: Recorder) -> Watch:
    """Two whole steps on two streams, then two backwards that step each parameter alone."""
    backends = importlib.import_module(f"{package.__name__}.step.backends")
    combination = COMBINATIONS[storage]
    params = [torch.nn.Parameter(torch.randn(shape).to(combination.param)) for shape in SHAPES]
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    with mock.patch.object(backends, "interpreting", return_value=True), Watch(package, recorder) as watch:
        optimizer = package.AdamW(named, backend="triton", max_grad_norm=1.0, **combination.options)
        for recorder.stream in STREAMS:
            for p in params:
                p.grad = torch.randn(p.shape).to(combination.grad)
            optimizer.step()
        alone = package.AdamW(named, backend="triton", **combination.options)
        alone.release_gradients()
        for recorder.stream in STREAMS:
            torch.stack([p.float().sum() for p in params]).sum().backward()
    return watch


def count_hooks(launch: Any, recorder: Recorder) -> int:
    """How often a launch hook is called in two launches."""
    called: list[object] = []
    recorder.want(0)
    try:
        hooks = triton.knobs.runtime
    except AttributeError:
        from triton.compiler import CompiledKernel as hooks
    before = hooks.launch_enter_hook
    if hasattr(before, "add"):
        before.add(called.append)
    else:
        hooks.launch_enter_hook = called.append
    try:
        launch()
        launch()
    finally:
        if hasattr(before, "add"):
            before.remove(called.append)
        else:
            hooks.launch_enter_hook = before
    return len(called)


def run(storages: Sequence[str]) -> tuple[str, list[str]]:
    """Take the steps of all packages and storages. Returns a table and what was wrong."""
    rows, wrong = [], []
    with tempfile.TemporaryDirectory(prefix="lwadamw_launchers_") as folder:
        recorder = Recorder(Path(folder))
        packages = {"lwadamw": importlib.import_module("lwadamw"), CANDIDATE: tune.variant(tune.CANDIDATES[CANDIDATE])}
        for name, package in packages.items():
            for storage in storages if name == "lwadamw" else storages[:1]:
                watch = steps(package, storage, recorder)
                wrong += watch.wrong
                rows += [(name, storage, kernel, *counts) for kernel, counts in watch.seen.items()]
                launch = next(launch for launch, _ in watch._functions.values())
                if (hooked := count_hooks(launch, recorder)) != 2:
                    wrong.append(f"{name}, {storage}: a launch hook was called {hooked} times in 2 launches")
    return harness.table(["package", "storage", "kernel", "first launches", "direct launches"], rows, left=3), wrong


def main() -> None:
    """Print the table, and end with 1 if a launch was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="+", choices=COMBINATIONS, default=STORAGES, metavar="NAME")
    arguments = parser.parse_args()
    if layout.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so nothing is launched. Unset it.")
    table, wrong = run(arguments.storages)
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{table}")
    print("\n".join(wrong) or "every launch is as the tables say")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
