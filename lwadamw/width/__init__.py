"""Width: what a parameter is to a width rule, and what the rule makes of it."""
