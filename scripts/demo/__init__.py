"""A page to chat with a run."""
