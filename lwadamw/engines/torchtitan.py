"""torchtitan: an optimizer container whose groups come from a width rule, with rule and base width in its config.

torchtitan is imported when a function is called. Run with torchtitan 0.3.0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..step.optimizer import AdamW
from ..width.groups import Groups, param_groups


def config(**values: Any) -> Any:
    """Return a config for `optimizer=` of a torchtitan trainer config.

    Args:
        **values: `lr`, `weight_decay`, `betas` (0.9, 0.95 as in torchtitan) and `eps`: base values; `base_width`, `rule` and
            `width`: as in `lwadamw.param_groups`, further arguments of which go into the dict `groups`; further arguments of
            `lwadamw.AdamW` into the dict `adamw`. Without `base_width` there is no rule: one group of all parameters.

    Returns:
        An `OptimizersContainer.Config`. Its `build(model_parts=...)` makes one `lwadamw.AdamW` for each model part.

    Raises:
        ModuleNotFoundError: torchtitan is not installed.
        TypeError: a value has another name.

    Examples:
        optimizer=lwadamw.engines.torchtitan.config(lr=3e-3, weight_decay=0.1, base_width=256)
    """
    return container().Config(**values)


@functools.cache
def container() -> type[Any]:
    """Return the subclass of torchtitan's OptimizersContainer. `config` makes its config."""
    titan: Any = importlib.import_module("torchtitan.components.optimizer")
    names: Any = importlib.import_module("torchtitan.components.optimizer.optimizer")
    canonical = names.canonical_fqn

    class WidthContainer(titan.OptimizersContainer):  # type: ignore[misc]
        """One `lwadamw.AdamW` for each model part."""

        @dataclass(kw_only=True, slots=True)
        class Config(titan.OptimizersContainer.Config):  # type: ignore[misc]
            """Base values, and where the groups come from. `lwadamw.engines.torchtitan.config` describes the fields."""

            lr: float = 1e-3
            weight_decay: float = 1e-2
            betas: tuple[float, float] = (0.9, 0.95)
            eps: float = 1e-8
            base_width: Any = None
            rule: Any = "fan2025"
            width: int | None = None
            groups: Mapping[str, Any] = field(default_factory=dict)
            adamw: Mapping[str, Any] = field(default_factory=dict)

        def __init__(self, config: Any, *, model_parts: list[Any]) -> None:
            self.model_parts, self.optimizers = model_parts, []
            for part in model_parts:
                groups = _groups(part, config, canonical)
                self.optimizers.append(
                    AdamW(
                        groups,
                        **{
                            "lr": config.lr,
                            "betas": config.betas,
                            "eps": config.eps,
                            "weight_decay": config.weight_decay,
                            **config.adamw,
                        },
                    )
                )
            all_params = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
            self._validate_params(all_params)
            self._post_init(all_params)

    return WidthContainer


def _groups(part: Any, config: Any, canonical: Any) -> Groups:
    """Return the groups of a model part under the names that torchtitan's checkpoints use."""
    if config.base_width is None:
        pairs = [(canonical(name), p) for name, p in part.named_parameters() if p.requires_grad]
        return Groups([{"params": pairs}], {})
    groups = param_groups(part, config.base_width, config.rule, width=config.width, **config.groups)
    for group in groups:
        group["params"] = [(canonical(name), p) for name, p in group["params"]]
    return Groups(groups, {canonical(name): found for name, found in groups.evidence.items()})
