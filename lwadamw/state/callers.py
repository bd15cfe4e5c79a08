"""The line of the user that a warning is about."""

from __future__ import annotations

import os
import sys
from typing import Final

import torch

_TORCH: Final = os.path.dirname(os.path.abspath(torch.__file__))
_PACKAGE: Final = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_INSIDE: Final = (_TORCH + os.sep, _PACKAGE + os.sep)


def caller_level() -> int:
    """Return the `stacklevel` with which `warnings.warn` names the first caller outside torch and this package.

    Call it as an argument of `warnings.warn` itself: `warnings.warn(text, stacklevel=caller_level())`. The number of frames
    between the user and this package depends on torch's version, on hooks and on schedulers, so it is counted.

    Returns:
        The level. If every caller is inside, it is the level of the outermost one.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    return level
