"""Data sets in LLaVA's conversation format: read, draw a subset, check pictures, build batches."""
