"""Monitor: reads what a run does now and then, and changes nothing."""
