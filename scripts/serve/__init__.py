"""Serve a tuned model with vLLM, and measure what the reduction saves there."""
