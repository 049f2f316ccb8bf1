"""Layer-wise stability: which layer drives it."""
