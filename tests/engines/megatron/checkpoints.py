"""Saving and loading through megatron-core's distributed checkpoints."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .training import Case, Run


def save(run: Run, case: Case, folder: str, sharding: str = "dp_reshardable") -> None:
    """Write model, optimizer and scheduler. Every process calls it.

    Args:
        run: what to save.
        case: how it was built.
        folder: where to; made anew.
        sharding: how DistributedOptimizer lays out its state: "dp_reshardable" or "fully_reshardable".
    """
    from megatron.core import dist_checkpointing

    # Megatron writes from processes of its own. A process of pytest may not have any, and they would outlive it.
    multiprocessing.current_process()._config["daemon"] = False
    multiprocessing.util.Finalize(None, stop_writers, exitpriority=100)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
    dist.barrier()
    dist_checkpointing.save(_state(run, case, sharding, loading=False), folder)
    dist.barrier()


def stop_writers() -> None:
    """End the processes from which Megatron writes."""
    for child in multiprocessing.active_children():
        child.kill()


def load(run: Run, case: Case, folder: str, sharding: str = "dp_reshardable") -> None:
    """Read what `save` has written, in Megatron's order: model, optimizer, scheduler."""
    from megatron.core import dist_checkpointing

    assert Path(folder).exists()
    loaded = dist_checkpointing.load(_state(run, case, sharding, loading=True), folder)
    run.model.module.load_state_dict(loaded["model"])
    # Megatron copies into views of float32 parameters, which autograd refuses.
    with torch.no_grad():
        run.optimizer.load_state_dict(loaded["optimizer"])
    run.scheduler.load_state_dict(loaded["scheduler"])


def _state(run: Run, case: Case, sharding: str, *, loading: bool) -> dict[str, Any]:
    model = run.model.module.sharded_state_dict()
    metadata = {"metadata": {"distrib_optim_sharding_type": sharding}} if case.sharded else {}
    return {
        "model": model,
        "optimizer": run.optimizer.sharded_state_dict(model, is_loading=loading, **metadata),
        "scheduler": run.scheduler.state_dict(),
    }
