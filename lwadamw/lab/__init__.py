"""Laboratory: a small language model, text that every machine has, and runs that compare widths.

Uses the public API of `lwadamw` only. rich and matplotlib are optional: `pip install "lwadamw[lab]"`.
"""

from .data import Corpus, batches, from_file, standard_library, windows
from .model import ModelConfig, Transformer
from .training import Run, Settings

__all__ = [
    "Corpus",
    "ModelConfig",
    "Run",
    "Settings",
    "Transformer",
    "batches",
    "from_file",
    "standard_library",
    "windows",
]
