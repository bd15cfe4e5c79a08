"""AdamW: torch.optim.AdamW's interface over one fused, width-aware step that measures itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..state import keys
from ..state.decay import law_of
from ..state.exchange import StateExchange
from ..state.groups import complete_group, effective
from ..state.storage import check_options
from ..tables.request import Request
from .engine import Engine
from .gradient_release import GradientRelease
from .norms import Norms
from .options import Options


class AdamW(StateExchange):
    r"""AdamW for every parameter group in one fused step, with width scaling, clipping and norms inside it.

    Without the last three arguments and without width multipliers in its groups this is `torch.optim.AdamW`: same
    arguments, same update, same state, checkpoints that load both ways. Per element, with t the parameter's own step
    and effective eta, lambda, epsilon = base value x width multiplier:

        m <- beta1 m + (1 - beta1) g                 v <- beta2 v + (1 - beta2) g^2
        p <- p - eta lambda p - eta (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)

    As in torch, the decay is multiplied by the learning rate; Loshchilov & Hutter's original is not. `decay` knows others.

    `group["lr"]`, `group["weight_decay"]` and `group["eps"]` stay the base values tuned at the proxy width.
    The step multiplies them by `group["width_lr_mult"]`, `group["width_wd_mult"]` and `group["width_eps_mult"]`
    (`lwadamw.param_groups` sets these), so no scheduler and no loop that assigns `group["lr"]` can undo a rule.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups; `lwadamw.param_groups(...)` makes the latter.
        lr: base learning rate, a float or a one-element tensor. A float32 or float64 tensor on the parameters' device
            is read there at every step, without a synchronisation.
        betas: decay rates of the first and second moment, floats or one-element tensors, in [0, 1).
        eps: base value of the term added to the denominator.
        weight_decay: base weight decay.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        maximize: ascend instead of descend.
        foreach, fused: as in torch. `fused=False`, or `foreach` given without `fused=True`, asks for torch's own
            implementation and so for the torch backend. Not asked for anything, that one takes torch's fused kernel on
            the CPU, where torch itself would loop over a dozen operators.
        capturable: allow the step to be captured in a CUDA graph. Take one step before, keep gradients where they are
            with `zero_grad(set_to_none=False)`, and make hyperparameters that change between replays device tensors.
        differentiable: let autograd run through the step; torch backend only.
        max_grad_norm: clip by the global norm inside the step, as `torch.nn.utils.clip_grad_norm_` before it would,
            but without rewriting gradients. None: no clipping.
        nonfinite: what becomes of a step whose norm to clip by is not finite. "skip": it does not happen, and
            `skipped_steps` counts it. "raise": nor does it happen, and a RuntimeError follows as soon as the host gets to
            know without waiting, on a GPU at a later step. "pass": it happens, as after `clip_grad_norm_`.
        norms: measure the norms that `norms()` returns, with no pass over memory of their own. False: leave them out.
        backend: None takes the Triton kernels for parameters they can update and torch for the rest; "triton" insists
            on them (on CPU tensors with TRITON_INTERPRET=1 set); "torch" never uses them.
        exp_avg_dtype, exp_avg_sq_dtype: in which types the moments are created: torch.float32, torch.bfloat16, or 8 bits,
            torch.int8 and torch.uint8 in turn. None: float32 with master weights, else the parameter's, as in torch.
        master_weights: for bfloat16 and float16 parameters, keep the weight in float32: torch.float32 as a copy of 4 bytes
            per element, "remainder" as the 2 bytes that a bfloat16 parameter lacks. Both are exact.
        rounding: how such parameters are rounded without master weights. "nearest"; "stochastic", unbiased, bfloat16 only;
            "kahan", what rounding loses is kept in a second array of the parameter's type (`kahan_comp`).
        rounding_seed: of the random bits of stochastic rounding and 8-bit moments. They follow from it, the parameter's
            name, its step and the element, so they are the same however parameters are grouped or sharded.
        grad_attribute: where gradients are: "grad", or "main_grad" or "decoupled_grad" of frameworks that put them there.
        decay: what weight_decay takes from a weight: "coupled", as in torch; "independent" of the peak learning rate
            (Wortsman et al. 2309.14322); "corrected" for schedules (AdamC, Defazio 2506.02285); "huber" (Guo & Fan
            2511.14721). May differ by group. docs/decay.md has the formulas.
        peak_lr: highest base learning rate of the schedule, which "independent" and "corrected" divide by. None: a group's
            `lr`, or its `initial_lr`, as it is added. To be given where a scheduler has a peak of its own, as OneCycleLR has.
        huber_scale: threshold of "huber" over the mean of |w|.

    The storage options, from `exp_avg_dtype` to `grad_attribute`, may differ by group. They hold for state that is created;
    state that is there decides itself, until `convert_state()`. docs/storage.md has the table of what each costs.

    Raises:
        ValueError, TypeError: an argument or a group is not valid.
        RuntimeError: by `step()`, if backend="triton" cannot update some parameter, a gradient is sparse, or state
            does not fit its parameter. Nothing has been written then.

    Example:
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.norms().weight.shape
        (2,)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        nonfinite: str = "skip",
        norms: bool = True,
        backend: str | None = None,
        exp_avg_dtype: torch.dtype | None = None,
        exp_avg_sq_dtype: torch.dtype | None = None,
        master_weights: torch.dtype | str | None = None,
        rounding: str = "nearest",
        rounding_seed: int = 0,
        grad_attribute: str = "grad",
        decay: str = "coupled",
        peak_lr: float | None = None,
        huber_scale: float = 1.0,
    ) -> None:
        own = {
            "exp_avg_dtype": exp_avg_dtype,
            "exp_avg_sq_dtype": exp_avg_sq_dtype,
            "master_weights": master_weights,
            "rounding": rounding,
            "rounding_seed": rounding_seed,
            "grad_attribute": grad_attribute,
            "decay": decay,
            "peak_lr": peak_lr,
            "huber_scale": huber_scale,
        }
        self.options = Options(backend, nonfinite, bool(norms), keys.given((*keys.STORAGE, *keys.LAW), own))
        if backend == "triton" and (foreach or differentiable or fused is False):
            asked = "foreach=True" if foreach else "differentiable=True" if differentiable else "fused=False"
            raise ValueError(
                f"backend='triton' excludes {asked}, which asks for torch's implementation. Drop one of them."
            )
        check_options({**own, "foreach": foreach, "differentiable": differentiable, "amsgrad": amsgrad}, "")
        law_of(own)
        self.max_grad_norm = max_grad_norm
        self._engine = Engine(backend)
        # What param_groups found out about each parameter, by name.
        self.evidence: dict[str, Any] = dict(getattr(params, "evidence", {}))
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        self._released: GradientRelease | None = None
        self._state_was_shared = False

    @property
    def state(self) -> Any:
        """Optimizer state by parameter, as in torch: `step`, `exp_avg`, `exp_avg_sq` and, with amsgrad, `max_exp_avg_sq`.

        Whoever has had hold of it may replace or move a tensor at any time, so from then on every step looks whether
        somebody did.
        """
        self._state_was_shared = True
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self._state_was_shared = True
        self.__dict__["state"] = value

    @property
    def max_grad_norm(self) -> float | None:
        """Global norm above which gradients are scaled down; None: no clipping. May be changed at any time."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"max_grad_norm={value} is not positive. Give a norm to clip to, or None for no clipping.")
        if value is not None and self.__dict__.get("_released") is not None:
            raise RuntimeError(
                f"max_grad_norm={value} while gradients are released: the global norm would be known too late. "
                "Call remove() on the handle of release_gradients() first."
            )
        self._max_grad_norm = None if value is None else float(value)

    @property
    def grad_norm(self) -> Tensor | None:
        """Global gradient norm of the last step before clipping, float32[] on the device; None without max_grad_norm.

        It is overwritten by the next step. Reading its value on the host waits for the device.
        """
        return self._engine.grad_norm

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps did not happen because of a norm or a `found_inf`, int64[] on the device.

        Reading its value on the host waits for the device.
        """
        counter = self._engine.skipped
        return torch.zeros((), dtype=torch.int64) if counter is None else counter.clone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; width multipliers left out of a group that has one of them count as 1.

        Raises:
            ValueError: a width multiplier is not a finite number >= 0, a decay law is not known or lacks a peak_lr, or segments
                do not fit their parameter.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for key, value in self.options.group.items():
                group.setdefault(key, value)
            complete_group(group, len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise
        released: GradientRelease | None = getattr(self, "_released", None)
        if released is not None:
            released.add(group["params"])

    # A compiled training step calls this as it is. Not torch.compiler.disable, which would load the compiler on import.
    @_disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._released:
            request = Request(
                self._max_grad_norm,
                self.options.nonfinite,
                self.options.norms,
                getattr(self, "grad_scale", None),
                getattr(self, "found_inf", None),
            )
            self._engine.step(self.param_groups, self.__dict__["state"], request, verify_state=self._state_was_shared)
        return loss

    def norms(self) -> Norms:
        """Norms of the last step by parameter name: one copy from the device, which waits for it.

        On the torch backend they are computed now, from weights, state and gradients as they are: read them before
        gradients are cleared.

        Raises:
            RuntimeError: the optimizer was built with norms=False, or holds only shards of some parameter.
        """
        names, sums = self._sums()
        sharded = self._engine.sharded_member()
        if sharded is not None:
            raise RuntimeError(
                f"norms(): {sharded.name!r} {tuple(sharded.param.shape)} is sharded over processes, and the norm of a shard "
                "is not the norm of the matrix. Add norm_sums() up over the processes, then Norms.from_sums(names, sums)."
            )
        return Norms.from_sums(names, sums.cpu().numpy())

    def norm_sums(self) -> Tensor:
        """Sums behind `norms()`, float64[n, 4] on the device: weight, update, gradient squared, <weight before, update>.

        For those who hold shards: rows follow `norm_names()`, and the sums of several shards add up.
        """
        return self._sums()[1]

    def norm_names(self) -> list[str]:
        """Names of the rows of `norm_sums()`: every segment that has taken a step."""
        self._check_norms()
        return self._engine.norm_names(self.__dict__["state"])

    def _sums(self) -> tuple[list[str], Tensor]:
        self._check_norms()
        return self._engine.norm_sums(self.__dict__["state"])

    def _check_norms(self) -> None:
        if not self.options.norms:
            raise RuntimeError("this AdamW was built with norms=False. Build it with norms=True to read norms.")

    def steps_taken(self) -> int:
        """Return the largest number of steps that any parameter has taken. Waits for the device."""
        states = self.__dict__["state"].values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def effective(self) -> list[dict[str, float | Tensor]]:
        """Per group, the lr, weight_decay and eps the step uses, see `lwadamw.effective`."""
        return [effective(group)._asdict() for group in self.param_groups]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler may leave unscaling and skipping to the step."""
        fused = bool(self.defaults.get("fused"))
        return fused or self._engine.uses_triton(self.param_groups)

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass  # torch's constructor assigns it

    def release_gradients(self) -> GradientRelease:
        """From now on each parameter takes its step inside backward and drops its gradient, so that few exist at a time.

        `step()` then only calls its closure, and step hooks do not see the steps. The step of a parameter comes with its
        gradient's accumulation: one backward is one step. Norms are measured as always.

        Returns:
            A handle; `remove()` ends it. Also a context manager.

        Raises:
            RuntimeError: max_grad_norm is set, whose norm would be known too late, gradients are not kept in `grad`, or
                they are released already.
        """
        if self._max_grad_norm is not None:
            raise RuntimeError(
                f"release_gradients() with max_grad_norm={self._max_grad_norm}: the global norm is known only when all "
                "gradients are. Set optimizer.max_grad_norm = None."
            )
        for i, group in enumerate(self.param_groups):
            if keys.GRAD_ATTRIBUTE.of(group) != keys.GRAD_ATTRIBUTE.default:
                raise RuntimeError(
                    f"release_gradients(): group {i} has grad_attribute={keys.GRAD_ATTRIBUTE.of(group)!r}, which "
                    "autograd does not write. Leave it out."
                )
        if self._released is not None:
            raise RuntimeError(
                "release_gradients(): gradients are released already. Call remove() on the first handle."
            )

        def done() -> None:
            self._released = None

        params = [p for group in self.param_groups for p in group["params"]]
        self._released = GradientRelease(params, self._step_alone, done)
        return self._released

    def _step_alone(self, p: Tensor) -> None:
        self._engine.step_alone(
            self.param_groups,
            self.__dict__["state"],
            p,
            verify_state=self._state_was_shared,
            norms=self.options.norms,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; also clears `decoupled_grad` where groups take gradients from there. `main_grad` is its framework's."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            if keys.GRAD_ATTRIBUTE.of(group) == "decoupled_grad":
                for p in group["params"]:
                    grad = getattr(p, "decoupled_grad", None)
                    if set_to_none or grad is None:
                        p.decoupled_grad = None
                    else:
                        grad.zero_()

    def __getstate__(self) -> dict[str, Any]:
        own = {key: self.__dict__[key] for key in ("options", "_max_grad_norm", "evidence")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Not torch.optim.AdamW's, which fails on state that has no step yet.
        Optimizer.__setstate__(self, state)
        self.__dict__.setdefault("options", Options())
        self.__dict__.setdefault("_max_grad_norm", None)
        self.__dict__.setdefault("evidence", {})
        self.__dict__.setdefault("_released", None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            group["decoupled_weight_decay"] = True
            for p in group["params"]:
                p_state = self.state.get(p, {})
                if "step" in p_state and not isinstance(p_state["step"], Tensor):
                    on_device = group["capturable"] or group["fused"]
                    p_state["step"] = torch.tensor(
                        float(p_state["step"]), dtype=torch.float32, device=p.device if on_device else "cpu"
                    )
        self._engine = Engine(self.options.backend)
        self._state_was_shared = True
