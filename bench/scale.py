"""What one process of a 405B model's run pays for each step: elements, bytes, collectives, tables and host time.

    python -m bench.scale                                    # 1,024 to 16,384 processes, three layouts
    python -m bench.scale --processes 4096 --json scale.json

The real optimizer of one process takes real steps: it decides, builds tables and makes its collective calls as in the run,
with the shapes and placements that fully_shard and parallelize_module give the parameters. Three things are replaced. The
process group is torch's "fake" one, whose calls return at once. The kernels are stubbed. And all arrays of the process share
one buffer that nobody writes, so that nothing needs real memory. So the table tells what is computed and sent, and what the
host takes for it, but not how long a network or a GPU takes. tests/bench/test_scale.py compares the counts with those of
real processes.

    elements    parameters that the first and the last process hold. Dimensions that the processes do not divide leave some
                processes with less, or nothing.
    HBM         bytes that the step of the first process reads and writes: float32 parameters, gradients and moments, with the
                gradients read twice, because the step clips
    step        all-reduces of a clipped step, and the bytes that one process gives to them
    norms       the same for `norms()`, which is collective only when somebody reads it
    tables      bytes of the device tables, and the time of building the optimizer and taking the first step, which makes them
    host        time of a later step on the host, with launches stubbed; median
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import lwadamw
from bench import harness
from bench.memory import cpu_usage
from bench.stubs import nothing, stubbed_kernels
from lwadamw.state.storage import Storage

BYTES = int(Storage(*[torch.float32] * 4).moved_bytes()) + 4  # clipping reads every gradient once more
PROCESSES = (1024, 4096, 16384)
STEPS = 20


@dataclass(frozen=True)
class Shape:
    """One parameter of the whole model.

    Attributes:
        name: its name.
        sizes: its shape.
        split: the dimension along which tensor parallelism splits it; None: every process of a group has all of it.
    """

    name: str
    sizes: tuple[int, ...]
    split: int | None


def llama_405b(layers: int = 126, d: int = 16384, kv: int = 1024, ffn: int = 53248, vocab: int = 128256) -> list[Shape]:
    """LLaMA 3.1 405B: 126 layers of width 16384, 8 key/value heads of 128, feed-forward 53248, untied head."""
    layer = {
        "attention.wq": ((d, d), 0),
        "attention.wk": ((kv, d), 0),
        "attention.wv": ((kv, d), 0),
        "attention.wo": ((d, d), 1),
        "feed_forward.w1": ((ffn, d), 0),
        "feed_forward.w3": ((ffn, d), 0),
        "feed_forward.w2": ((d, ffn), 1),
        "attention_norm": ((d,), None),
        "ffn_norm": ((d,), None),
    }
    blocks = [Shape(f"layers.{i}.{name}.weight", *what) for i in range(layers) for name, what in layer.items()]
    ends = [Shape("norm.weight", (d,), None), Shape("output.weight", (vocab, d), 0)]
    return [Shape("tok_embeddings.weight", (vocab, d), 0), *blocks, *ends]


@dataclass(frozen=True)
class Layout:
    """How a model is split over processes.

    Attributes:
        name: what the table calls it.
        tensor: number of processes among which tensor parallelism splits a matrix; 1: no tensor parallelism.
        shard: number of processes among which fully_shard splits every parameter; None: all of them.
    """

    name: str
    tensor: int = 1
    shard: int | None = None

    def mesh(self, processes: int) -> Any:
        """Return the device mesh: [replicas,] shards [, tensor parallelism]."""
        from torch.distributed.device_mesh import init_device_mesh

        shard = self.shard or processes // self.tensor
        sizes = {"replicate": processes // (shard * self.tensor), "shard": shard, "tensor": self.tensor}
        kept = {
            name: size
            for name, size in sizes.items()
            if name == "shard" or (name == "replicate" and self.shard) or size > 1
        }
        return init_device_mesh("cpu", tuple(kept.values()), mesh_dim_names=tuple(kept))

    def placements(self, shape: Shape, mesh: Any) -> list[Any]:
        """Return the placements that fully_shard after parallelize_module gives a parameter."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        rows_twice = self.tensor > 1 and shape.split == 0
        of = {
            "replicate": Replicate(),
            "shard": _StridedShard(0, split_factor=self.tensor) if rows_twice else Shard(0),
            "tensor": Replicate() if shape.split is None else Shard(shape.split),
        }
        return [of[name] for name in mesh.mesh_dim_names]


LAYOUTS = (Layout("FSDP2"), Layout("HSDP, shards of 1024", shard=1024), Layout("FSDP2 x TP 8", tensor=8))


