"""Data sets in LLaVA's conversation format: reading, drawing a subset, checking pictures, batching."""
