"""Score a run with lmms-eval."""
