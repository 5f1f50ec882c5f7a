"""The reducer's output, computed once and read from disk."""
