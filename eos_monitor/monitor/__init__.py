"""Readings and verdicts around a training loop."""
