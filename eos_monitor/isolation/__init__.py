"""A module's loss runs, and nothing of the module changes."""
