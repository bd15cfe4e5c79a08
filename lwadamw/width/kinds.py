"""Which kind of module each parameter of a model belongs to."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Final

from torch import nn

from .evidence import NORMS
from .modules import Kind
from .roles import Decided
from .sites import class_name, plain

# A module of this name holds the routed experts. Shared experts see every token, so they are hidden matrices like others.
_EXPERTS: Final = re.compile(r"(local_|routed_)?experts?")


def kind_of(found: Decided) -> Kind | None:
    """Return the kind of module that a parameter belongs to; None for a hidden matrix and for other vectors.

    A head that is tied to the embedding is an embedding. The role was decided before, and a kind never contradicts it: a matrix
    is an expert or nothing, and an output is a router or a head.

    Args:
        found: the parameter and its role.
    """
    at = plain(found.site)
    if found.role == "output":
        return "router" if found.evidence.why.startswith("router") else "head"
    if found.role == "matrix":
        return "expert" if any(_EXPERTS.fullmatch(part) for part in at.path) else None
    kind = class_name(at.module)
    if at.attribute.endswith("bias"):
        return "bias"
    if isinstance(at.module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) or NORMS.search(kind):
        return "norm"
    embeds = isinstance(at.module, (nn.Embedding, nn.EmbeddingBag)) or kind.endswith("Embedding")
    return "embedding" if embeds and at.attribute == "weight" else None


def check_kinds(modules: Collection[Kind], found: Sequence[Decided]) -> None:
    """Raise a ValueError if a model has no parameter of a kind that was given.

    Args:
        modules: the kinds.
        found: every distinct parameter of the model.

    Raises:
        ValueError: no parameter is of a kind.
    """
    there = {kind for d in found if (kind := kind_of(d)) is not None} if modules else set()
    for kind in modules:
        if kind not in there:
            listed = ", ".join(sorted(there)) or "none"
            raise ValueError(
                f"param_groups: modules[{kind!r}]: the model has no parameter of this kind. It has {listed}. Leave it out, or "
                "use overrides with a pattern for the name."
            )
