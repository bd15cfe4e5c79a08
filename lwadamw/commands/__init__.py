"""One module per command of `python -m lwadamw`; each has `add`, which declares its arguments."""
