"""Fetch pictures, videos and instruction files, and check them."""
