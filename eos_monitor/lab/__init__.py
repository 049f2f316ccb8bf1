"""The experiments, runnable."""
