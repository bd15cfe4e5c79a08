"""Evidence: what the shape, the name, and the module of one parameter say about its role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from . import heads, inputs
from .rules import Role
from .sites import Site, plain


@dataclass(frozen=True, slots=True)
class Decision:
    """The role of one parameter, and the evidence for it.

    Attributes:
        role: the role; None where nothing decided it.
        why: the evidence in a few words, as `summary` prints it.
        dims: the dimensions whose sizes multiply to the fan_in; empty for a vector and where nothing decided the role.
        by_size: whether a size of this model is the evidence, so that a model of another width may not show it.
    """

    role: Role | None
    why: str
    dims: tuple[int, ...] = ()
    by_size: bool = False


# Attributes of parameters that are no weight of a linear layer: tokens and positions, which are embeddings, ...
_EMBEDDING_NAMES: Final = (
    "token",
    "tokens",
    "embed",
    "embeds",
    "embedding",
    "embeddings",
    "pos_emb",
    "latents",
    "queries",
)
# ... and gains, tables and constants of attention and of state spaces, which no trainer decays.
_VECTOR_NAMES: Final = frozenset(
    {
        "A_log",
        "D",
        "dt_bias",
        "logit_scale",
        "relative_position_bias_table",
        "rel_pos_h",
        "rel_pos_w",
        "scale_shift_table",
        "time_decay",
        "time_first",
        "time_faaaa",
    }
)
_TOKEN_SHIFTS: Final = ("time_mix", "time_maa")


def from_evidence(p: Tensor, site: Site, exempt: frozenset[str], output_modules: frozenset[int]) -> Decision:
    """Return what one site says about the role of a parameter.

    Args:
        p: the parameter.
        site: where it sits.
        exempt: names of the parameters that the model itself takes out of the weight decay.
        output_modules: ids of the modules that `get_output_embeddings` returned.

    Raises:
        RuntimeError: the parameter is a flattened or partitioned shard.
    """
    at = plain(site)
    kind = type(at.module).__name__
    _refuse_shard(p, site)
    if any(part.startswith("lora_") for part in (*site.path, site.attribute)):
        return Decision(None, "LoRA: no width rule is settled for it")
    vector = _vector(p, at, kind)
    if vector is None and (getattr(p, "_no_weight_decay", False) or site.name in exempt):
        vector = "the model takes it out of the weight decay"
    if vector is not None:
        return Decision("vector", vector)
    dims = _inputs(p, at, kind)
    if (found := _output(at, output_modules)) is not None:
        why, part = found
        if part == "unclear":
            return Decision(
                None, f"one of several matrices in {why.partition(': ')[2]}: which of them gives the outputs?"
            )
        if part == "final":
            return Decision("output" if dims else None, why, dims)
    if at.attribute == "weight" and heads.may_be_a_head(at):
        return Decision(None, f"{kind}, the last of the model outside its layers: is it a head?")
    if dims and (embeds := inputs.embeds_the_input(at)) is not None:
        why, by_size = embeds
        return Decision("vector", f"{kind} {why}", by_size=by_size)
    return (
        Decision("matrix", kind, dims) if dims else Decision(None, f"{type(p).__name__} on {kind}, not a known module")
    )


def fan_in_of(p: Tensor, site: Site, dims: tuple[int, ...]) -> int:
    """Return the number of inputs of each output of a matrix: the product of some dimensions of its global shape.

    Args:
        p: the matrix.
        site: where it sits. Megatron's parallel layers know the inputs of the whole layer.
        dims: the dimensions.
    """
    size = site.module.__dict__.get("input_size")
    if isinstance(size, int) and p.ndim == 2 and dims in ((-1,), (1,)):
        return size
    return math.prod(p.shape[dim] for dim in dims)


def _vector(p: Tensor, at: Site, kind: str) -> str | None:
    """Return why a parameter is a vector; None where it need not be one."""
    attribute, multiplied = at.attribute, heads.is_multiplied(at.module) and at.attribute == "weight"
    if p.ndim <= 1:
        return kind if "Norm" in kind else f"{p.ndim}-D"
    if isinstance(at.module, (nn.Embedding, nn.EmbeddingBag)) or (kind.endswith("Embedding") and attribute == "weight"):
        return kind
    if isinstance(at.module, (nn.LayerNorm, nn.GroupNorm)) or kind.endswith("Norm"):
        return kind
    if multiplied:
        module = at.module
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.groups == module.in_channels:
            return f"depthwise {kind}"
        return None
    if attribute == "weight_g":
        return "magnitude of weight norm"
    if attribute == "bias" or attribute.startswith("bias_") or attribute.endswith("_bias"):
        return f"named {attribute!r}"
    named = attribute in _VECTOR_NAMES or attribute.startswith(_TOKEN_SHIFTS)
    if named or any(attribute == end or attribute.endswith(f"_{end}") for end in _EMBEDDING_NAMES):
        return f"named {attribute!r}"
    # The weight of a class that this package does not know may be a linear layer with one output.
    if attribute != "weight" and sum(size != 1 for size in p.shape) <= 1:
        return "one dimension is not 1"
    return None


def _inputs(p: Tensor, at: Site, kind: str) -> tuple[int, ...]:
    """Return the dimensions that a module of a well-known type multiplies its inputs with; empty for any other module."""
    module, attribute = at.module, at.attribute
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and attribute == "weight":
        return (0, *range(2, p.ndim))
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        return tuple(range(1, p.ndim))
    if kind == "Conv1D" and attribute == "weight" and p.ndim == 2:  # of transformers' GPT-2, of shape (in, out)
        return (0,)
    linear = isinstance(module, nn.Linear) or kind in ("ColumnParallelLinear", "RowParallelLinear")
    if linear and attribute == "weight":
        return (-1,)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return (-1,)
    if isinstance(module, nn.RNNBase) and attribute.startswith("weight_"):
        return (-1,)
    if "Router" in kind and attribute == "weight" and p.ndim == 2:
        return (-1,)
    transposed = getattr(module, "is_transposed", None)
    if "Experts" in kind and isinstance(transposed, bool) and p.ndim == 3:
        return (-2,) if transposed else (-1,)
    return ()


def _output(at: Site, output_modules: frozenset[int]) -> tuple[str, heads.Part] | None:
    if id(at.module) in output_modules and at.attribute == "weight":
        return "head: get_output_embeddings()", "final"
    if at.attribute != "weight":
        return None
    return heads.router(at) or heads.head(at)


def _refuse_shard(p: Tensor, site: Site) -> None:
    kind = type(site.module).__name__
    flat = kind == "FlatParameter" or type(p).__name__ == "FlatParameter"
    cut = p.ndim <= 1 and site.attribute == "weight" and isinstance(site.module, (nn.Linear, nn.Embedding))
    if flat or cut:
        raise RuntimeError(
            f"param_groups: {site.name!r} of {kind} has shape {tuple(p.shape)}. So it is a flattened or partitioned shard, and "
            "its fan_in is unknown. Call param_groups before the model is wrapped."
        )
