"""Checkpoints in the layout of a model's own code, before transformers had a class for it."""
