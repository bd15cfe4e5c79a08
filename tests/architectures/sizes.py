"""Sizes that all architectures share, and the widths at which they are built."""

from __future__ import annotations

from typing import Final

VOCABULARY: Final = 98
POSITIONS: Final = 76

# The two widths of a table, and the four at which the roles have to be the same.
TABLE: Final = (256, 512)
WIDTHS: Final = (256, 384, 512, 768)

_WITH_TIMESTEPS: Final = ("dit", "pixart", "sd3", "flux", "wan", "ltx", "sana")
# Timesteps have 256 features, so diffusion models have other widths. At the width 768 a patch of SigLIP2 has as many inputs.
TABLE_OF: Final[dict[str, tuple[int, int]]] = {
    "siglip2": (256, 768),
    **dict.fromkeys(_WITH_TIMESTEPS, (384, 768)),
}
WIDTHS_OF: Final[dict[str, tuple[int, ...]]] = dict.fromkeys(_WITH_TIMESTEPS, (384, 512, 640, 768))


def table_widths(name: str) -> tuple[int, int]:
    """Return the two widths of the table of an architecture."""
    return TABLE_OF.get(name, TABLE)


def widths_of(name: str) -> tuple[int, ...]:
    """Return the four widths at which the roles of an architecture have to be the same."""
    return WIDTHS_OF.get(name, WIDTHS)
