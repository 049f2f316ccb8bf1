"""What is told about a run, and where it goes."""
