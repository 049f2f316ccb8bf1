"""Stability of an optimizer: its critical curvature, readings of the edge ratio, verdicts, the plain-loop probe."""
