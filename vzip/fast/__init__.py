"""The fast path of projector tuning: the same gradients for fewer operations.

`train/losses.py` assembles it.
"""
