"""FusedAdam: `lwadamw.AdamW` with the constructor, the step counts and the state methods that Megatron expects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ...state import keys
from ...step.optimizer import AdamW
from .alive import ALIVE

_MASTER = "master_param"
# A state of which nobody else has a reference.
_ALONE: Final[dict[str, Any]] = {"state": {}}
# What a user may set. Megatron's own configuration decides about everything else.
OPTIONS = ("backend", "decay", "norms", "peak_lr")


class FusedAdam(AdamW):
    """AdamW with the signature of Transformer Engine's and apex's FusedAdam, for Megatron's optimizer wrappers.

    Megatron keeps one count of steps in `group["step"]`, the same int in every group, and saves no other. This class writes
    the int into every group, empty ones too. A step begins by looking at these ints: where somebody has changed one, or has
    loaded state, the int overrules the `step` of every parameter of the group. A group without the int takes it over from
    the state of its parameters.

    Args:
        params: parameters or parameter groups.
        lr: as in `lwadamw.AdamW`.
        bias_correction: has to be True.
        betas: as in `lwadamw.AdamW`.
        eps: as in `lwadamw.AdamW`.
        adam_w_mode: has to be True: the decay is decoupled from the gradient.
        weight_decay: as in `lwadamw.AdamW`. The default is Transformer Engine's.
        amsgrad: has to be False. Megatron saves no third moment.
        capturable: has to be False. A replayed graph would not advance `group["step"]`, and Megatron would save a wrong count.
        master_weights: keep a float32 master weight of every 16-bit parameter.
        master_weight_dtype: torch.float32.
        exp_avg_dtype: torch.float32 or torch.bfloat16.
        exp_avg_sq_dtype: torch.float32 or torch.bfloat16.
        use_decoupled_grad: gradients are in `p.decoupled_grad`.
        store_param_remainders: keep a master weight as the lower 16 bits, which a bfloat16 parameter lacks.
        set_grad_none: ignored, as in Transformer Engine.
        options: `backend`, `decay`, `norms` and `peak_lr` of `lwadamw.AdamW`.

    Raises:
        ValueError: an argument has a value that is refused above.
        TypeError: an option is not one of those above.
    """

    # What `use` was called with.
    preset: ClassVar[Mapping[str, Any]] = {}

    # The ints that the last step wrote into the groups. None: somebody may have changed groups or state since.
    _counts: list[int] | None = None

    @_disable_dynamo
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        capturable: bool = False,
        master_weights: bool | None = False,
        master_weight_dtype: torch.dtype | None = torch.float32,
        exp_avg_dtype: torch.dtype | None = torch.float32,
        exp_avg_sq_dtype: torch.dtype | None = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
        **options: Any,
    ) -> None:
        options = {**self.preset, **options}
        check_options(options)
        _refuse(
            adam_w_mode=adam_w_mode, bias_correction=bias_correction, amsgrad=not amsgrad, capturable=not capturable
        )
        for name, dtype in (("exp_avg_dtype", exp_avg_dtype), ("exp_avg_sq_dtype", exp_avg_sq_dtype)):
            if dtype not in (None, torch.float32, torch.bfloat16):
                raise ValueError(
                    f"FusedAdam: {name}={dtype}. Only torch.float32 and torch.bfloat16 are supported here: Transformer "
                    "Engine's float16 and fp8 moments have a scale of their own, which no checkpoint of lwadamw has. Set "
                    f"{name}=torch.bfloat16 in the OptimizerConfig."
                )
        if master_weights and master_weight_dtype not in (None, torch.float32):
            raise ValueError(
                f"FusedAdam: master_weight_dtype={master_weight_dtype}. Master weights are float32. Set "
                "main_params_dtype=torch.float32 in the OptimizerConfig."
            )
        master = ("remainder" if store_param_remainders else torch.float32) if master_weights else None
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            # float32 is what a parameter with a master weight, and a float32 parameter, get by themselves.
            exp_avg_dtype=None if exp_avg_dtype is torch.float32 else exp_avg_dtype,
            exp_avg_sq_dtype=None if exp_avg_sq_dtype is torch.float32 else exp_avg_sq_dtype,
            master_weights=master,
            grad_attribute="decoupled_grad" if use_decoupled_grad else "grad",
            **options,
        )
        ALIVE.add(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in `AdamW`. If its decay law needs a `peak_lr`, the peak is the group's `max_lr`."""
        law = param_group.get(keys.DECAY.name, self.options.group.get(keys.DECAY.name))
        peak = self.options.group.get(keys.PEAK_LR.name)
        if law in ("independent", "corrected") and peak is None and param_group.get("max_lr") is not None:
            param_group.setdefault(keys.PEAK_LR.name, float(param_group["max_lr"]))
        super().add_param_group(param_group)

    @_disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step as `AdamW.step` does, with the step counts that the groups have."""
        groups = self.param_groups
        # Megatron's wrappers read the empty state of a new optimizer, and do not keep it.
        shared = self._state_was_shared = self._state_was_shared and not _is_empty_and_alone(self.__dict__)
        counts = [group.pop("step", None) for group in groups]  # so that the step sees the same groups as the last one
        taken = 0
        try:
            if self._counts is None or counts != self._counts:
                counts = self._follow_counts(counts)
            loss = self._take_step(closure)
            if closure is None:
                self._state_was_shared = shared
            taken = 1
        finally:
            for group, count in zip(groups, counts, strict=True):
                if count is not None:
                    group["step"] = count + taken
        self._counts = [count + 1 for count in counts]
        return loss

    @torch.no_grad()
    def _follow_counts(self, counts: Sequence[Any]) -> list[int]:
        """Write the step count of each group to the state of its parameters.

        Args:
            counts: `group["step"]` of each group, or None.

        Returns:
            The step count of each group.
        """
        state = self.__dict__["state"]
        self._state_was_shared = True  # so that the step sees a `step` that is added here
        found: list[int | None] = []
        for group, count in zip(self.param_groups, counts, strict=True):
            held = [state[p] for p in group["params"] if state.get(p)]
            if count is None:
                found.append(max((int(one["step"]) for one in held if "step" in one), default=None))
                continue
            found.append(int(count))
            for one in held:
                if isinstance(one.get("step"), Tensor):
                    one["step"].fill_(found[-1])
                else:
                    one["step"] = torch.tensor(float(found[-1] or 0), dtype=torch.float32, device="cpu")
        latest = max((count for count in found if count is not None), default=0)
        return [latest if count is None else count for count in found]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, as in `AdamW`. The step counts of its groups, if there are any, overrule those of its state."""
        self._counts = None
        super().load_state_dict(state_dict)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._counts = None

    def steps_taken(self) -> int:
        """Return the number of steps, as in `AdamW`. After a checkpoint was loaded, only the groups may know it."""
        counts = [int(group["step"]) for group in self.param_groups if "step" in group]
        return max(counts) if counts else super().steps_taken()

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        """Return one state tensor of a parameter, as in `AdamW`. A remainder is returned as it is stored, in int16.

        Args:
            p: a parameter of this optimizer.
            name: "exp_avg", "exp_avg_sq" or "master_param".
        """
        if name == _MASTER and name in self.state[p] and self.state[p][name].dtype == torch.int16:
            remainder: Tensor = self.state[p][name].clone()
            return remainder
        return super().get_unscaled_state(p, name)

    def set_scaled_state(self, p: Tensor, name: str, values: Tensor) -> None:
        """Write values into one state tensor of a parameter, as in `AdamW`.

        Args:
            p: a parameter of this optimizer.
            name: "exp_avg", "exp_avg_sq" or "master_param"; any other name is ignored.
            values: float32 of the parameter's shape; for "master_param" also an int16 remainder, or the same numbers in
                float32, as Megatron's fully_reshardable checkpoints hold them.
        """
        self._counts = None
        held = self.state[p].get(_MASTER)
        if name == _MASTER and held is not None and held.dtype == torch.int16 and values.dtype == torch.float32:
            values = _as_remainder(p, values)
        super().set_scaled_state(p, name, values)

    def initialize_state(self, p: Tensor, store_param_remainders: bool | None = None) -> None:
        """Create the state of a parameter as its group asks. Arguments are those of `AdamW.initialize_state`."""
        self._counts = None
        super().initialize_state(p, store_param_remainders)


