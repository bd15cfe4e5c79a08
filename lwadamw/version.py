"""The version of the package. Every room may import this module, because it imports nothing of the package."""

from typing import Final

__version__: Final = "0.1.0"
