"""Parameter lists by name, and the numbers of groups in which each list is measured.

`python -m bench.workloads` prints the number of tensors, elements and groups of each list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

Shapes = list[tuple[int, ...]]

PER_TENSOR = 0  # as a number of groups, this means one group per tensor
SETTINGS = 28  # largest number of distinct learning rates, as layerwise learning rate decay over 24 layers gives


@dataclass(frozen=True)
class Workload:
    """A list of parameter shapes.

    Attributes:
        name: name of the list.
        shapes: shape of each parameter.
        groups: numbers of groups in which the list is measured.
    """

    name: str
    shapes: Shapes
    groups: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements of all parameters together."""
        return sum(math.prod(shape) for shape in self.shapes)

    def __str__(self) -> str:
        return f"{self.name}: {len(self.shapes):,} tensors, {self.elements:,} elements"

    def counts(self, override: int | None = None) -> list[int]:
        """Numbers of groups to measure, each at most the number of tensors.

        Args:
            override: measure only this number of groups; PER_TENSOR: one group per tensor.
        """
        wanted = self.groups if override is None else (override,)
        return list(dict.fromkeys(min(n, len(self.shapes)) if n else len(self.shapes) for n in wanted))

    def shrunk(self, tensors: int = 4, length: int = 16) -> Workload:
        """A small list of the same kind for a dry run.

        Args:
            tensors: keep this many tensors.
            length: no dimension is longer than this.
        """
        return Workload(
            self.name, [tuple(min(n, length) for n in shape) for shape in self.shapes[:tensors]], self.groups
        )


def gpt2_124m() -> Shapes:
    """GPT-2 small with a tied head: 12 layers of width 768."""
    d = 768
    layer = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(layer * 12), (d,), (d,)]


def llama_1b() -> Shapes:
    """LLaMA 3.2 1B: 16 layers of width 2048, 8 key/value heads of 64, feed-forward 8192, tied embedding."""
    d, kv, ffn = 2048, 512, 8192
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    return [(128256, d), *(layer * 16), (d,)]


def llama_7b_shard() -> Shapes:
    """The part of LLaMA 7B that one of 8 ranks steps under FSDP. FSDP shards every tensor along its first dimension."""
    d, ffn, vocab, ranks = 4096, 11008, 32000, 8
    layer = [(d, d)] * 4 + [(ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    return [(shape[0] // ranks, *shape[1:]) for shape in [(vocab, d), *(layer * 32), (d,), (vocab, d)]]


def mixtral_experts() -> Shapes:
    """4 layers of Mixtral at half width without embedding, with 8 experts packed into two tensors: 22 GB with state."""
    d, kv, ffn, experts = 2048, 512, 7168, 8
    layer = [(d, d), (kv, d), (kv, d), (d, d), (experts, d), (experts, 2 * ffn, d), (experts, d, ffn), (d,), (d,)]
    return [*(layer * 4), (d,)]


def vit_465() -> Shapes:
    """A detector on ViT-L: 24 layers of width 1024 with layer scale and 18 tensors each, and a decoder of width 256.

    Layerwise learning rate decay makes 465 groups with 28 distinct settings from this model.
    """
    d, decoder = 1024, 256
    attention = [(d,), (d,), *([(d, d), (d,)] * 4), (d,)]
    feed_forward = [(d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,)]
    stem = [(1, 1, d), (1, 4, d), (1, 577, d), (d, 3, 14, 14), (d,)]
    heads = [(decoder, d), (decoder,), *([(decoder, decoder), (decoder,)] * 12)]
    return [*stem, *((attention + feed_forward) * 24), (d,), (d,), *heads]


def many_small() -> Shapes:
    """10,000 tensors of 64 elements. The host limits the step, not the memory."""
    return [(64,)] * 10_000


def one_huge() -> Shapes:
    """One tensor of 2^30 elements."""
    return [(2**30,)]


def cpu_30m() -> Shapes:
    """A transformer of 30M parameters for CPUs: MiniLM-L12, a BERT of width 384, with a vocabulary of 22,000."""
    d, ffn, vocab = 384, 1536, 22_000
    attention = [*([(d, d), (d,)] * 4), (d,), (d,)]
    feed_forward = [(ffn, d), (ffn,), (d, ffn), (d,), (d,), (d,)]
    return [(vocab, d), (512, d), (2, d), (d,), (d,), *((attention + feed_forward) * 12)]


def efficientnet_b5() -> Shapes:
    """A convolutional network of 30M parameters for CPUs. Most of its 506 tensors are short."""

    def width(channels: float) -> int:
        rounded = max(8, int(channels * 1.6 + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * channels * 1.6 else rounded

    # (expansion, channels, layers, kernel): t, c, n and k in the table of the paper.
    stages = [
        (1, 16, 1, 3),
        (6, 24, 2, 3),
        (6, 40, 2, 5),
        (6, 80, 3, 3),
        (6, 112, 3, 5),
        (6, 192, 4, 5),
        (6, 320, 1, 3),
    ]
    c = width(32)
    shapes: Shapes = [(c, 3, 3, 3), (c,), (c,)]
    for expansion, channels, layers, kernel in stages:
        out = width(channels)
        for _ in range(math.ceil(layers * 2.2)):
            e, squeezed = c * expansion, c // 4
            shapes += [(e, c, 1, 1), (e,), (e,)] if expansion > 1 else []
            shapes += [(e, 1, kernel, kernel), (e,), (e,), (squeezed, e, 1, 1), (squeezed,), (e, squeezed, 1, 1), (e,)]
            shapes += [(out, e, 1, 1), (out,), (out,)]
            c = out
    head = width(1280)
    return [*shapes, (head, c, 1, 1), (head,), (head,), (1000, head), (1000,)]


_LISTS: dict[Callable[[], Shapes], tuple[int, ...]] = {
    gpt2_124m: (1,),
    llama_1b: (1, 28, PER_TENSOR),
    llama_7b_shard: (1,),
    mixtral_experts: (1,),
    vit_465: (28, 465),
    many_small: (1,),
    one_huge: (1,),
    cpu_30m: (1, 28, PER_TENSOR),
    efficientnet_b5: (1, 28, PER_TENSOR),
}
WORKLOADS = {make.__name__: Workload(make.__name__, make(), groups) for make, groups in _LISTS.items()}
FOR_CPU = ("cpu_30m", "efficientnet_b5")
FOR_GPU = tuple(name for name in WORKLOADS if name not in FOR_CPU)


def make_params(workload: Workload, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Make random parameters of one type, each with a random gradient of the same type."""
    params = [Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in workload.shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    return params


def make_groups(params: Sequence[torch.Tensor], n_groups: int, lr: float = 1e-5) -> list[dict[str, Any]]:
    """Divide parameters into groups in turn.

    Args:
        params: the parameters.
        n_groups: number of groups.
        lr: learning rate of the first group. Group i gets lr * (1 + i % SETTINGS).
    """
    return [{"params": list(params[i::n_groups]), "lr": lr * (1 + i % SETTINGS)} for i in range(n_groups)]


if __name__ == "__main__":
    for workload in WORKLOADS.values():
        print(f"{workload}; in groups: {', '.join(map(str, workload.counts()))}")
