"""The laboratory: a small language model, text that every machine has, and runs that compare widths.

The laboratory uses the public interface of `lwadamw`, like any other user. `rich` and `matplotlib` are optional:
`pip install "lwadamw[lab]"` installs both.
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
