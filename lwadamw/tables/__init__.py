"""Tables: the device tables that a step is launched from, and how a stale table is noticed."""
