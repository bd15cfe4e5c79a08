"""The version of the package. Any module may import this file; it imports none."""

from typing import Final

__version__: Final = "0.1.0"
