"""Triton kernels of lwadamw. They are device code: they know tables and addresses, and know no optimizer and no model."""

from . import layout
from .adamw import adamw_kernel
from .coefficients import coefficients_kernel
from .grad_norm import grad_norm_kernel, total_kernel
from .huber import absolute_kernel, threshold_kernel
from .norms import norms_kernel

__all__ = [
    "absolute_kernel",
    "adamw_kernel",
    "coefficients_kernel",
    "grad_norm_kernel",
    "layout",
    "norms_kernel",
    "threshold_kernel",
    "total_kernel",
]
