"""Prepare models and data before tuning."""
