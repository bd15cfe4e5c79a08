"""The cases that the tests of training and of checkpoints share: every wrapper in every layout."""

from __future__ import annotations

from .training import Case

WRAPPERS = {
    "fp32": "FP32Optimizer",
    "bf16": "Float16OptimizerWithFloat16Params",
    "distributed fp32": "DistributedOptimizer",
    "distributed bf16": "DistributedOptimizer",
    "aware": "DistributedOptimizer",
    "aware remainder": "DistributedOptimizer",
}
# Tensor, data or expert parallelism over two processes.
TWO = tuple(
    Case(wrapper, slim=True, **layout)
    for wrapper in WRAPPERS
    for layout in ({"tp": 2}, {}, {"ep": 2})  # type: ignore[arg-type]
)
# Tensor parallelism times data parallelism over four processes.
FOUR = tuple(Case(wrapper, tp=2, slim=True) for wrapper in WRAPPERS)
