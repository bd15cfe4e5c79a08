"""A stand-in for Transformer Engine's FusedAdam, which needs a GPU: its arguments, its state, and its count of steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """AdamW in float32 whose count of steps is in the groups alone, and whose master weight may be a remainder in int16."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.attribute = "decoupled_grad" if use_decoupled_grad else "grad"
        self.master, self.remainders = master_weights, store_param_remainders
        self.dtypes = {"exp_avg": exp_avg_dtype, "exp_avg_sq": exp_avg_sq_dtype}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                setattr(p, self.attribute, None)

    def initialize_state(self, p: Tensor, store_param_remainders: bool | None = None) -> None:
        state = self.state[p]
        for name, dtype in self.dtypes.items():
            state[name] = torch.zeros_like(p, dtype=dtype)
        if self.master:
            state["master_param"] = torch.zeros_like(p, dtype=torch.int16) if self.remainders else p.detach().float()

    def get_unscaled_state(self, p: Tensor, name: str) -> Tensor:
        value: Tensor = self.state[p][name]
        return value if value.dtype in (torch.float32, torch.int16) else value.float()

    def set_scaled_state(self, p: Tensor, name: str, value: Tensor) -> None:
        if name not in (*self.dtypes, "master_param"):
            return
        if name == "master_param":
            assert value.dtype == (torch.int16 if self.remainders else torch.float32)
        if name not in self.state[p]:
            self.initialize_state(p)
        self.state[p][name].copy_(value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        flat = [p for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(saved, flat, strict=True):
            if i in state_dict["state"]:  # torch has cast it to the dtype of the parameter
                held = state_dict["state"][i]
                self.state[p] = {name: value.clone() for name, value in held.items() if name != "step"}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = count = int(group.get("step", 0)) + 1
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                grad = getattr(p, self.attribute, None)
                if grad is None:
                    continue
                if not self.state[p]:
                    self.initialize_state(p)
                state, grad = self.state[p], grad.float()
                m, v, weight = state["exp_avg"].float(), state["exp_avg_sq"].float(), self._weight(p)
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                root = (v.sqrt() / (1 - beta2**count) ** 0.5).add_(group["eps"])
                weight.addcdiv_(m, root, value=-group["lr"] / (1 - beta1**count))
                state["exp_avg"].copy_(m)
                state["exp_avg_sq"].copy_(v)
                self._keep(p, weight)

    def _weight(self, p: Tensor) -> Tensor:
        master = self.state[p].get("master_param")
        if master is None:
            return p.detach().float()
        if master.dtype == torch.float32:
            return master.clone()
        return ((p.detach().view(torch.int16).int() << 16) + master.int()).view(torch.float32)

    def _keep(self, p: Tensor, weight: Tensor) -> None:
        master = self.state[p].get("master_param")
        if master is not None and master.dtype == torch.int16:
            bits = weight.view(torch.int32)
            master.copy_(bits.to(torch.int16))
            p.copy_(((bits - master.int()) >> 16).to(torch.int16).view(torch.bfloat16))
            return
        if master is not None:
            master.copy_(weight)
        p.copy_(weight)
