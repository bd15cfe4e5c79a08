"""The cases that the tests of training and of checkpoints share: every wrapper in every layout."""

from __future__ import annotations

import dataclasses

from .training import Case

WRAPPERS = {
    "fp32": "FP32Optimizer",
    "bf16": "Float16OptimizerWithFloat16Params",
    "distributed fp32": "DistributedOptimizer",
    "distributed bf16": "DistributedOptimizer",
    "aware": "DistributedOptimizer",
    "aware remainder": "DistributedOptimizer",
}
# Each wrapper once or twice over two processes, with biases. They run in every version.
CORE = (
    Case("fp32", tp=2),
    Case("bf16"),
    Case("distributed fp32", tp=2),
    Case("distributed bf16"),
    Case("aware"),
    Case("aware remainder", tp=2),
    Case("distributed fp32", ep=2),
)
# All other combinations of wrappers with tensor, data and expert parallelism over two processes.
TWO = tuple(
    case
    for wrapper in WRAPPERS
    for case in (Case(wrapper, tp=2, slim=True), Case(wrapper, slim=True), Case(wrapper, ep=2, slim=True))
    if dataclasses.replace(case, slim=False) not in CORE
)
# Tensor parallelism times data parallelism over four processes.
FOUR = tuple(Case(wrapper, tp=2, slim=True) for wrapper in WRAPPERS)
# Every wrapper in every layout, by number of processes and name of the layout.
EVERY = {
    (2, "tp 2"): tuple(Case(wrapper, tp=2, slim=True) for wrapper in WRAPPERS),
    (2, "dp 2"): tuple(Case(wrapper, slim=True) for wrapper in WRAPPERS),
    (2, "ep 2"): tuple(Case(wrapper, ep=2, slim=True) for wrapper in WRAPPERS),
    (4, "tp 2, dp 2"): FOUR,
}
