"""Micro batches: examples packed, collated and handed out to the ranks."""
