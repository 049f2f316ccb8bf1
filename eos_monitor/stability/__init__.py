"""Stability of an optimizer: its critical curvature, readings of the edge ratio, verdicts, the plain-loop probe."""

# Loaded with the package, so that every rule is registered before a threshold is read.
import eos_monitor.stability.neighbours
import eos_monitor.stability.rules  # noqa: F401
