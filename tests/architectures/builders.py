"""Every architecture of the zoo: the function that builds it at a width, on the meta device."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .diffusion import DIFFUSION
from .encoders import ENCODERS
from .further import FURTHER
from .language import LANGUAGE
from .mixtures import MIXTURES
from .others import OTHERS
from .packages import declare_torchvision_operators
from .unusual import UNUSUAL
from .vision import VISION

declare_torchvision_operators()

ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    **LANGUAGE,
    **MIXTURES,
    **ENCODERS,
    **VISION,
    **DIFFUSION,
    **OTHERS,
    **UNUSUAL,
    **FURTHER,
}
