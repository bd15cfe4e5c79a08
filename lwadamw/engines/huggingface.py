"""transformers.Trainer and accelerate: groups of a width rule in `create_optimizer`, and norms in the logs.

transformers is imported when a function is called. Run with transformers 5.24.0 and accelerate 1.15.0.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from ..step.optimizer import AdamW
from ..width.groups import param_groups
from .callbacks import Watching

_FILE: Final = "lwadamw_monitor.json"


class WidthTrainer:
    """Mixin for a Trainer: `class MyTrainer(WidthTrainer, transformers.Trainer): ...` trains with a rule.

    Learning rate, weight decay, betas and eps are those of the TrainingArguments: the values that were tuned at the base width.
    Schedulers and clipping of the Trainer work as always.

    Attributes:
        width: arguments of `lwadamw.param_groups` besides the model: `base_width`, `rule`, `roles` and others. Set it on
            the class or on the object before `train()`. Empty: no rule, and Trainer's own choice of what decays.
        adamw: further arguments of `lwadamw.AdamW`.

    Examples:
        ```python
        trainer = MyTrainer(model=model, args=args, train_dataset=data)
        trainer.width = {"base_width": 256}
        ```
    """

    width: Mapping[str, Any] = {}
    adamw: Mapping[str, Any] = {}
    optimizer: Any
    model: Any
    args: Any

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Make the optimizer, if there is none yet.

        Args:
            model: the model. None: that of the Trainer.
        """
        if self.optimizer is None:
            whole = self.model if model is None else model
            self.optimizer = adamw_of(whole, self.args, self.width or None, self._decayed, **self.adamw)
        return self.optimizer

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Log values, and with them the reading that a `callback()` has made since the last call."""
        for found in self.callback_handler.callbacks:  # type: ignore[attr-defined]
            if isinstance(found, _callback_class()):
                logs = {**logs, **found.unlogged()}
        super().log(logs, *rest, **options)  # type: ignore[misc]

    def _decayed(self, model: nn.Module) -> list[str]:
        names: list[str] = self.get_decay_parameter_names(model)  # type: ignore[attr-defined]
        return names


def adamw_of(
    model: nn.Module, args: Any, width: Mapping[str, Any] | None, decayed: Any = None, **options: Any
) -> AdamW:
    """Return an `lwadamw.AdamW` with the values of TrainingArguments.

    Args:
        model: the model.
        args: `transformers.TrainingArguments`, or another object with `learning_rate`, `weight_decay`,
            `adam_beta1`, `adam_beta2` and `adam_epsilon`.
        width: arguments of `lwadamw.param_groups` besides the model. None: no rule. With `fold=True`, the base values are
            those of the arguments too.
        decayed: without a rule: a function from the model to the names of the parameters that have weight decay. None: all.
        **options: further arguments of `lwadamw.AdamW`.

    Raises:
        ValueError: as `lwadamw.param_groups` and `lwadamw.AdamW`.
    """
    values: dict[str, Any] = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if width is not None:
        base = {key: {**values, **options}[key] for key in ("lr", "weight_decay", "eps")} if width.get("fold") else {}
        return AdamW(param_groups(model, **{**base, **width}), **{**values, **options})
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names = {name for name, _ in trained} if decayed is None else set(decayed(model))
    groups: list[dict[str, Any]] = [
        {"params": [pair for pair in trained if pair[0] in names]},
        {"params": [pair for pair in trained if pair[0] not in names], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], **{**values, **options})


def callback(every: int = 50, prefix: str = "", *, roles_only: bool = False, **options: Any) -> Any:
    """Return a callback for `Trainer(callbacks=[...])` that attaches a `Monitor` and logs its readings.

    With `WidthTrainer`, readings go to every tracker of `report_to`. With another Trainer they go to
    `trainer.state.log_history` alone, because trackers are called first. The monitor is saved beside each checkpoint, and is
    loaded from it by `train(resume_from_checkpoint=...)`.

    Args:
        every: steps from one reading to the next.
        prefix: text in front of every logged name.
        roles_only: log the totals and medians of every role, and nothing of single parameters: see `Monitor.as_dict`.
        **options: further arguments of `lwadamw.Monitor`.

    Returns:
        A `transformers.TrainerCallback`. Its attribute `monitor` is the `Monitor`, None before training.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        TypeError: when training starts: the Trainer's optimizer is no `lwadamw.AdamW`.
    """
    return _callback_class()({"every": every, **options}, prefix, roles_only)


@functools.cache
def _callback_class() -> type[Any]:
    transformers: Any = importlib.import_module("transformers")

    class WidthCallback(Watching, transformers.TrainerCallback):  # type: ignore[misc]
        """Logs readings. `lwadamw.engines.huggingface.callback` makes it."""

        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", _FILE)
            if state.global_step and os.path.exists(path):
                with open(path, encoding="utf-8") as file:
                    self.load_state_dict(json.load(file))
            self.attach(optimizer)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.has_unlogged():
                control.should_log = True

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.log_history and (values := self.unlogged()):
                state.log_history[-1].update(values)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.monitor is not None and state.is_world_process_zero:
                path = os.path.join(args.output_dir, f"checkpoint-{state.global_step}", _FILE)
                with open(path, "w", encoding="utf-8") as file:
                    json.dump(self.state_dict(), file)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.detach()

    return WidthCallback


__all__ = ["WidthTrainer", "adamw_of", "callback"]
