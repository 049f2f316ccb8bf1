"""Curvature of a loss: the sandbox it is evaluated in, Hessian-vector products, eigenvalues."""
