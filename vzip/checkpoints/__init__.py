"""Read checkpoints in the layout of `transformers`, or of a model's original code."""
