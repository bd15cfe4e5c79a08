"""Parameter lists by name: the shapes a benchmark steps, with a printed count. Float32 throughout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Shapes = list[tuple[int, ...]]


def gpt2_124m() -> Shapes:
    """GPT-2 small, tied head: 12 layers of width 768."""
    d = 768
    layer = [(d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(layer * 12), (d,), (d,)]


def llama_1b() -> Shapes:
    """LLaMA 3.2 1B: 16 layers of width 2048, 8 key/value heads of 64, feed-forward 8192, tied embedding."""
    d, kv, ffn = 2048, 512, 8192
    layer = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    return [(128256, d), *(layer * 16), (d,)]


def many_small() -> Shapes:
    """465 tensors of a ViT-like list, most of them vectors: what costs the host, not the memory."""

    def tensors() -> Iterator[tuple[int, ...]]:
        while True:
            yield from [(384,), (384,), (1152, 384), (1152,), (384, 384), (384,), (384,), (384,), (384,)]

    source = tensors()
    return [next(source) for _ in range(465)]


def one_huge() -> Shapes:
    return [(2**30,)]


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "gpt2_124m": gpt2_124m,
    "llama_1b": llama_1b,
    "many_small": many_small,
    "one_huge": one_huge,
}
# Parameter groups each one is split into, for a benchmark that does not ask for another number.
GROUPS = {"gpt2_124m": 1, "llama_1b": 1, "many_small": 465, "one_huge": 1}
