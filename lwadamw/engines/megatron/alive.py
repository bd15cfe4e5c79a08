"""Which optimizers of this process were built for Megatron and still exist."""

from __future__ import annotations

import weakref
from typing import Final

from ...step.optimizer import AdamW

ALIVE: Final[weakref.WeakSet[AdamW]] = weakref.WeakSet()
