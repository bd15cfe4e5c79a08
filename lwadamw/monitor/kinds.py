"""Types of layers: which segments of a run are alike, by their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Final

from ..state.names import layer_type

MOST_APART: Final = 4  # a parameter with more segments than these is a pack of equal matrices, such as experts
_INDEX: Final = re.compile(r"\[\d+\]$")


def types_of(names: Sequence[str]) -> list[str]:
    """Return the type of each segment: its name with `*` for layer numbers.

    The indices of segments stay if a parameter has up to MOST_APART of them, because query, key and value are three different
    matrices. More segments are experts. They are one type.

    Args:
        names: names of all segments of a run.

    Examples:
        >>> types_of(["layers.0.qkv[0]", "layers.0.qkv[1]", "layers.1.up"])
        ['layers.*.qkv[0]', 'layers.*.qkv[1]', 'layers.*.up']
        >>> types_of([f"layers.0.experts[{i}]" for i in range(5)])[4]
        'layers.*.experts[*]'
    """
    parts = Counter(_INDEX.sub("", name) for name in names if _INDEX.search(name))
    return [layer_type(_INDEX.sub("[*]", name) if parts[_INDEX.sub("", name)] > MOST_APART else name) for name in names]
