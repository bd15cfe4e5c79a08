"""Input projections: matrices whose inputs are data of a fixed size, so that they embed the input as an embedding does."""

from __future__ import annotations

import re
from typing import Final

from torch import nn

from .heads import is_multiplied
from .sites import Site, class_name

# A first convolution of at most this many input channels reads an image or a sound.
_MOST_INPUT_CHANNELS: Final = 4
# Outside the numbered layers, a linear layer or a convolution of this name, or the first one in a module of this name or of
# such a class, reads patches, latents, spectra or actions.
_NAMES: Final = re.compile(
    r"patch_embed(ding|dings|der)?|patch_(projection|conv|dense)|patcher|conv_proj|conv_stem|vision_embed_tokens"
    r"|video_patch_projection|x_embedders?|img_in|audio_latent_proj|audio_proj_in|noisy_images_proj|mel_conv"
    r"|embed_(state|action|return)|action_in_proj|quant_conv|post_quant_conv"
)
_CLASSES: Final = re.compile(r"Patch(Embed(s|ding|dings|der)?|Projection)$")


def embeds_the_input(site: Site) -> tuple[str, bool] | None:
    """Return why a matrix embeds the input, and whether the evidence is a size; None where there is no such evidence.

    Args:
        site: where the weight sits, as `plain` gives it.
    """
    module = site.module
    if site.attribute != "weight":
        return None
    if isinstance(module, nn.modules.conv._ConvNd) and _reads_channels(module) and _is_first(site):
        return f"of {module.in_channels} input channels: embeds the input", True
    if any(part.isdigit() for part in site.path):
        return None
    for depth in range(max(len(site.path) - 2, 0), len(site.path)):
        name, holder = site.path[depth], site.trail[depth + 1]
        if (_NAMES.fullmatch(name) or _CLASSES.search(class_name(holder))) and _first_in(holder) is module:
            return f"in {name!r}: embeds the input", False
    return None


def _reads_channels(module: nn.modules.conv._ConvNd) -> bool:
    # Four channels of a kernel of one element may be the heads of an attention.
    return module.in_channels <= _MOST_INPUT_CHANNELS - (max(module.kernel_size) == 1)


def _is_first(site: Site) -> bool:
    """Return whether a convolution is the first one of the model, or of a part of it such as a tower."""
    for depth, container in enumerate(site.trail[:-1]):
        if any(part.isdigit() for part in site.path[:depth]):
            return False
        listed = isinstance(container, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) and depth > 0
        first = next((m for m in container.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
        if not listed and first is site.module:
            return True
    return len(site.trail) == 1


def _first_in(container: nn.Module) -> nn.Module | None:
    return next((module for module in container.modules() if is_multiplied(module)), None)
