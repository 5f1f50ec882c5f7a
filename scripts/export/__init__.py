"""Export a run for other tools."""
