"""Check a data set before a GPU is taken."""
