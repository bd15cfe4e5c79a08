"""attach: norms and a monitor of whole parameters under the model's names, from the pieces that Megatron's wrappers hold."""

from __future__ import annotations

import glob
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...monitor.measured import Joined
from ...monitor.monitor import Monitor
from ...state import keys
from ...state.names import give_name
from ...state.places import place_flat_shard
from ...step.norms import Norms
from ...step.optimizer import AdamW
from ...width.groups import Evidence
from ...width.roles import decide
from .agreement import same_error
from .overrides import known_evidence, unwrapped
from .pieces import inner_wrappers, layouts, params_of, pieces_of


class Watch:
    """A Megatron optimizer whose tensors know which parts of which parameters of the model they are. `attach` makes it.

    Args:
        joined: the inner optimizers as one; None: this process trains no parameter.
    """

    def __init__(self, joined: Joined | None) -> None:
        self._joined = joined

    def norms(self) -> Norms:
        """Return the norms of the last step, of whole parameters, by the model's names.

        Call it after `optimizer.step()` and before the gradients are cleared. This is collective: all processes make the call.
        Every process gets the parameters of its own pipeline stage and its own experts, in the order of the model. Norms of
        bfloat16 parameters are those of their float32 main weights.

        Raises:
            RuntimeError: the swap was made with norms=False, Megatron has other tensors than when `attach` was called, or
                another process did not make the call.
        """
        if self._joined is None:
            return Norms.from_sums((), torch.zeros(0, 4).numpy())
        return self._joined.norms()

    def monitor(
        self, every: int = 50, spectrum_every: int | None = None, steps: int | None = None, *, history: int = 256
    ) -> Monitor:
        """Return an `lwadamw.Monitor` of whole parameters, by the model's names, that makes its readings inside a step.

        This is collective, and so is a reading: every process calls this with the same arguments. All processes of a pipeline
        stage get the same values, but for their experts. The first process of its data-parallel and its tensor-parallel group
        is the one that writes.

        Args:
            every: as in `Monitor`.
            spectrum_every: as in `Monitor`.
            steps: as in `Monitor`.
            history: as in `Monitor`.

        Raises:
            ValueError: as in `Monitor`.
            RuntimeError: the swap was made with norms=False, or this process trains no parameter.
        """
        if self._joined is None:
            raise RuntimeError("watch.monitor(): this process trains no parameter. Leave the monitor out here.")
        return Monitor(self._joined, every=every, spectrum_every=spectrum_every, steps=steps, history=history)


def attach(optimizer: Any, model_chunks: Sequence[nn.Module]) -> Watch:
    """Tell the inner optimizers which part of which parameter of the model each of their tensors is.

    Afterwards their own `norms()` are those of whole parameters too, by the model's names. Names and places are kept in the
    tensors. What Megatron saves does not change. This is collective: call it once on every process, after
    `get_megatron_optimizer`, and again if something replaces the optimizer's tensors.

    Args:
        optimizer: what `get_megatron_optimizer` returned.
        model_chunks: the models that it was given.

    Returns:
        A `Watch`, with norms and a monitor of whole parameters.

    Raises:
        TypeError: `optimizer` is no optimizer of Megatron, its inner optimizer is not `lwadamw.AdamW`, or `model_chunks` is no
            list of models.
        ValueError: the optimizer was built for another model, or without the overrides that `config_overrides` made. All
            errors are the same on every process.

    Examples:
        >>> from lwadamw.engines import megatron
        >>> megatron.attach(None, [])
        Traceback (most recent call last):
        TypeError: attach: the optimizer is NoneType. Give what get_megatron_optimizer returned, after megatron.use().
    """
    with same_error():
        wrappers = _checked_wrappers(optimizer)
        params, evidence = _params_by_name(model_chunks)
        _check_model(wrappers, params)
        _check_overrides(wrappers, model_chunks)
    found = layouts(wrappers, params)
    # Names are no patterns.
    groups = {glob.escape(name): layout.groups for name, layout in found.items()}
    name_of = {id(p): name for name, p in params.items()}
    for wrapper in wrappers:
        for piece in pieces_of(wrapper):
            name = name_of[id(piece.param)]
            if piece.held.is_contiguous():
                layout = found[name]
                place_flat_shard(piece.held, layout.whole, piece.first, block=layout.block, name=name)
            else:
                give_name(piece.held, name)
        wrapper.optimizer.evidence.update(evidence)
        wrapper.optimizer.set_shard_group(groups)
    if not wrappers:
        return Watch(None)
    state = importlib.import_module("megatron.core.parallel_state")
    alike = [state.get_data_parallel_group(with_context_parallel=True), state.get_tensor_model_parallel_group()]
    return Watch(Joined([wrapper.optimizer for wrapper in wrappers], list(params), groups, alike))


