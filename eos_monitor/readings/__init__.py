"""One measurement of the edge ratio, and when the next one is due."""
