"""The command line as `python -m lwadamw`. The console script `lwadamw` runs the same function."""

import sys

from .commands import main

sys.exit(main())
