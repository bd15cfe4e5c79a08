"""Megatron-core: `lwadamw.AdamW` as its optimizer, width rules as its config overrides, and norms under its names.

megatron-core is imported when a function of this package is called. See docs/megatron.md.
"""

from .fused_adam import FusedAdam
from .overrides import config_overrides
from .swap import TESTED, Swap, use
from .watch import Watch, attach

__all__ = ["TESTED", "FusedAdam", "Swap", "Watch", "attach", "config_overrides", "use"]
