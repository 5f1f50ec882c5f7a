"""vzip in the tools that its users have. Each file needs its tool only when it is imported."""
