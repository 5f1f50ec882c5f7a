"""Checks of a data set before a GPU is taken."""
