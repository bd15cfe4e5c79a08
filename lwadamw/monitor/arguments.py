"""Checks of what a monitor is given: its numbers, its optimizer, its probe, and the columns of the probe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from ..state.arrays import Array
from ..state.collectives import READING
from ..state.itself import itself
from ..state.places import place_of
from ..state.telling import tell
from ..step.optimizer import AdamW
from .measured import Joined, Measured


def check_number(name: str, value: object, least: int) -> None:
    """Raise a ValueError if an argument of `Monitor` is not a whole number of at least `least`.

    Args:
        name: name of the argument.
        value: what the user gave.
        least: the smallest value that is allowed.
    """
    if not (isinstance(value, int) and value >= least):
        raise ValueError(f"Monitor: {name}={value!r} is not a whole number >= {least}.")


def optimizer_behind(given: Any) -> Any:
    """Return the `lwadamw.AdamW` that an object of a framework wraps, or what was given if it wraps none.

    Args:
        given: an optimizer, or an object that derives from its class, or that has it as its attribute `optimizer`.
    """
    found = given
    while found is not None and not isinstance(found, AdamW):
        found = getattr(found, "optimizer", None)
    return given if found is None else itself(found)


def check_optimizer(optimizer: object) -> None:
    """Check that a monitor can read the norms of an optimizer.

    Args:
        optimizer: what the user gave.

    Raises:
        TypeError: it is not an `lwadamw.AdamW`.
        RuntimeError: it was built with norms=False.
    """
    if isinstance(optimizer, Joined):
        for one in optimizer.optimizers:
            check_optimizer(one)
        return
    if not isinstance(optimizer, AdamW):
        raise TypeError(
            f"Monitor: a {type(optimizer).__module__}.{type(optimizer).__qualname__} does not measure its steps. Use "
            "lwadamw.AdamW, which takes the arguments of torch.optim.AdamW, and give this optimizer as one of others."
        )
    if not optimizer.options.norms:
        raise RuntimeError("Monitor: this AdamW was built with norms=False. Build it with norms=True.")


def check_model(model: Any, optimizer: Measured) -> None:
    """Check that a model is one that the optimizer trains, in whole or in part.

    Frozen parameters, parameters of other optimizers and parameters of other stages of a pipeline are normal. So a model is
    refused only if it has trainable parameters and the optimizer has none of its parameters. Where an engine gives the
    optimizer placed pieces or shards of parameters, nothing can be said.

    Args:
        model: what the user gave, or None.
        optimizer: the optimizer, together with the others.

    Raises:
        ValueError: the optimizer has none of the model's parameters.
    """
    if not isinstance(model, nn.Module) or isinstance(optimizer, Joined) or optimizer.shards.declared:
        return
    held = [p for group in optimizer.param_groups for p in group["params"]]
    own = {id(p) for p in held}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not own or not trained or any(id(p) in own for p in model.parameters()):
        return
    if any(place_of(p) is not None for p in held):
        return
    name, p = trained[0]
    raise ValueError(
        f"Monitor: model: none of its {len(trained)} trainable parameters belongs to the optimizer, for instance {name!r} "
        f"{tuple(p.shape)}. The optimizer has {len(held)} other tensors, of shape {tuple(held[0].shape)} the first. "
        "Give the model whose parameters() the optimizer was built of, or build the optimizer after every conversion that "
        "replaces parameters. If another optimizer trains this model, give it in others=[...]. "
        "Without a probe, leave model out."
    )


def steps_of(optimizer: Measured) -> int:
    """Return the number of steps that an optimizer has taken, the same on every process that holds parts of its parameters.

    This is collective if the optimizer was built with `shard_group`, because a process may hold no parameter.

    Args:
        optimizer: the optimizer.
    """
    steps = optimizer.steps_taken()
    for split in optimizer.shards.declared:
        steps = tell(split, {"": steps}, max, READING)[""]
    return steps


def writes(optimizer: Measured) -> bool:
    """Return whether this process is the one to write, of all that hold parts of the same parameters.

    It is the first one along every dimension of every device mesh, and the first one of every process group of `shard_group`
    and of `Joined.alike`.

    Args:
        optimizer: the optimizer.
    """
    meshes = {p.device_mesh for group in optimizer.param_groups for p in group["params"] if hasattr(p, "device_mesh")}
    coordinates = [place for mesh in meshes for place in mesh.get_coordinate() or ()]
    groups = [group for split in optimizer.shards.declared for group in split.groups]
    groups += optimizer.alike if isinstance(optimizer, Joined) else []
    return not any(coordinates) and all(group.rank() == 0 for group in groups)


def probe_of(probe: Any, optimizer: Measured, model: nn.Module | None, spectrum_every: int) -> Any:
    """Return the probe, or make a probe from a batch.

    Args:
        probe: a `Probe`, any other object with `before_step` and `after_step`, or the batch for a new probe.
        optimizer: the optimizer whose steps the new probe measures.
        model: the model that the new probe runs on the batch.
        spectrum_every: steps from one question to the probe to the next.

    Raises:
        ValueError: spectrum_every is 0, or `probe` is a batch and there is no model.
        TypeError: `probe` is a batch, and there are several optimizers.
    """
    if not spectrum_every:
        raise ValueError(
            "Monitor: a probe with spectrum_every=0 is never asked. Give another spectrum_every, for instance 500."
        )
    if hasattr(probe, "before_step") and hasattr(probe, "after_step"):
        return probe
    if not isinstance(optimizer, AdamW):
        raise TypeError(
            "Monitor: a probe needs the weights of one lwadamw.AdamW. Leave `probe` out for several optimizers."
        )
    if model is None:
        raise ValueError("Monitor: a probe batch needs the model it is for. Give model=..., or a Probe.")
    from .probe import Probe

    return Probe(optimizer, model, probe)


def probe_columns(columns: Mapping[str, Array], count: int) -> dict[str, Array]:
    """Return what a probe measured, as columns of a reading.

    Args:
        columns: what `probe.after_step()` returned, by statistic.
        count: the number of segments.

    Raises:
        ValueError: the shape of some column is not (count,).
    """
    for name, values in columns.items():
        if np.shape(values) != (count,):
            raise ValueError(
                f"Monitor: the probe's {name!r} has shape {np.shape(values)}, {count} segments need ({count},). Return "
                "one value per name of optimizer.norm_names()."
            )
    return dict(columns)
