"""Checkpoints as other code bases publish them, read into the classes of `transformers` without a conversion step."""