def _is_empty_and_alone(attributes: dict[str, Any]) -> bool:
    """Return whether the state in the attributes of an optimizer is empty, and nobody else has a reference to it."""
    return not attributes["state"] and sys.getrefcount(attributes["state"]) == sys.getrefcount(_ALONE["state"])


def _as_remainder(p: Tensor, values: Tensor) -> Tensor:
    """Return the int16 remainders that Megatron has passed through a float32 buffer, or float32 weights as they are.

    Weights round to the parameter that they belong to, which Megatron loads first. Remainders do not, and are whole numbers of
    16 bits.

    Args:
        p: the bfloat16 parameter.
        values: float32 of its shape.
    """
    if torch.equal(values.to(p.dtype), p.detach()):
        return values
    numbers = values.clamp(-(2**15), 2**15 - 1).to(torch.int16)
    return numbers if torch.equal(numbers.float(), values) else values


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an error if an option of `use` belongs to Megatron's configuration, or cannot work under Megatron.

    Args:
        options: arguments of `lwadamw.AdamW` by name.

    Raises:
        ValueError: `max_grad_norm`, or a decay law whose state Megatron cannot save.
        TypeError: any other option that is not in `OPTIONS`.
    """
    if options.get("max_grad_norm") is not None:
        raise ValueError(
            f"max_grad_norm={options['max_grad_norm']}: Megatron clips by itself, by the norm over all processes, before it "
            "calls the optimizer. A second norm would be that of one process. Leave max_grad_norm out, and set "
            f"clip_grad={options['max_grad_norm']} in the OptimizerConfig."
        )
    unknown = [name for name in options if name not in (*OPTIONS, "max_grad_norm")]
    if unknown:
        raise TypeError(
            f"{unknown[0]} is not an option of lwadamw under Megatron. The options are {', '.join(OPTIONS)}. Learning rates, "
            "betas, eps, weight decay, moments and master weights are those of Megatron's OptimizerConfig."
        )
    if options.get("decay") == "huber":
        raise ValueError(
            "decay='huber' keeps a threshold for each parameter, and Megatron's checkpoints can hold only state of the shape "
            f"of the parameter. Use one of {', '.join(repr(law) for law in keys.DECAY.values if law != 'huber')}."
        )


def _refuse(**expected: bool) -> None:
    """Raise a ValueError for the first argument that does not have the value that is supported."""
    remedies = {
        "adam_w_mode": "adam_w_mode=False is Adam with L2 regularisation. lwadamw has AdamW only. Set "
        "decoupled_weight_decay=True in the OptimizerConfig",
        "bias_correction": "bias_correction=False. lwadamw always corrects the bias of the moments. Leave it out",
        "amsgrad": "amsgrad=True. Megatron's checkpoints do not hold a third moment. Leave it out",
        "capturable": "capturable=True. A replayed graph does not advance group['step'], so Megatron would save a wrong step "
        "count. Set optimizer_cuda_graph=False in the OptimizerConfig",
    }
    for name, supported in expected.items():
        if not supported:
            raise ValueError(f"FusedAdam: {remedies[name]}.")
