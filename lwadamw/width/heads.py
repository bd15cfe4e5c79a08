"""Heads and routers: which matrices have the role `output`, by the names and the classes of modules. No size counts."""

from __future__ import annotations

import re
from typing import Final, Literal

from torch import nn

from .sites import Site, children, class_name, paths

# A module of this name is a head wherever it is.
_HEADS: Final = re.compile(r"(\w+_)?lm_heads?|unembed(ding)?|embed_out|shared_head|to_logits|logits")
# A module of this name is a head if it is outside the numbered layers.
_OUTER_HEADS: Final = re.compile(
    r"(?!pre_)(\w+_)?classifier|class_embed|class_predictor|bbox_(embed|predictor|pred)|cls_score|cls_logits|qa_outputs"
    r"|seq_relationship|decoder_pred|dense_prediction|prob_out|feat_out|output_projection|vocab_projector|lm_loss"
    r"|logits_(proj|dense)|predictions|(contact|(\w+_)?prediction|decode|classification|segmentation)_head"
)
# A module of this name is a head if the model itself holds it. Deeper in the model, hidden layers have these names too.
_TOP_HEADS: Final = re.compile(
    r"heads?|head_dist|(aux|ctc|codec|audio|text|value|reward|policy|action|v|cls|class|mask|box|bbox|token)_heads?|score"
    r"|readout|predict_\w+|output|output_layer|final_layer"
)
# A module of this name is a head if the model itself holds it, after all other linear layers that the model itself holds.
_LAST: Final = re.compile(r"fc|last_linear|final_linear|out|proj_out|proj_out_2|to_out|conv_out|out_conv")
# A name with one of these words is that of a hidden layer, even if the layer comes after the numbered layers.
_INNER_WORDS: Final = ("proj", "pool", "adapter", "connector", "merger", "embed", "quant")
# Modules that only hold the model.
_SHELLS: Final = frozenset({"model", "module", "base_model"})
# Among several matrices of a head, the one of this name gives the outputs.
_FINAL: Final = re.compile(rf"{_LAST.pattern}|decoder|out_proj|head|classifier|last_layer|logits|linear")
_ROUTERS: Final = re.compile(r"Router|TopKGat(e|ing)$|MoE(V1)?Gate$")
# A module of this name is a router if experts are beside it.
_GATES: Final = frozenset({"gate", "gating", "router_gate", "shared_expert_gate", "shared_experts_gate"})

# What a matrix inside a head or a router is: the one that gives its outputs, one before it, or nobody can tell.
Part = Literal["final", "hidden", "unclear"]


