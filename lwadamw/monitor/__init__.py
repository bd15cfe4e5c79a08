"""The monitor room: it reads what a run does from time to time, and changes nothing."""
