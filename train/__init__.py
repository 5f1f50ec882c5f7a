"""The recipe: everything frozen but the projector, tuned with DeepSpeed."""
