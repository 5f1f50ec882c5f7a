"""Guards of a run: signals that ask it to stop, launchers that end, numbers that are not finite."""
