"""Evidence: what the shape, the name, and the module of one parameter say about its role."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from . import heads, inputs
from .rules import Role
from .sites import Site, class_name, plain


@dataclass(frozen=True, slots=True)
class Decision:
    """The role of one parameter, and the evidence for it.

    Attributes:
        role: the role; None where nothing decided it.
        why: the evidence in a few words, as `summary` prints it.
        dims: the dimensions whose sizes multiply to the fan_in of a matrix or an output. Other parameters may have them too, if
            their module multiplies inputs with them; empty where nobody knows them.
        by_size: whether a size of this model is the evidence, so that a model of another width may not show it.
        per: attribute of the module by which the fan_in is divided; None where it is not.
        gives_logits: whether it is a head, or an embedding that is tied to one.
    """

    role: Role | None
    why: str
    dims: tuple[int, ...] = ()
    by_size: bool = False
    per: str | None = None
    gives_logits: bool = False


# Names of parameters of two and more dimensions that a module holds itself, without a linear layer: tokens, positions and
# tables of embeddings, gains and scales, prompts, and what state spaces and token shifts keep for each channel.
_VECTOR_NAMES: Final = re.compile(
    r"bias(_\w+)?|\w*bias|\w*bias_[uv]|\w*bias_table|rel_pos_[hw]|(\w+_)?tokens?|\w+_token_\w+|mask_emb|pos|pe"
    r"|(\w+_)?pos_(emb|enc)\w*|\w*position\w*_(emb|enc)\w*|(?!(\w+_)?(out|output|un)_?emb)(\w+_)?emb(ed|eds|edding|eddings)?"
    r"|latents?|latents?_\w+|mem_[kv]|(query|latent)_(tokens|queries|query)|queries|probe|learnable_registers|codevectors"
    r"|\w*prompts?|image_newline|A_log\w*|D_log|dt_bias\w*|time_(mix|maa)_\w+|time_(decay|first|faaaa)|r_k|lower_bounds"
    r"|layer_?scale\w*|ls[12]|gamma\w*|logit_scale\w*|temperature|(?!\w*(up|down)_?scale)\w*scale|\w*scale_shift_table"
    r"|modulation|sinks"
)
# Gains and offsets that a norm holds itself.
_GAINS: Final = re.compile(r"weight|bias|scale|shift|gain|offset|gamma|beta|[gb]|[ab]_2|weight_[gb]")
# Low-rank matrices of RWKV have the names of its token shifts.
_LOW_RANK: Final = re.compile(r"\w+_w[12]")
NORMS: Final = re.compile(r"Norm(Gated|[123]d)?$")


def from_evidence(p: Tensor, site: Site, exempt: Callable[[str], object], output_modules: frozenset[int]) -> Decision:
    """Return what one site says about the role of a parameter.

    Args:
        p: the parameter.
        site: where it sits.
        exempt: says of a name whether the model itself takes the parameter out of the weight decay.
        output_modules: ids of the modules that `get_output_embeddings` returned.

    Raises:
        RuntimeError: the parameter is a flattened or partitioned shard.
    """
    at = plain(site)
    kind = class_name(at.module)
    _refuse_shard(p, site)
    if any(part.startswith("lora_") for part in (*site.path, site.attribute)):
        return Decision(None, "LoRA: no width rule is settled for it")
    dims, vector = _inputs(p, at, kind), _vector(p, at, kind)
    if vector is None and (getattr(p, "_no_weight_decay", False) or exempt(site.name)):
        vector = "the model takes it out of the weight decay"
        if dims:
            return Decision(None, f"{kind}, but {vector}: is it a vector?", dims)
    if vector is not None:
        return Decision("vector", vector, dims)
    if (found := _output(at, output_modules)) is not None:
        why, part = found
        if part == "unclear":
            return Decision(None, f"perhaps a {why.replace(': named', '')}: does it give the outputs?", dims)
        if part == "final":
            return Decision("output" if dims else None, why, dims, gives_logits=why.startswith("head"))
    if at.attribute == "weight" and heads.may_be_a_head(at):
        return Decision(None, f"{kind} after the numbered layers: is it a head?", dims)
    if at.attribute == "weight" and heads.ends_a_stack(at):
        return Decision(None, f"the last {kind}, with an output for each row of the embedding: is it a head?", dims)
    if dims and (embeds := inputs.embeds_the_input(at)) is not None:
        why, by_size = embeds
        return Decision("vector", f"{kind} {why}", dims, by_size)
    return (
        Decision("matrix", kind, dims) if dims else Decision(None, f"{type(p).__name__} on {kind}, not a known module")
    )


def fan_in_of(p: Tensor, site: Site, decision: Decision) -> int:
    """Return the number of inputs of each output of a matrix, from its global shape.

    Args:
        p: the matrix.
        site: where it sits. The parallel layers of Megatron and of Transformer Engine hold a part of the inputs only; they tell
            how many there are in all.
        decision: its dimensions that are the fan_in.

    Raises:
        ValueError: the module has no number of experts under the name that the decision gives.
    """
    size = vars(site.module).get("input_size")
    if isinstance(size, int) and class_name(site.module).endswith("Linear") and decision.dims in ((-1,), (1,)):
        return size
    fan_in = math.prod(p.shape[dim] for dim in decision.dims)
    if decision.per is not None:
        count = getattr(site.module, decision.per, None)
        if not isinstance(count, int) or count < 1 or fan_in % count:
            raise ValueError(
                f"param_groups: the fan_in {fan_in} of {site.name!r} {tuple(p.shape)} is to be divided by the attribute "
                f"{decision.per!r} of {class_name(site.module)}, which is {count!r}. Give an attribute that divides it."
            )
        fan_in //= count
    if getattr(p, "tensor_model_parallel", False) and p.partition_dim in (dim % p.ndim for dim in decision.dims):  # type: ignore[attr-defined]
        fan_in *= int(getattr(site.module, "tp_size", 1))
    return fan_in


def _vector(p: Tensor, at: Site, kind: str) -> str | None:
    """Return why a parameter is a vector; None where it need not be one."""
    attribute, multiplied = at.attribute, heads.is_multiplied(at.module) and at.attribute == "weight"
    if p.ndim <= 1:
        return kind if "Norm" in kind else f"{p.ndim}-D"
    if isinstance(at.module, (nn.Embedding, nn.EmbeddingBag)) or (
        kind.endswith("Embedding") and attribute == "weight" and not re.search("Out|Un[eE]mb", kind)
    ):
        return kind
    if isinstance(at.module, (nn.LayerNorm, nn.GroupNorm)) or (NORMS.search(kind) and _GAINS.fullmatch(attribute)):
        return kind
    if multiplied:
        module = at.module
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and module.groups == module.in_channels:
            return f"depthwise {kind}"
        return None
    if attribute == "weight_g":
        return "magnitude of weight norm"
    if _VECTOR_NAMES.fullmatch(attribute) and not _LOW_RANK.fullmatch(attribute):
        return f"named {attribute!r}"
    if attribute == "D" and "A_log" in at.module._parameters:
        return "named 'D' beside 'A_log'"
    # A column, and the weight of a class that this package does not know, may be a matrix with one output.
    column = p.ndim == 2 and p.shape[1] == 1 and p.shape[0] != 1
    if attribute != "weight" and not column and sum(size != 1 for size in p.shape) <= 1:
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
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and attribute.startswith("weight_"):
        return (-1,)
    if heads.is_router(kind) and attribute == "weight" and p.ndim == 2:
        return (-1,)
    if (transposed := transposes(module)) is not None and p.ndim == 3:
        return (-2,) if transposed else (-1,)
    return ()


def transposes(module: nn.Module) -> bool | None:
    """Return whether packed experts of transformers have the shape (experts, in, out); None where the module does not tell.

    From 5.0 on, transformers writes it on each module. Before, one class name had both shapes in different versions.

    Args:
        module: the module that holds the experts.
    """
    told = getattr(type(module), "is_transposed", vars(module).get("is_transposed"))
    return told if isinstance(told, bool) and "Experts" in class_name(module) else None


def _output(at: Site, output_modules: frozenset[int]) -> tuple[str, heads.Part] | None:
    if id(at.module) in output_modules and at.attribute == "weight":
        return "head: get_output_embeddings()", "final"
    if at.attribute != "weight":
        return None
    return heads.router(at) or heads.head(at)


def _refuse_shard(p: Tensor, site: Site) -> None:
    kind = class_name(site.module)
    # torch makes a FlatParameter as a plain Parameter with this mark.
    flat = getattr(p, "_is_flat_param", False) or "FlatParameter" in (kind, type(p).__name__)
    holds_matrix = heads.is_multiplied(site.module) or isinstance(site.module, nn.Embedding)
    cut = p.ndim <= 1 and site.attribute == "weight" and holds_matrix
    if flat or cut:
        raise RuntimeError(
            f"param_groups: {site.name!r} of {kind} has shape {tuple(p.shape)}. So it is a flattened or partitioned shard, and "
            "its fan_in is unknown. Call param_groups before the model is wrapped, and give lwadamw.rebind(groups, model) to "
            "the optimizer. The wrapper has to keep the parameters: FullyShardedDataParallel(model, use_orig_params=True)."
        )
