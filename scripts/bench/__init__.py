"""Benchmarks, each of them ratios measured side by side."""
