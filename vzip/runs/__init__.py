"""What a tuned run is: its projector, the comparison of its settings, and its exports."""
