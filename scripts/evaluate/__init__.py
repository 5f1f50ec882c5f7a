"""Evaluate a run with lmms-eval."""
