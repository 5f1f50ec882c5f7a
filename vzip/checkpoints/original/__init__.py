"""Checkpoints in the layout of a model's own code, from before transformers had a class for it."""
