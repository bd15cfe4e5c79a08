"""Step: one optimizer step, from parameter groups to new weights and the norms of the step."""
