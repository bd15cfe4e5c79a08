"""Data parallel: frameworks that average a gradient over processes after autograd has accumulated it."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor

from ..state.members import ParamGroups, members_of


def check_not_averaged(params: Sequence[Tensor], groups: ParamGroups) -> None:
    """Check that the gradients of parameters are complete when autograd has accumulated them.

    Args:
        params: the parameters.
        groups: the optimizer's parameter groups.

    Raises:
        RuntimeError: DistributedDataParallel or FullyShardedDataParallel averages the gradient of one of them afterwards.
    """
    later = {id(p): "FullyShardedDataParallel" for p in params if getattr(p, "_is_flat_param", False)}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.nn.parallel import DistributedDataParallel

        # Nothing on a parameter tells that it is in a DistributedDataParallel. So look for the module.
        for module in [m for m in gc.get_objects() if issubclass(type(m), DistributedDataParallel)]:
            if torch.distributed.get_world_size(module.process_group) > 1:
                later |= {id(p): "DistributedDataParallel" for p in module.parameters()}
    if later.keys() & set(map(id, params)):
        m = next(m for m in members_of(groups) if id(m.param) in later)
        raise RuntimeError(
            f"release_gradients(): {later[id(m.param)]} averages the gradient of {m.name!r} {tuple(m.param.shape)} over "
            "processes after the parameter would have taken its step. Call step() after backward instead, or shard with "
            "torch.distributed.fsdp.fully_shard, whose gradients step() takes."
        )
