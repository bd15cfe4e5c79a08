"""AdamW: torch.optim.AdamW's interface over one width-aware Triton step that measures its own norms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..state import keys
from ..state.collectives import NORM_SUMS, NORMS, Call
from ..state.exchange import StateExchange
from ..state.groups import complete_group, effective
from ..state.itself import mark, on_itself
from ..state.naming import Naming
from ..state.shards import Shards
from ..tables.request import Request
from .engine import Engine
from .gradient_release import GradientRelease, ReleaseHooks, check_releasable
from .hooks import watched_only
from .norms import Norms
from .options import Options

if TYPE_CHECKING:
    from ..state.shards import ShardGroup

# torch 2.7 made AdamW a subclass of Adam, and gave its groups this key. A distributed checkpoint loads only if it has every
# key that is asked for, so groups that were loaded have the same keys as new ones.
HAS_DECOUPLED_KEY = issubclass(torch.optim.AdamW, torch.optim.Adam)


class AdamW(StateExchange):
    r"""AdamW that updates all parameter groups in one Triton step, with width scaling, clipping and norms inside it.

    If you use torch's arguments only and no group has a width multiplier, this class is a drop-in `torch.optim.AdamW`:
    it has the same arguments in the same order, the same update and the same state. Checkpoints load both ways.

    The update of one element is written below. t is the parameter's own step. eta, lambda and epsilon are the effective
    learning rate, weight decay and eps. Each of them is a base value times a width multiplier.

        m <- beta1 m + (1 - beta1) g                 v <- beta2 v + (1 - beta2) g^2
        p <- p - eta lambda p - eta (m / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + epsilon)

    The decay term is multiplied by the learning rate, as in torch. In the paper of Loshchilov & Hutter (1711.05101) it is
    not. The argument `decay` selects other laws.

    `group["lr"]`, `group["weight_decay"]` and `group["eps"]` hold the base values: the values that were tuned at the
    proxy width. The step multiplies them by `group["width_lr_mult"]`, `group["width_wd_mult"]` and
    `group["width_eps_mult"]`, which `lwadamw.param_groups` sets. It never writes the product back to the group. So no
    scheduler, and no loop that assigns `group["lr"]`, can undo a rule.

    Args:
        params: parameters, (name, parameter) pairs, or group dicts. `lwadamw.param_groups(...)` makes group dicts.
        lr: base learning rate. A float or a one-element tensor. A float32 or float64 tensor on the parameters' device is
            read there in every step, without a synchronisation.
        betas: decay rates of the first and second moment. Floats or one-element tensors in [0, 1).
        eps: base value of the term that is added to the denominator.
        weight_decay: base weight decay. With decay="coupled" one step takes lr times weight_decay of the weight.
        amsgrad: divide by the largest second moment so far (Reddi et al. 2018).
        maximize: maximize the objective instead of minimizing it.
        foreach: as in torch. If it is given and `fused` is not True, torch's own implementation takes the step, on the
            torch backend.
        capturable: allow the step to be captured in a CUDA graph, alone or with forward and backward. Take one uncaptured
            step before each capture. Uncaptured steps may come between replays. A hyperparameter that changes between
            replays has to be a tensor on the device; numbers stay as they were at the capture. Parameters, state or groups
            that are replaced after a capture need a new capture. docs/graphs.md says what a replay sees.
        differentiable: let autograd run through the step. This uses the torch backend.
        fused: as in torch: True asks for torch's fused kernel where the torch backend updates a parameter. False asks for
            another implementation of torch's and so for the torch backend. None: the torch backend chooses. On the CPU it
            then takes torch's fused kernel, where torch.optim.AdamW would loop over a dozen operators. 16-bit parameters
            are then updated in float32, as the kernels do; with `foreach`, `fused` or `differentiable` they are updated in
            torch's own arithmetic, where float16 rounds eps=1e-8 to 0. With fused=True and without `max_grad_norm`, the
            torch backend leaves `p.grad` unscaled after a step under a GradScaler, as torch does.
        max_grad_norm: clip the gradients by their global norm inside the step. The result is that of
            `torch.nn.utils.clip_grad_norm_` before the step, but the gradients are not rewritten. None: no clipping.
        nonfinite: what happens to a step whose global gradient norm is not finite, if `max_grad_norm` is set. "skip": the
            step changes nothing, and `skipped_steps` counts it. "raise": the step changes nothing, and a RuntimeError
            follows as soon as the host knows the norm without waiting for the device; on a GPU that is in a later step.
            "pass": the step happens, as it would after `clip_grad_norm_`.
        norms: measure the norms that `norms()` returns. They are computed in the pass over memory that the update makes
            anyway. False: do not measure them.
        backend: which backend updates the parameters. None: the Triton backend updates the parameters on a GPU that it can
            update, unless a flag of their group asks for torch's implementation; the torch backend updates all others.
            "triton": the Triton backend updates all parameters, or `step()` raises an error. On CPU tensors this needs
            TRITON_INTERPRET=1 in the environment. "torch": the torch backend updates all parameters.
        exp_avg_dtype: dtype in which the first moment is created: torch.float32, torch.bfloat16 or torch.int8 (8-bit
            codes). None: float32 with master weights, otherwise the parameter's dtype, as in torch.
        exp_avg_sq_dtype: dtype in which the second moment is created: torch.float32, torch.bfloat16 or torch.uint8 (8-bit
            codes). None: as for `exp_avg_dtype`.
        master_weights: keep the weight of a bfloat16 or float16 parameter exactly in float32. torch.float32: as a float32
            copy, 4 bytes per element. "remainder": as the lower 2 bytes, which a bfloat16 parameter lacks; 2 bytes per
            element. None: no master weights.
        rounding: how a bfloat16 or float16 parameter without master weights is rounded after the update. "nearest": to
            the nearest value. "stochastic": up or down at random, without bias; bfloat16 only. "kahan": to the nearest
            value, and a second array of the parameter's dtype (`kahan_comp`) keeps what rounding lost.
        rounding_seed: seed of the random bits for stochastic rounding and 8-bit moments, an int from 0 to 2**63 - 1. The
            bits depend on this seed, the parameter's name, its step and the element's index. So they do not depend on how
            parameters are grouped or sharded.
        grad_attribute: attribute of a parameter that holds its gradient: "grad", or "main_grad" or "decoupled_grad" for
            frameworks that put gradients there.
        decay: how much `weight_decay` takes from a weight. "coupled": as in torch. "independent": independent of the peak
            learning rate (Wortsman et al. 2309.14322). "corrected": corrected for the schedule (AdamC, Defazio
            2506.02285). "huber": bounded for large weights (Guo & Fan 2511.14721). docs/decay.md has the formulas.
        peak_lr: highest base learning rate of the schedule. "independent" and "corrected" divide by it. None: the value of
            `initial_lr`, or else of `lr`, that the group has when it is added. Give `peak_lr` if a scheduler has a peak of
            its own, as OneCycleLR has.
        huber_scale: threshold of "huber", as a multiple of the mean of |w|. If parameters with this law are split over
            processes, `step()` is collective: all processes have to call it.
        shard_group: the process group, or several, among which parameters are split that are plain tensors, as those of FSDP1,
            ZeroRedundancyOptimizer or Megatron are; or a mapping from fnmatch patterns on parameter names to such groups.
            Then `max_grad_norm`, `norms()` and huber thresholds are those of the whole model. No group, as in [], says that
            parameters are whole. DTensors tell their groups themselves. Copies and pickles of the optimizer do not have it: a
            process group cannot be copied.

    The group keys `exp_avg_dtype`, `exp_avg_sq_dtype`, `master_weights`, `rounding`, `rounding_seed`, `grad_attribute`,
    `decay`, `peak_lr` and `huber_scale` may differ by group. The arguments above apply to groups that lack the key.
    `exp_avg_dtype`, `exp_avg_sq_dtype`, `master_weights` and rounding="kahan" are read when state is created. State that
    exists keeps its types until `convert_state()` is called. docs/storage.md has a table of what each combination costs.

    Attributes:
        options: `Options`, frozen. The arguments that no group holds: `backend`, `nonfinite`, `norms`, and in `group` the
            keys that each new group gets. Deepcopies and pickles keep it.
        evidence: dict from parameter name to what `lwadamw.param_groups` found out about the parameter: its role, its
            width ratio m and why. Empty if the groups do not come from `param_groups`. Deepcopies and pickles keep it.

    Raises:
        ValueError: an argument or a group is not valid.
        TypeError: an argument or a group has the wrong type.
        RuntimeError: raised by `step()` before it writes anything: backend="triton" cannot update some parameter, a
            gradient is sparse, or state does not fit its parameter.

    Examples:
        >>> model = torch.nn.Linear(4, 4)
        >>> optimizer = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.norms().weight.shape
        (2,)
    """

    # torch.compile calls the constructor and step() as they are. torch.compiler.disable would do the same, but loads the
    # compiler on import.
    @_disable_dynamo
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
        shard_group: ShardGroup | None = None,
    ) -> None:
        mark(self)
        self.options = Options.from_arguments(
            backend=backend,
            nonfinite=nonfinite,
            norms=norms,
            amsgrad=amsgrad,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            group={
                "exp_avg_dtype": exp_avg_dtype,
                "exp_avg_sq_dtype": exp_avg_sq_dtype,
                "master_weights": master_weights,
                "rounding": rounding,
                "rounding_seed": rounding_seed,
                "grad_attribute": grad_attribute,
                "decay": decay,
                "peak_lr": peak_lr,
                "huber_scale": huber_scale,
            },
        )
        self.max_grad_norm = max_grad_norm
        self.evidence: dict[str, Any] = dict(getattr(params, "evidence", {}))
        self._naming = Naming(self.evidence)
        self._shards = Shards(shard_group)
        self._engine = Engine(backend, self._naming, self._shards)
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
        self._released: ReleaseHooks | None = None
        self._state_was_shared = False
        self._clip_once: float | None = None  # for the next step alone

    @property
    @on_itself
    def state(self) -> Any:
        """Optimizer state by parameter, with torch's keys: `step`, `exp_avg`, `exp_avg_sq`, and `max_exp_avg_sq` if amsgrad.

        A caller who has once read this property may replace or move a tensor at any time. So from then on every step
        checks whether a state tensor has changed.
        """
        self._state_was_shared = True
        return self.__dict__["state"]

    @state.setter
    @on_itself
    def state(self, value: Any) -> None:
        self._state_was_shared = True
        self.__dict__["state"] = value

    @property
    @on_itself
    def max_grad_norm(self) -> float | None:
        """Global gradient norm above which gradients are scaled down. None: no clipping. It may be changed between steps.

        Raises:
            ValueError: by assignment, if the value is not positive.
            RuntimeError: by assignment, while gradients are released. The global norm would be known too late.
        """
        return self._max_grad_norm

    @max_grad_norm.setter
    @on_itself
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None and not value > 0:
            raise ValueError(f"max_grad_norm={value} is not positive. Give a norm to clip to, or None for no clipping.")
        if value is not None and self.__dict__.get("_released") is not None:
            raise RuntimeError(
                f"max_grad_norm={value} while gradients are released: the global norm would be known too late. "
                "Call remove() on the handle of release_gradients() first."
            )
        self._max_grad_norm = None if value is None else float(value)

    @on_itself
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of the next step by their global norm, and return this norm.

        The result is that of `torch.nn.utils.clip_grad_norm_`, for loops and frameworks that clip by themselves. No gradient is
        rewritten: the next step multiplies by the factor, and reads the gradients once more to know it. `max_norm` takes the
        place of `max_grad_norm` for that step, and `zero_grad` forgets it if the step was left out. Where parameters are split
        over processes, the norm is that of the whole model, and the call is collective. Under a GradScaler call
        `scaler.unscale_` first, as with torch's function. Of several calls before a step, the last one counts, with the norm
        of the gradients as they are. `nonfinite` says what happens if the norm is not finite.

        Args:
            max_norm: the largest norm, positive.

        Returns:
            The global norm of the gradients, float32[] on the device.

        Raises:
            ValueError: `max_norm` is not positive.
            RuntimeError: gradients are released, or the step could not be taken, or another process did not make the call.
                Nothing has been written then.
        """
        if not max_norm > 0:
            raise ValueError(f"clip_grad_norm_: max_norm={max_norm} is not positive. Give a norm to clip to.")
        if self._released is not None:
            raise RuntimeError(
                "clip_grad_norm_: gradients are released. Call remove() on the handle of release_gradients()."
            )
        state, verify = self.__dict__["state"], self._state_was_shared
        norm = self._engine.measure_gradients(self.param_groups, state, self._request(), verify_state=verify)
        self._clip_once = float(max_norm)
        return norm

    @property
    @on_itself
    def grad_norm(self) -> Tensor | None:
        """Global gradient norm of the last step before clipping, float32[] on the device. None without max_grad_norm.

        The next step overwrites this tensor. Reading its value on the host waits for the device.
        """
        return self._engine.grad_norm

    @property
    @on_itself
    def skipped_steps(self) -> Tensor:
        """Number of steps that changed nothing because of a non-finite norm or a `found_inf`, int64[] on the device.

        Reading its value on the host waits for the device.
        """
        counter = self._engine.skipped
        return torch.zeros((), dtype=torch.int64, device="cpu") if counter is None else counter.clone()

    @on_itself
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in torch. If the group is not valid, the optimizer stays as it was.

        If the group has one or two of the three width multipliers, the missing ones become 1.

        Args:
            param_group: dict with `params` and any group keys.

        Raises:
            ValueError: a width multiplier is not a finite number >= 0, a decay law is unknown or needs a `peak_lr`, a
                storage option is not valid, or segments do not fit their parameter.
            RuntimeError: gradients are released, and those of the group cannot be.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for key, value in self.options.group.items():
                group.setdefault(key, value)
            self._naming.add(self.param_groups)
            complete_group(group, len(self.param_groups) - 1)
            released: ReleaseHooks | None = getattr(self, "_released", None)
            if released is not None:
                check_releasable(self.param_groups, self._max_grad_norm, self._shards)
                released.follow(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise

    # torch's constructor wraps `step` in this.
    profile_hook_step = staticmethod(watched_only)  # type: ignore[assignment]

    @_disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters once. While gradients are released: update those that still have a gradient.

        Args:
            closure: evaluates the model again, with gradients enabled, and returns the loss.

        Returns:
            The loss that the closure returned, or None.

        Raises:
            RuntimeError: backend="triton" cannot update some parameter, a gradient is sparse, or state does not fit its
                parameter. With `max_grad_norm` also: another process did not make the call, or parameters are shards of
                FullyShardedDataParallel and `shard_group` does not tell their group. Nothing has been written then. With
                nonfinite="raise" also: the global gradient norm of this or of an earlier step was not finite.
        """
        return self._take_step(closure)

    def _take_step(self, closure: Callable[[], float] | None) -> float | None:
        """Do what `step` does, without step hooks, for a subclass that has a `step` of its own."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state, verify = self.__dict__["state"], self._state_was_shared
        if self._released is None:
            self._engine.step(self.param_groups, state, self._request(), verify_state=verify)
            self._clip_once = None
        else:
            self._released.step(self._engine, self.param_groups, state, self._request(), verify)
        return loss

    def _request(self) -> Request:
        # A GradScaler that has looked at no gradient assigns the int 0.
        found_inf = getattr(self, "found_inf", None)
        return Request(
            self._max_grad_norm if self._clip_once is None else self._clip_once,
            self.options.nonfinite,
            self.options.norms,
            getattr(self, "grad_scale", None),
            found_inf if isinstance(found_inf, Tensor) else None,
        )

    @on_itself
    def norms(self) -> Norms:
        """Return the norms of the last step by parameter name.

        This makes one copy from the device and waits for it. The torch backend computes its norms here, from the weights,
        state and gradients of this moment. So read norms before you clear the gradients.

        If parameters are split over processes, the norms are those of the whole parameters, and the same on every process. Then
        this call is collective: all processes have to make it. A process that makes it alone gets an error when the timeout
        of its process group is over. `norm_sums(local=True)` is not collective.

        Raises:
            RuntimeError: the optimizer was built with norms=False; or another process did not make the call; or parameters
                are shards of FullyShardedDataParallel and `shard_group` does not tell their group.
        """
        names, sums = self._sums(NORMS)
        return Norms.from_sums(names, sums.cpu().numpy())

    @on_itself
    def norm_sums(self, *, local: bool = False) -> Tensor:
        """Return the sums from which `norms()` is computed.

        Args:
            local: return sums over what this process holds. False: sums over whole parameters; then this call is collective if
                parameters are split over processes.

        Returns:
            float64[n, 4] on the device, one row per name of `norm_names()`. The columns are the square sum of the weight
            after the step, of the update and of the gradient, and the inner product of the weight before the step with
            the update. The rows of `local=False` are those of `norms()`. They differ from `norm_names()` with `shard_group`,
            and if a parameter that is split has taken a step on some processes only.

        Raises:
            RuntimeError: as in `norms()`.
        """
        return self._sums(None if local else NORM_SUMS)[1]

    @on_itself
    def norm_names(self) -> list[str]:
        """Return the names of the rows of `norm_sums()`: every segment that has taken a step. Nothing is computed.

        Raises:
            RuntimeError: the optimizer was built with norms=False.
        """
        self._check_norms()
        return self._engine.norm_names(self.__dict__["state"])

    def _sums(self, whole: Call | None) -> tuple[list[str], Tensor]:
        self._check_norms()
        return self._engine.norm_sums(self.__dict__["state"], whole=whole)

    def _check_norms(self) -> None:
        if not self.options.norms:
            raise RuntimeError("This AdamW was built with norms=False. Build it with norms=True to read norms.")

    @property
    def shards(self) -> Shards:
        """What the optimizer knows about processes that hold other parts of its parameters."""
        return self._shards

    @on_itself
    def set_shard_group(self, shard_group: ShardGroup | None) -> None:
        """Tell which processes hold the other parts of plain parameters, in place of what the constructor was told.

        A framework that builds the optimizer itself may not pass `shard_group` on. Call this after it has built the optimizer,
        on every process, before the next step. Norms of earlier steps are gone afterwards.

        Args:
            shard_group: as in the constructor. Names in a mapping are those that the groups have, or that
                `lwadamw.place_flat_shard` has told. Name parameters too of which this process holds nothing: it takes part in
                their sums.

        Raises:
            TypeError: `shard_group` has another type. Nothing has changed then.
        """
        self._shards.tell(shard_group)
        self._engine.look_again()

    @on_itself
    def steps_taken(self) -> int:
        """Return the largest number of steps that any parameter has taken, 0 before the first step.

        Steps that were skipped do not count. The call reads the step counters and so waits for the device.
        """
        # torch lets anybody keep other things in the state, under keys that are no parameters.
        states = [state for key, state in self.__dict__["state"].items() if isinstance(key, Tensor)]
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def effective(self) -> list[dict[str, float | Tensor]]:
        """Return what the next step uses of each group: width multipliers and the decay law are applied.

        Returns:
            One dict per group with the keys `lr`, `weight_decay` and `eps`. `lwadamw.effective` explains the values.
        """
        return [effective(group)._asdict() for group in self.param_groups]

    @property
    @on_itself
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler may leave unscaling and skipping to the step.

        It may not if parameters are plain shards. The other processes have to hear of an inf in one of them, and
        ShardedGradScaler tells them only if it unscales by itself. A gradient that is a DTensor tells all processes.

        Whoever assigns False takes over both. Some frameworks do not clip gradients while it is True.
        """
        fused = bool(self.defaults.get("fused"))
        if self.__dict__.get("_released") is not None:
            return True  # so that `step()` hears of an inf in a gradient that is gone
        if self.__dict__.get("_scaling_is_left_to_others"):
            return False
        if self._engine.has_plain_shards(self.param_groups):
            return False
        return fused or self._engine.uses_triton(self.param_groups)

    @_step_supports_amp_scaling.setter
    @on_itself
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self.__dict__["_scaling_is_left_to_others"] = not value  # torch's constructor assigns True

    @on_itself
    def release_gradients(self) -> GradientRelease:
        """Let every parameter take its step inside backward and drop its gradient, so that few gradients exist at a time.

        A parameter takes its step when backward has accumulated its gradient. So each backward is one step: two backward
        passes are two steps, not one step on the sum of their gradients. Step hooks do not see these steps. The norms of a
        parameter are those of its own last step, and NaN on the Triton backend until its first one.

        Go on calling `step()` after every backward. It takes the step of every parameter that still has a gradient: one
        that was unfrozen or added since, or one whose gradient was assigned by a framework. It drops these gradients. From
        the next backward on, such a parameter takes its step there.

        Followed in every backward: hyperparameters and groups; parameters that are added, frozen or unfrozen; parameters
        whose memory, shape or dtype was replaced; state that was deleted, replaced, loaded or converted. A parameter that
        is in no group any more keeps its gradient. So does every parameter once the optimizer is gone. Python may collect a
        deleted optimizer late, for instance one with a scheduler, so call `remove()` to end gradient release at once.

        With a torch.amp.GradScaler, call `scaler.scale(loss).backward()`, `scaler.step(optimizer)` and `scaler.update()`
        as always, with one backward per update. Each parameter takes its step on its unscaled gradient. If this gradient
        has an inf or a NaN, this parameter alone skips its step, where a whole step would be skipped for all parameters.
        The scaler hears of it, so its scale falls, and `skipped_steps` counts it once in `scaler.step`. `scaler.unscale_`
        and functions such as `clip_grad_norm_` find no gradients.

        Copies and pickles of the optimizer are not released.

        Refused with an error: a backward inside another backward, as `torch.utils.checkpoint.checkpoint` runs it with
        use_reentrant=True (pass use_reentrant=False); losses that several GradScalers have scaled in one backward; a
        GradScaler with parameters that are sharded over processes; a parameter that another optimizer has released, or
        whose gradient DistributedDataParallel or FullyShardedDataParallel averages over processes. Gradients of
        `fully_shard` are taken by `step()`.

        Not seen: frameworks other than torch's own, and a DistributedDataParallel that is built after this call, if they
        average gradients over processes after autograd has accumulated them. Do not release gradients with them. A loss
        that was scaled before this call, or by anything but a torch.amp.GradScaler or a subclass: its parameters take
        steps on scaled gradients. If such a scaler calls `step()`, an error says so, but only then. On a GPU, a backward
        that a hook starts inside another backward.

        Returns:
            A handle. `remove()` ends gradient release. The handle is also a context manager. With a GradScaler, end
            gradient release after `scaler.step`.

        Raises:
            RuntimeError: `max_grad_norm` is set, whose global norm would be known too late; or a group has another
                `grad_attribute` than "grad"; or a parameter with decay="huber" is split over processes; or gradients are
                released already, by this or by another optimizer.
        """
        check_releasable(self.param_groups, self._max_grad_norm, self._shards)
        if self._released is not None:
            raise RuntimeError(
                "release_gradients(): gradients are released already. Call remove() on the first handle."
            )
        self._released = ReleaseHooks(self)
        return GradientRelease(self, self._released)

    def _step_released(self, p: Tensor) -> bool:
        """Take the step of one parameter whose gradient is complete. Return False if it is in no group."""
        if self._released is None:
            return False
        state, verify = self.__dict__["state"], self._state_was_shared
        return self._released.take(self._engine, self.param_groups, state, p, self._request(), verify)

    @on_itself
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, as in torch.

        `decoupled_grad` is cleared too, in groups whose `grad_attribute` names it. `main_grad` is not: the framework that
        creates it clears it.

        Args:
            set_to_none: drop the gradients instead of filling them with zeros.
        """
        super().zero_grad(set_to_none)
        self._clip_once = None  # the gradients that it was meant for are gone
        for group in self.param_groups:
            if keys.GRAD_ATTRIBUTE.of(group) == "decoupled_grad":
                for p in group["params"]:
                    grad = getattr(p, "decoupled_grad", None)
                    if set_to_none or grad is None:
                        p.decoupled_grad = None
                    else:
                        grad.zero_()

    def __getstate__(self) -> dict[str, Any]:
        self._naming.follow(self.param_groups)
        own = {key: self.__dict__[key] for key in ("options", "_max_grad_norm", "evidence")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch.optim.AdamW.__setstate__ fails on state that has no step yet. So call its base class instead.
        Optimizer.__setstate__(self, state)
        mark(self)
        self.__dict__.setdefault("options", Options())
        self.__dict__.setdefault("_max_grad_norm", None)
        self.__dict__.setdefault("evidence", {})
        self.__dict__.setdefault("_released", None)
        self.__dict__.setdefault("_clip_once", None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            if HAS_DECOUPLED_KEY or "decoupled_weight_decay" in group:  # a checkpoint of torch.optim.Adam says False
                group["decoupled_weight_decay"] = True
            for p in group["params"]:
                p_state = self.state.get(p, {})
                if "step" in p_state and not isinstance(p_state["step"], Tensor):
                    on_device = group["capturable"] or group["fused"]
                    p_state["step"] = torch.tensor(
                        float(p_state["step"]), dtype=torch.float32, device=p.device if on_device else "cpu"
                    )
        naming: Naming | None = self.__dict__.get("_naming")
        self._naming = Naming(self.evidence) if naming is None else naming
        self._naming.adopt(self.param_groups)
        if "_shards" not in self.__dict__:
            self._shards = Shards()
        former = self.__dict__.get("_engine")
        self._engine = Engine(self.options.backend, self._naming, self._shards)
        if former is not None:
            self._engine.keep_captures(former)
        self._state_was_shared = True
