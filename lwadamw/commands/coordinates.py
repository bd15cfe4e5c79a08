"""The coordinate check: how activations and their change in a few steps depend on the width, and what decay adds over tau."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..state import keys
from ..state.names import layer_type
from ..step.optimizer import AdamW
from ..width.applied import needs_depth
from ..width.blocks import blocks_of
from ..width.groups import Groups, param_groups
from ..width.rules import get_rule

# Octaves per octave of width. Without scaling, changes grow by 0.5 to 0.8. Under muP they fall by up to 0.3 at widths below
# 128, where updates are not yet aligned with their inputs.
FLAT: Final = 0.35
INITIAL: Final = 0.25  # a standard deviation that does not follow the fan_in makes outputs grow by 0.5
Loss = Callable[[nn.Module, Any], Tensor]
_Decay = tuple[str, tuple[float, float, float]]


@dataclass(frozen=True)
class Layer:
    """One kind of layer over the widths. Lists have one value per width, geometric means over layers and seeds.

    Attributes:
        name: name of the modules, with layer numbers as `*`.
        role: role of their weight.
        initial: RMS of the output before the steps.
        activation: RMS of the output after the steps.
        update: RMS of the change of the output in all steps together.
        tau: 1 / (lr wd) of the weight, in steps; inf without weight decay.
        gain: sqrt(lr / wd) fan_in^0.75, which the gain is proportional to after some tau. NaN without weight decay.
        relative: sqrt(lr wd), which the relative update is proportional to after some tau. NaN without weight decay.
    """

    name: str
    role: str
    initial: tuple[float, ...]
    activation: tuple[float, ...]
    update: tuple[float, ...]
    tau: tuple[float, ...]
    gain: tuple[float, ...]
    relative: tuple[float, ...]


def check(
    build: Callable[[int], nn.Module],
    widths: Sequence[int],
    rule: str,
    base_width: int,
    *,
    batch: Any = None,
    loss: Loss | None = None,
    lr: float = 1e-2,
    weight_decay: float = 0.1,
    steps: int = 5,
    seeds: int = 2,
) -> list[Layer]:
    """Train a model for a few steps at every width, and measure the outputs of its layers on the batch before and after.

    Args:
        build: returns the model of a width.
        widths: at least two widths.
        rule: name of a rule or recipe. The depth ratio is 1.
        base_width: width at which lr and weight decay hold as they are.
        batch: what the loss is called with. By default random tokens, for a model whose input is an embedding.
        loss: loss(model, batch), a scalar. By default the cross-entropy of the next token.
        lr: base learning rate.
        weight_decay: base weight decay.
        steps: number of steps.
        seeds: number of seeds, of weights and of the default batch.

    Raises:
        ValueError: the loss is not a finite scalar, or the default batch or loss does not fit the model.
    """
    base = build(base_width)
    depth = blocks_of(base) if needs_depth(get_rule(rule)) else None
    if depth == {}:
        raise ValueError(
            f"check: the rule {rule!r} scales residual blocks, and the model has no list of numbered layers that could be its "
            "blocks. Give a rule without depth, like --rule kosson2025."
        )
    seen: dict[tuple[str, str], dict[int, list[tuple[float, ...]]]] = {}
    for width in widths:
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = build(width)
            data = tokens_of(model, seed) if batch is None else batch
            groups = param_groups(model, base, rule, base_depth=depth)
            optimizer = AdamW(groups, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.95))
            decay = _effective(optimizer, groups)
            for key, values in _one(model, optimizer, decay, data, loss or next_token, steps).items():
                seen.setdefault(key, {}).setdefault(width, []).append(values)
    return [
        Layer(name, role, *zip(*(_means(by_width[width]) for width in widths), strict=True))
        for (name, role), by_width in seen.items()
        if len(by_width) == len(widths)
    ]


def _one(
    model: nn.Module, optimizer: AdamW, effective: Mapping[int, _Decay], batch: Any, loss: Loss, steps: int
) -> dict[tuple[str, str], tuple[float, ...]]:
    before = _outputs(model, batch, loss)
    for step in range(steps):
        value = loss(model, batch)
        if value.numel() != 1 or not math.isfinite(value.item()):
            raise ValueError(
                f"check: the loss of step {step + 1} is {value.tolist()}, not a finite number. Give another --lr or --loss."
            )
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.step()
    after = _outputs(model, batch, loss)
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for name in after:
        # By the parameter and not by its name: a head that is tied to the embedding has the name of the embedding.
        role, decay = effective.get(id(weights[name]), ("", (math.inf, math.nan, math.nan)))
        if role and name in before and before[name].shape == after[name].shape:
            sizes = (_rms(before[name]), _rms(after[name]), _rms(after[name] - before[name]))
            rows.setdefault((layer_type(name), role), []).append((*sizes, *decay))
    return {key: _means(values) for key, values in rows.items()}


def _outputs(model: nn.Module, batch: Any, loss: Loss) -> dict[str, Tensor]:
    """Return the output of every module that has a weight of its own."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor):
                found[name] = first.detach().float().clone()

        return hook

    modules = [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    handles = [module.register_forward_hook(keep(name)) for name, module in modules]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            loss(model, batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found


def _effective(optimizer: AdamW, groups: Groups) -> dict[int, _Decay]:
    """Return role, and tau, gain and relative update after tau up to a factor, of every parameter by its id."""
    found = {}
    for group in optimizer.param_groups:
        lr = float(group["lr"]) * keys.WIDTH_LR_MULT.of(group)
        wd = float(group["weight_decay"]) * keys.WIDTH_WD_MULT.of(group)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            fan_in = groups.evidence[name].fan_in or math.nan
            role = str(keys.ROLE.of(group))
            after = (math.inf, math.nan, math.nan)
            if lr * wd > 0 and role == "matrix":
                after = (1 / (lr * wd), math.sqrt(lr / wd) * fan_in**0.75, math.sqrt(lr * wd))
            found[id(p)] = (role, after)
    return found


def tokens_of(model: nn.Module, seed: int) -> Tensor:
    """Return random tokens for a model whose input is an embedding, int64[8, 33].

    Args:
        model: the model.
        seed: of the tokens.

    Raises:
        ValueError: the model has no embedding.
    """
    # A model of transformers says which of its embeddings is the one of tokens.
    told: Any = getattr(model, "get_input_embeddings", lambda: None)
    sizes = [m.num_embeddings for m in (told(), *model.modules()) if isinstance(m, nn.Embedding)]
    if not sizes:
        raise ValueError(
            "check: the model has no nn.Embedding, so its input is not known. Give --loss module:function, a function of the "
            "model that returns the loss of a fixed batch."
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(sizes[0], (8, 33), generator=generator)


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of the next token. The model returns logits, or an object that has them.

    Args:
        model: the model.
        tokens: int64[batch, length + 1].

    Raises:
        ValueError: the model does not return logits for its input.
    """
    output = model(tokens[:, :-1])
    logits = getattr(output, "logits", output)
    if not (isinstance(logits, Tensor) and logits.dim() == 3):
        raise ValueError(
            f"check: the model returned {type(output).__name__}, not logits of shape [batch, length, vocabulary]. Give --loss "
            "module:function, a function of the model that returns the loss of a fixed batch."
        )
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Return octaves of a quantity per octave of width, by least squares. NaN if a value is not positive and finite.

    Args:
        widths: the widths.
        values: the quantity at each width.
    """
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan
    x = np.log2(widths) - np.log2(widths).mean()
    return float(x @ np.log2(values) / (x @ x))


def verdict(found: float) -> str:
    """Return what a slope means: flat, grows, shrinks, or no value."""
    if math.isnan(found):
        return "no value"
    return "flat" if abs(found) <= FLAT else "grows" if found > 0 else "shrinks"


def _means(values: Sequence[Sequence[float]]) -> tuple[float, ...]:
    with np.errstate(divide="ignore"):
        return tuple(float(x) for x in np.exp(np.log(np.array(values, dtype=np.float64)).mean(axis=0)))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def as_dict(widths: Sequence[int], layer: Layer) -> Mapping[str, Any]:
    """Return a layer with its slopes, for JSON."""
    quantities = ("initial", "activation", "update", "tau", "gain", "relative")
    slopes = {f"{name}_slope": slope(widths, getattr(layer, name)) for name in quantities}
    return {key: _plain(value) for key, value in (vars(layer) | slopes).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
