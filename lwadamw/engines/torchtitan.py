"""torchtitan: an optimizer container whose groups come from a width rule, with rule and base width in its config.

torchtitan is imported when a function is called. Run with torchtitan 0.3.0.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..monitor.monitor import Monitor
from ..monitor.reading import Reading
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
        ```python
        optimizer=lwadamw.engines.torchtitan.config(lr=3e-3, weight_decay=0.1, base_width=256)
        ```
    """
    return container().Config(**values)


def watched(config: Any, *, prefix: str = "norms/", roles_only: bool = False, **monitor: Any) -> Any:
    """Return a trainer config whose Trainer has a monitor: its readings are logged, and its state is in the checkpoints.

    Args:
        config: a config of torchtitan's Trainer, or of a subclass. Its `optimizer` comes from `config` of this module.
        prefix: text in front of every key in the metrics loggers.
        roles_only: log totals and medians of every role, and nothing of single parameters: see `Monitor.as_dict`.
        **monitor: arguments of `lwadamw.Monitor` but the optimizer, for instance `every=100`.

    Returns:
        The config of a subclass of the Trainer that `config` builds. The subclass has the attribute `monitors`, one
        `lwadamw.Monitor` for each model part. A checkpoint that was written without monitors lacks the key `width_monitor`:
        to load it, add this key to `checkpoint.exclude_from_loading`.

    Examples:
        ```python
        return lwadamw.engines.torchtitan.watched(config, every=100)
        ```
    """
    owner: Any = type(config)._owner

    class WatchedTrainer(owner):  # type: ignore[misc]
        """A Trainer with monitors."""

        @dataclass(kw_only=True, slots=True)
        class Config(type(config)):  # type: ignore[misc]
            """The config of the Trainer."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.monitors = [Monitor(optimizer, **monitor) for optimizer in self.optimizers.optimizers]
            for watch in self.monitors:
                watch.on_reading.append(functools.partial(self._log, watch))
            if hasattr(self.checkpointer, "states"):
                # Checkpoints are loaded in the order of the keys, and a monitor follows its optimizer.
                self.checkpointer.states["width_monitor"] = _Saved(self.monitors)

        def _log(self, watch: Monitor, _: Reading) -> None:
            self.metrics_processor.logger.log(watch.as_dict(prefix, roles_only), watch.step)

    return WatchedTrainer.Config(**{each.name: getattr(config, each.name) for each in fields(config)})


class _Saved:
    """Monitors in a checkpoint, as one text for each model part, under the name of its first parameter."""

    def __init__(self, monitors: Sequence[Monitor]) -> None:
        self._monitors = {watch.optimizer.param_groups[0]["param_names"][0]: watch for watch in monitors}

    def state_dict(self) -> dict[str, str]:
        """Return the state of each monitor."""
        return {name: json.dumps(watch.state_dict()) for name, watch in self._monitors.items()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Go on from what `state_dict` returned."""
        for name, watch in self._monitors.items():
            watch.load_state_dict(json.loads(state[name]))


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
