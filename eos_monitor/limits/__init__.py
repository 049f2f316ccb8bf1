"""What an optimizer bears: the critical curvature of each coordinate."""

# Loaded with the room, so that every rule is registered before a threshold is read.
import eos_monitor.limits.neighbours
import eos_monitor.limits.rules  # noqa: F401
