"""State: what is kept, from group keys and storage types to checkpoints. Knows no step and no model."""
