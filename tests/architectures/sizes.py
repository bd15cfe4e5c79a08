"""Sizes that all architectures share, and the widths at which they are built."""

from __future__ import annotations

from typing import Final

VOCABULARY: Final = 98
POSITIONS: Final = 76

# The two widths of a table, and the four at which the roles have to be the same.
TABLE: Final = (256, 512)
WIDTHS: Final = (256, 384, 512, 768)

# Widths of the tables in which sizes of different meaning are equal on purpose.
TABLE_OF: Final[dict[str, tuple[int, int]]] = {"siglip2": (256, 768)}
