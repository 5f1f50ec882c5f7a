"""Training examples: from a file to a drawn subset and its token ids."""