def local_sizes(shape: Shape, placements: Sequence[Any], mesh: Any) -> tuple[int, ...]:
    """Return the shape of what this process holds. Tensor parallelism splits first, then fully_shard splits the rest."""
    sizes = list(shape.sizes)
    split = [(mesh.size(d), mesh.get_local_rank(d), p.dim) for d, p in enumerate(placements) if hasattr(p, "dim")]
    for parts, place, dim in reversed(split):
        chunk = -(-sizes[dim] // parts)
        sizes[dim] = max(0, min(sizes[dim] - chunk * place, chunk))
    return tuple(sizes)


@dataclass
class Calls:
    """Collective calls, and the bytes that this process gave to them."""

    count: int = 0
    bytes: int = 0
    groups: list[int] = field(default_factory=list)  # number of processes of each call


@contextmanager
def counted() -> Iterator[Calls]:
    """Count all-reduces in this context."""
    calls, real = Calls(), dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        calls.count += 1
        calls.bytes += tensor.numel() * tensor.element_size()
        calls.groups.append(dist.get_world_size(options.get("group")))
        return real(tensor, *args, **options)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield calls


def make_shards(shapes: Sequence[Shape], layout: Layout, mesh: Any) -> tuple[list[Any], Callable[[int], list[Any]]]:
    """Make this process's part of every parameter.

    Returns:
        Parameters, and a function that makes DTensors like them over the same memory, moved by a number of elements. As in
        fully_shard, they share the specs of their parameters.
    """
    from torch.distributed.tensor import DTensor

    placed = [layout.placements(shape, mesh) for shape in shapes]
    sizes = [local_sizes(shape, place, mesh) for shape, place in zip(shapes, placed, strict=True)]
    buffer = torch.empty(max(map(math.prod, sizes)) + 64)

    def parts(first: int) -> list[Tensor]:
        return [buffer[first : first + math.prod(size)].view(size) for size in sizes]

    # No Parameter: making one asks torch for a cached spec, whose mesh may be that of an earlier process group.
    params = []
    for shape, place, part in zip(shapes, placed, parts(0), strict=True):
        whole = torch.empty(shape.sizes, device="meta")
        p: Any = DTensor.from_local(part, mesh, place, run_check=False, shape=whole.shape, stride=whole.stride())
        params.append(p.requires_grad_())

    def views(first: int) -> list[Any]:
        return [DTensor(part, p._spec, requires_grad=False) for part, p in zip(parts(first), params, strict=True)]

    return params, views


def first_step(shapes: Sequence[Shape], params: Sequence[Any], moments: Sequence[Any]) -> lwadamw.AdamW:
    """Build the optimizer over moments that exist already, and take its first step."""
    named = [(shape.name, p) for shape, p in zip(shapes, params, strict=True)]
    optimizer = lwadamw.AdamW(named, backend="triton", max_grad_norm=1.0)
    for p, m in zip(params, moments, strict=True):
        vars(optimizer)["state"][p] = {"exp_avg": m, "exp_avg_sq": m}
    optimizer.step()
    return optimizer


def measure(shapes: Sequence[Shape], layout: Layout, processes: int) -> dict[str, Any]:
    """Take steps of this process's optimizer. The default process group has to exist.

    Args:
        shapes: parameters of the whole model.
        layout: how the model is split.
        processes: number of processes of the run.

    Returns:
        Elements and bytes of this process, its calls, seconds and bytes of the tables, and seconds of a step.
    """
    from lwadamw.tables import triton_backend

    params, views = make_shards(shapes, layout, layout.mesh(processes))
    grads, moments = (views(16), views(32)), views(0)
    times = []
    with stubbed_kernels(), mock.patch.object(triton_backend, "check_apart", nothing):
        give(params, grads[0])
        start = time.perf_counter()
        optimizer = first_step(shapes, params, moments)
        built = time.perf_counter() - start
        gc.collect()
        gc.disable()
        for i in range(STEPS):
            give(params, grads[i % 2])
            with counted() as step:
                start = time.perf_counter()
                optimizer.step()
                times.append(time.perf_counter() - start)
        gc.enable()
        with counted() as norms:
            optimizer.norm_sums()
        # A thread of the process group keeps the tensor of a call for a while, and then it would count as a table.
        with mock.patch.object(dist, "all_reduce", nothing), cpu_usage() as usage:
            again = first_step(shapes, params, moments)
    elements = sum(p.to_local().numel() for p in params)
    del again
    return {
        "processes": processes,
        "layout": layout.name,
        "tensors": len(shapes),
        "elements": elements,
        "moved": elements * BYTES,
        "step": vars(step),
        "norms": vars(norms),
        "tables": usage.left,
        "build_s": built,
        "host_us": 1e6 * statistics.median(times),
    }


def give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Assign gradients."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


@contextmanager
def pretended(processes: int, rank: int) -> Iterator[None]:
    """A process group of any size, of which only this process exists. Its calls return at once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run(shapes: Sequence[Shape], numbers: Sequence[int], layouts: Sequence[Layout] = LAYOUTS) -> list[dict[str, Any]]:
    """Measure the first process of every layout, and count the elements of the last one.

    Args:
        shapes: parameters of the whole model.
        numbers: numbers of processes.
        layouts: the layouts.
    """
    results = []
    for layout in layouts:
        for processes in numbers:
            with pretended(processes, 0):
                result = measure(shapes, layout, processes)
            with pretended(processes, processes - 1):
                mesh = layout.mesh(processes)
                sizes = [local_sizes(shape, layout.placements(shape, mesh), mesh) for shape in shapes]
            results.append({**result, "elements_of_last": sum(map(math.prod, sizes))})
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each layout and number of processes."""
    rows = [
        [
            r["layout"],
            f"{r['processes']:,}",
            f"{r['elements'] / 1e6:,.1f}M / {r['elements_of_last'] / 1e6:,.1f}M",
            f"{r['moved'] / 1e9:.2f} GB",
            *(f"{r[what]['count']} x {r[what]['bytes'] // max(r[what]['count'], 1):,} B" for what in ("step", "norms")),
            f"{r['tables'] / 1e3:,.0f} kB, {r['build_s']:.2f} s",
            f"{r['host_us']:,.0f} us",
        ]
        for r in results
    ]
    header = [f"{results[0]['tensors']:,} tensors", "processes", "elements, first / last", "HBM", "step", "norms"]
    return harness.table([*header, "tables", "host"], rows)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = harness.parser_for(__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and write the JSON file."""
    arguments = parse()
    device = harness.choose_device("cpu")
    torch.set_num_threads(1)
    shapes = llama_405b(2, 64, 16, 96, 256) if arguments.dry_run else llama_405b()
    results = run(shapes, arguments.processes)
    print(table(results))
    harness.finish(arguments.json, "bench.scale", device, {"results": results}, threads=1)


if __name__ == "__main__":
    main()
