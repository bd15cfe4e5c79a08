"""A killed run goes on from Megatron's checkpoint to the last bit, and checkpoints go to Transformer Engine and back."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.sharded.processes import run

from . import checkpoints, training
from .cases import EVERY, FOUR, WRAPPERS
from .training import Case

pytestmark = pytest.mark.engines

BEFORE, AFTER = range(3), range(3, 6)
SHARDINGS = ("dp_reshardable", "fully_reshardable")


class Exchange(NamedTuple):
    """A checkpoint that one run saves and another one loads.

    Attributes:
        case: wrapper and layout.
        sharding: how DistributedOptimizer lays out its state; "" for other wrappers.
        saver: "ours", "ours on triton", "torch" or "stand-in".
        loader: one of these.
        width: the groups are those of a width rule.
    """

    case: Case
    sharding: str = ""
    saver: str = "ours"
    loader: str = "ours"
    width: bool = False

    def __str__(self) -> str:
        width = ", width groups" if self.width else ""
        return f"{self.case}, {self.sharding}, {self.saver} to {self.loader}{width}"


def on_kernels(case: Case, sharding: str = "", *, width: bool = True) -> Exchange:
    return Exchange(case, sharding, "ours on triton", "ours on triton", width)


AWARE, REMAINDER = Case("aware", slim=True), Case("aware remainder", slim=True)
OURS = (
    Exchange(Case("fp32", tp=2), width=True),
    Exchange(Case("bf16"), width=True),
    Exchange(Case("distributed fp32"), "dp_reshardable", width=True),
    Exchange(Case("distributed fp32", ep=2), "dp_reshardable", width=True),
    Exchange(Case("distributed bf16", tp=2), "fully_reshardable", width=True),
    Exchange(Case("aware"), "fully_reshardable", width=True),
    Exchange(Case("aware remainder"), "dp_reshardable", width=True),
)
CORE = (
    *OURS,
    Exchange(Case("bf16")),
    Exchange(Case("distributed bf16"), "dp_reshardable"),
    on_kernels(REMAINDER, "fully_reshardable", width=False),
    on_kernels(Case("distributed fp32", slim=True), "dp_reshardable", width=False),
    on_kernels(Case("distributed bf16", tp=2, slim=True), "dp_reshardable"),
    on_kernels(AWARE, "fully_reshardable"),
    *(Exchange(AWARE, sharding, "stand-in", "ours") for sharding in SHARDINGS),
    *(Exchange(AWARE, sharding, "ours", "stand-in") for sharding in SHARDINGS),
    *(Exchange(REMAINDER, sharding, "stand-in", "ours") for sharding in SHARDINGS),
    # Transformer Engine cannot load remainders that went through Megatron's float32 buffer, whoever saved them.
    Exchange(REMAINDER, "dp_reshardable", "ours", "stand-in"),
    Exchange(Case("bf16"), "", "torch", "ours"),
    Exchange(Case("bf16"), "", "ours", "stand-in"),
)


def widened(cases: tuple[Case, ...]) -> tuple[Exchange, ...]:
    """Every case under every layout of its state, with the groups of a width rule, but those of `OURS`."""
    done = {(exchange.case, exchange.sharding) for exchange in OURS}
    return tuple(
        Exchange(case, sharding, width=True)
        for case in cases
        for sharding in (SHARDINGS if case.sharded else [""])
        if (dataclasses.replace(case, slim=False), sharding) not in done
    )


LAYOUTS: tuple[dict[str, int], ...] = ({"tp": 2}, {}, {"ep": 2})
WIDE = {
    2: widened(tuple(Case(wrapper, slim=True, **sizes) for wrapper in WRAPPERS for sizes in LAYOUTS)),
    4: (
        *(Exchange(case, sharding, width=True) for case in FOUR for sharding in (SHARDINGS if case.sharded else [""])),
        on_kernels(Case("distributed bf16", tp=2, slim=True), "fully_reshardable"),
        on_kernels(Case("aware remainder", tp=2, slim=True), "dp_reshardable"),
    ),
}
# On the kernels everything, by number of processes and layout: each is one start of processes that save, and one that load.
WHOLE = {
    layout: tuple(on_kernels(case, sharding) for case in cases for sharding in (SHARDINGS if case.sharded else [""]))
    for layout, cases in EVERY.items()
}


def by_layout(exchanges: tuple[Exchange, ...]) -> list[int]:
    """The indices of exchanges, with those of the same process groups beside each other."""
    return sorted(range(len(exchanges)), key=lambda i: exchanges[i].case.layout)


def overrides(config: Any, chunks: list[Any]) -> Any:
    from lwadamw.engines.megatron import config_overrides

    return config_overrides(config, chunks, base_width=8, rule="kosson2025")


def optimizer_of(how: str, case: Case) -> Any:
    if how == "ours on triton":
        return training.optimizer_of("ours", case, backend="triton", norms=False)
    return training.optimizer_of(how, case)


def build(exchange: Exchange, seed: int) -> training.Run:
    return training.build(exchange.case, seed=seed, layers=1, overrides=overrides if exchange.width else None)


def save_all(folder: str, exchanges: tuple[Exchange, ...]) -> None:
    """Train, save, train on and write the losses to a file, for every exchange. Then end as a machine that fails does."""
    import torch.distributed as dist

    out = {i: _save(exchanges[i], f"{folder}/{i}") for i in by_layout(exchanges)}
    if dist.get_rank() == 0:
        Path(folder, "losses.json").write_text(json.dumps([out[i] for i in range(len(out))]))
    dist.barrier()
    checkpoints.stop_writers()
    os.kill(os.getpid(), signal.SIGKILL)


def _save(exchange: Exchange, folder: str) -> list[float]:
    case = exchange.case
    with training.layout(case), optimizer_of(exchange.saver, case):
        made = build(exchange, seed=0)
        training.train(made, BEFORE)
        checkpoints.save(made, case, folder, exchange.sharding)
        return training.train(made, AFTER)


def load_all(folder: str, exchanges: tuple[Exchange, ...]) -> list[tuple[list[float], list[Any]]]:
    """Build another model, load, and train on, for every exchange. Return losses, and the step counts in the groups."""
    out = {i: _load(exchanges[i], f"{folder}/{i}") for i in by_layout(exchanges)}
    return [out[i] for i in range(len(out))]


def _load(exchange: Exchange, folder: str) -> tuple[list[float], list[Any]]:
    case = exchange.case
    with training.layout(case), optimizer_of(exchange.loader, case):
        made = build(exchange, seed=7)
        checkpoints.load(made, case, folder, exchange.sharding)
        losses = training.train(made, AFTER)
    return losses, [group["step"] for inner in made.inner() for group in inner.param_groups]


@functools.cache
def resumed(
    world: int, exchanges: tuple[Exchange, ...]
) -> tuple[list[list[float]], list[list[tuple[list[float], list[Any]]]]]:
    """The losses after each save, and the losses and step counts after each load in each process."""
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(RuntimeError, match="have not ended in time"):
            run(world, save_all, folder, exchanges, seconds=500)
        return json.loads(Path(folder, "losses.json").read_text()), run(world, load_all, folder, exchanges, seconds=500)


def check(world: int, exchanges: tuple[Exchange, ...], exchange: Exchange) -> None:
    before, after = resumed(world, exchanges)
    index = exchanges.index(exchange)
    for result in after:
        losses, steps = result[index]
        assert losses == before[index]
        assert set(steps) == {AFTER.stop}


@pytest.mark.parametrize("exchange", CORE, ids=str)
def test_a_killed_run_goes_on_to_the_last_bit(exchange):
    check(2, CORE, exchange)


@pytest.mark.wide
@pytest.mark.parametrize("exchange", WIDE[2], ids=str)
def test_a_killed_run_of_two_processes_with_width_groups_goes_on_to_the_last_bit(exchange):
    check(2, WIDE[2], exchange)


@pytest.mark.four
@pytest.mark.parametrize("exchange", WIDE[4], ids=str)
def test_a_killed_run_of_four_processes_with_width_groups_goes_on_to_the_last_bit(exchange):
    check(4, WIDE[4], exchange)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("world", "exchanges", "exchange"),
    [
        pytest.param(world, exchanges, exchange, id=f"{world} processes: {exchange}")
        for (world, _), exchanges in WHOLE.items()
        for exchange in exchanges
    ],
)
def test_a_killed_run_on_the_kernels_goes_on_to_the_last_bit_in_every_layout(world, exchanges, exchange):
    check(world, exchanges, exchange)
