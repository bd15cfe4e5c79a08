"""Wrong uses of `attach` and `config_overrides`, tried in each process."""

from __future__ import annotations

from typing import Any

from . import training
from .training import Case


def errors() -> dict[str, str]:
    """Wrong uses by name, and the error of each."""
    import torch
    import torch.distributed as dist

    from lwadamw.engines.megatron import attach, config_overrides

    out: dict[str, str] = {}

    def note(name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            out[name] = f"{type(error).__name__}: {error}"

    case = Case("distributed bf16")
    with training.layout(case):
        with training.optimizer_of("torch", case):
            theirs = training.build(case, layers=1)
        with training.optimizer_of("ours", case, backend="torch"):
            made, other = training.build(case, layers=1), training.build(case, layers=1)

            def unused(config: Any, chunks: list[Any]) -> None:
                config_overrides(config, chunks, base_width=8)

            without = training.build(case, layers=1, overrides=unused)
        with training.optimizer_of("ours", case, norms=False):
            blind = training.build(case, layers=1)
        (wrapper,) = made.optimizer.chained_optimizers
        note("no optimizer yet", attach, None, [made.model])
        note("its config", attach, wrapper.config, [made.model])
        note("no list", attach, made.optimizer, made.model)
        note("torch's", attach, theirs.optimizer, [theirs.model])
        # Only one process makes these two mistakes.
        note("another model", attach, made.optimizer, [(other if dist.get_rank() else made).model])
        more = [torch.nn.Linear(3, 2)] if dist.get_rank() else []
        note("another chunk", attach, made.optimizer, [made.model, *more])
        note("unused overrides", attach, without.optimizer, [without.model])
        note("overrides too late", config_overrides, wrapper.config, [made.model], 8)
        note("no norms", attach(blind.optimizer, [blind.model]).norms)
        note("no monitor", attach(blind.optimizer, [blind.model]).monitor)
    case = Case("bf16", tp=2)
    with training.layout(case), training.optimizer_of("ours", case, backend="torch"):
        made = training.build(case, layers=1)
        watch = attach(made.optimizer, [made.model])
        (wrapper,) = getattr(made.optimizer, "chained_optimizers", [made.optimizer])
        replacement = wrapper.fp32_from_float16_groups[0][-1].clone()
        wrapper.fp32_from_float16_groups[0][-1] = wrapper.optimizer.param_groups[0]["params"][-1] = replacement
        training.step(made, 0)
        note("replaced", watch.norms)
        watch = attach(made.optimizer, [made.model])
        training.step(made, 1)
        note("attached again", watch.norms)
    return out
