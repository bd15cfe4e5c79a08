"""Input projections: matrices whose inputs are data of a fixed size, so that they embed the input as an embedding does."""

from __future__ import annotations

from typing import Final

from torch import nn

from .sites import Site

# A convolution of at most this many input channels reads an image or a sound.
_MOST_INPUT_CHANNELS: Final = 4
# A module of this name, or inside one of this name, projects patches of an image.
_PATCHES: Final = frozenset(
    {
        "patch_embed",
        "patch_embedding",
        "patch_embeddings",
        "patch_embedder",
        "patch_conv",
        "conv_proj",
        "x_embedder",
        "img_in",
    }
)


def embeds_the_input(site: Site) -> tuple[str, bool] | None:
    """Return why a matrix embeds the input, and whether the evidence is a size; None where there is no such evidence.

    Args:
        site: where the weight sits, as `plain` gives it.
    """
    module = site.module
    if site.attribute != "weight":
        return None
    if isinstance(module, nn.modules.conv._ConvNd) and module.in_channels <= _MOST_INPUT_CHANNELS:
        return f"of {module.in_channels} input channels: embeds the input", True
    for name in site.path[-2:]:
        if name in _PATCHES:
            return f"in {name!r}: embeds the input", False
    return None