def _checked_wrappers(optimizer: Any) -> list[Any]:
    wrappers = inner_wrappers(optimizer)
    for wrapper in wrappers:
        inner = getattr(wrapper, "optimizer", None)
        if not isinstance(inner, AdamW):
            is_inner = isinstance(inner, torch.optim.Optimizer)
            kind = f"torch's {type(inner).__name__}" if is_inner else type(wrapper).__name__
            raise TypeError(
                f"attach: the optimizer is {kind}. Give what get_megatron_optimizer returned, after megatron.use()."
            )
    return wrappers


def _params_by_name(model_chunks: Sequence[nn.Module]) -> tuple[dict[str, Tensor], dict[str, Evidence]]:
    """Return the trained parameters of all chunks by name, and what is known about their roles."""
    if isinstance(model_chunks, nn.Module) or not all(isinstance(chunk, nn.Module) for chunk in model_chunks):
        raise TypeError("attach: model_chunks is not a list of models. Give what get_megatron_optimizer got: [model].")
    params: dict[str, Tensor] = {}
    evidence: dict[str, Evidence] = {}
    for i, chunk in enumerate(model_chunks):
        model, prefix = unwrapped(chunk), f"chunk {i}: " if len(model_chunks) > 1 else ""
        known = known_evidence(model)
        if known is None:
            decided = [d for d in decide(model, {}) if d.decision.role is not None]
            known = {d.name: Evidence(d.role, d.fan_in, None, d.decision.why) for d in decided}
        evidence |= {prefix + name: found for name, found in known.items()}
        params |= {prefix + name: p for name, p in model.named_parameters() if p.requires_grad}
    return params, evidence


def _check_model(wrappers: Sequence[Any], params: Mapping[str, Tensor]) -> None:
    """Check that the optimizer updates the parameters of the model, and no others."""
    name_of = {id(p): name for name, p in params.items()}
    updated = [p for wrapper in wrappers for p in params_of(wrapper)]
    strange = [p for p in updated if id(p) not in name_of]
    left_out = [name for name in params if name not in {name_of.get(id(p)) for p in updated}]
    if strange or left_out:
        what = (
            f"the optimizer updates {len(strange)} parameters that are not in model_chunks, the first of shape "
            f"{tuple(strange[0].shape)}"
            if strange
            else f"model_chunks has {left_out[0]!r} {tuple(params[left_out[0]].shape)}, which the optimizer does not update"
        )
        raise ValueError(f"attach: {what}. Give the list of models that get_megatron_optimizer got for this optimizer.")


def _check_overrides(wrappers: Sequence[Any], model_chunks: Sequence[nn.Module]) -> None:
    """Check that the overrides of `config_overrides` have reached the groups."""
    if all(known_evidence(unwrapped(chunk)) is None for chunk in model_chunks):
        return
    groups = [group for wrapper in wrappers for group in wrapper.optimizer.param_groups]
    if any(keys.ROLE.name not in group for group in groups if group["params"]):
        raise ValueError(
            "attach: config_overrides was called for this model, and the groups of the optimizer have no roles, so the width "
            "rule is not in use. Build the optimizer with get_megatron_optimizer(config, model_chunks, "
            "config_overrides=overrides)."
        )
