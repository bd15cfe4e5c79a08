"""What the model packages need before they can be imported on a machine without CUDA."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_OPERATORS = "nms", "qnms"
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def declare_torchvision_operators() -> None:
    """Declare the operators of torchvision if its binary cannot be loaded.

    The wheel of torchvision is linked to CUDA. Next to a torch without CUDA its operators are missing, and its import fails.
    Models need none of them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, _OPERATORS[0]):
        return
    try:
        torch.ops.load_library(str(Path(spec.origin).with_name("_C.so")))
    except OSError:
        for name in _OPERATORS:
            _LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