def is_multiplied(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or a convolution.

    Args:
        module: any module.
    """
    linear = isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    return linear or class_name(module).endswith(("Linear", "Conv1D"))


def is_router(kind: str) -> bool:
    """Return whether a class of this name is a router."""
    return bool(_ROUTERS.search(kind))


def head(site: Site) -> tuple[str, Part] | None:
    """Return the evidence that a weight belongs to an untied head, and its part in it; None where there is no such evidence.

    Args:
        site: where the weight sits, as `plain` gives it.
    """
    for depth, name in enumerate(site.path):
        kind = class_name(site.trail[depth + 1])
        if "Pool" in kind:  # Attention pooling is called `head` in some vision models.
            continue
        outer, held = not any(p.isdigit() for p in site.path[:depth]), _is_held_by_the_model(site, depth)
        named = (
            _HEADS.fullmatch(name) or (outer and _OUTER_HEADS.fullmatch(name)) or (held and _TOP_HEADS.fullmatch(name))
        )
        if named or (held and _LAST.fullmatch(name) and _is_last(site, depth)):
            part = _part(site, depth + 1)
            return f"hidden layer of the head {name!r}" if part == "hidden" else f"head: named {name!r}", part
        if outer and _TOP_HEADS.fullmatch(name) and depth + 1 == len(site.path):
            return f"head: named {name!r}", "unclear"
        if "Readout" in kind or "ReadOut" in kind:
            return f"head: {kind}", _part(site, depth + 1)
    return None


def ends_a_stack(site: Site) -> bool:
    """Return whether a weight ends a model that is an `nn.Sequential`, with an output for each row of its embedding.

    Such a matrix is mostly a head. The number of outputs only raises the doubt: it decides nothing.

    Args:
        site: where the weight sits, as `plain` gives it.
    """
    depth = len(site.path) - 1
    if depth < 0 or not isinstance(site.module, nn.Linear) or not _is_held_by_the_model(site, depth):
        return False
    holder = site.trail[depth]
    rows = {m.num_embeddings for m in children(holder).values() if isinstance(m, nn.Embedding)}
    return isinstance(holder, nn.Sequential) and _is_last(site, depth) and site.module.out_features in rows


def may_be_a_head(site: Site) -> bool:
    """Return whether a weight comes after the numbered layers of a model or of a part of it, under a name that says nothing.

    Args:
        site: where the weight sits, as `plain` gives it.
    """
    depth = len(site.path) - 1
    if depth < 0 or not isinstance(site.module, nn.Linear) or any(part.isdigit() for part in site.path):
        return False
    if any(word in site.path[depth] for word in _INNER_WORDS):
        return False
    after_layers = False
    for child in children(site.trail[depth]).values():
        if child is site.module:
            return after_layers
        after_layers |= not is_multiplied(child) and _has_layers(child)
    return False


def _has_layers(module: nn.Module) -> bool:
    """Return whether a module holds numbered layers: a list of modules that are more than a matrix."""
    if isinstance(module, (nn.ModuleList, nn.Sequential)):
        inside = children(module).values()
        return any(not is_multiplied(child) and any(True for _ in child.parameters()) for child in inside)
    found = (inner for _, inner in paths(module) if inner is not module)
    return any(isinstance(inner, nn.ModuleList) and _has_layers(inner) for inner in found)


def router(site: Site) -> tuple[str, Part] | None:
    """Return the evidence that a weight belongs to a router, and its part in it; None where there is no such evidence.

    Args:
        site: where the weight sits, as `plain` gives it.
    """
    for depth in range(len(site.path), 0, -1):
        name, kind = site.path[depth - 1], class_name(site.trail[depth])
        if name == "router" or is_router(kind):
            return f"router: {kind}", _part(site, depth)
        holder = site.trail[depth - 1]
        if name in _GATES and any("expert" in other for other in (*holder._modules, *holder._parameters)):
            return f"router: {kind} beside experts", _part(site, depth)
    return None


def _is_held_by_the_model(site: Site, depth: int) -> bool:
    return all(part in _SHELLS for part in site.path[:depth])


def _is_last(site: Site, depth: int) -> bool:
    """Return whether the module at a depth of a path is the last linear layer or convolution that its holder itself holds."""
    held = [module for module in children(site.trail[depth]).values() if is_multiplied(module)]
    return held[-1:] == [site.trail[depth + 1]]


def _part(site: Site, depth: int) -> Part:
    """Return the part of a weight in the module at a depth of its trail."""
    container = site.trail[depth]
    if type(container) in (nn.ModuleList, nn.ModuleDict) and depth + 1 < len(site.trail):  # Several heads.
        container = site.trail[depth + 1]
    if container is site.module:
        return "final"
    # The modulation of a norm is no output, though it may come last.
    inside = {
        path: module
        for path, module in paths(container, remove_duplicate=True)
        if is_multiplied(module) and not re.search("adaln|modulation", path.lower())
    }
    if len(inside) > 1 and not isinstance(container, nn.Sequential):
        lists = {re.sub(r"\.?\d+$", "", path) for path in inside}
        if len(lists) > 1 or any(not path[-1].isdigit() for path in inside):
            named = [path for path in inside if _FINAL.fullmatch(path.rpartition(".")[2])]
            outermost = min((path.count(".") for path in named), default=0)
            named = [path for path in named if path.count(".") == outermost]
            if len(named) != 1:
                return "unclear"
            return "final" if inside[named[0]] is site.module else "hidden"
    return "final" if list(inside.values())[-1:] == [site.module] else "hidden"
