"""Curvature of a loss: Hessian-vector products, eigenvalues, the curvature along a step."""
