"""What pytest does not look at for doctests."""

# It is for the server that forks the processes of tests, and takes a step when it is imported.
collect_ignore = ["warm.py"]
