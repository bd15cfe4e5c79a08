"""Leaves out the module that only the server of processes.py imports."""

collect_ignore = ["warm.py"]
