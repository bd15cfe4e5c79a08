"""Frameworks: what each of them has to be told about this package, and nothing else. One package or file per framework."""
