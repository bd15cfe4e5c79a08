"""Step: one step of the optimizer, from parameter groups to new weights and their norms."""
