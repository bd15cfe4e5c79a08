"""The state room: what an optimizer keeps between two steps, and how it is checked, stored, saved and loaded."""
