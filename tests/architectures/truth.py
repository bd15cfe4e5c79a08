"""The right role of every parameter of every architecture, decided by hand from how the modules multiply.

`TRUTH` has, for each architecture, patterns on parameter names; the first one that matches counts. The role is "vector",
"matrix" or "output". After it come the dimensions whose product is the fan_in, where the module is no linear layer or
convolution, and "/4" where the rows of four experts lie in one dimension. "undecided" is what the package must not decide. What
no pattern names follows from its module: at most one dimension, an embedding and a depthwise convolution are vectors; other
linear layers and convolutions are matrices. Anything else is an error.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Final

from torch import nn

from .truth_diffusion import DIFFUSION
from .truth_encoders import ENCODERS, VISION
from .truth_further import FURTHER
from .truth_language import LANGUAGE
from .truth_others import OTHERS
from .truth_unusual import UNUSUAL

TRUTH: Final[dict[str, dict[str, str]]] = {
    **LANGUAGE,
    **ENCODERS,
    **VISION,
    **DIFFUSION,
    **OTHERS,
    **UNUSUAL,
    **FURTHER,
}


def truth(architecture: str, name: str, model: nn.Module) -> tuple[str, tuple[int, ...] | None, int]:
    """Return the role of a parameter, the dimensions of its fan_in, and the number by which their product is divided.

    Args:
        architecture: name of the architecture.
        name: name of the parameter.
        model: the model. Any width will do.

    Raises:
        LookupError: neither a pattern nor the module decides the role.
    """
    path, _, attribute = name.rpartition(".")
    module, p = model.get_submodule(path), model.get_parameter(name)
    spec = next((spec for pattern, spec in TRUTH.get(architecture, {}).items() if fnmatchcase(name, pattern)), "")
    if not spec:
        if p.ndim <= 1 or isinstance(module, (nn.Embedding, nn.LayerNorm, nn.GroupNorm)) or _is_depthwise(module):
            return "vector", None, 1
        if attribute != "weight" or not _dims(module):
            raise LookupError(f"{architecture}: no role for {name} {tuple(p.shape)} of {type(module).__name__}")
        spec = "matrix"
    role, *dims = spec.split()
    if role in ("vector", "undecided"):
        return role, None, 1
    if not dims and not _dims(module):
        raise LookupError(f"{architecture}: no fan_in for {name} {tuple(p.shape)} of {type(module).__name__}")
    parts = int(dims.pop().strip("/")) if dims and dims[-1].startswith("/") else 1
    return role, tuple(map(int, dims)) or _dims(module), parts


def unused(architecture: str, names: list[str]) -> list[str]:
    """Return the patterns of an architecture that match none of its parameters."""
    patterns = TRUTH.get(architecture, {})
    return [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def _dims(module: nn.Module) -> tuple[int, ...]:
    """Return the dimensions of a weight that are its inputs; empty for a module of unknown class."""
    if isinstance(module, nn.Linear):
        return (1,)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return (0, *range(2, module.weight.ndim))
    if isinstance(module, nn.modules.conv._ConvNd):
        return tuple(range(1, module.weight.ndim))
    if type(module).__name__ == "Conv1D":
        return (0,)
    return ()
