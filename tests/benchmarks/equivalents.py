"""Mutants that no test can notice, each with the reason: they count neither as killed nor as survivors."""

from __future__ import annotations

# (file, line, change) -> why nothing changes that anybody could see
_LISTED: dict[tuple[str, str, str], str] = {
    (
        "curvature/lanczos.py",
        "vectors = basis.ritz_vectors(s, min(kept + 1, s.shape[1]))",
        "min(kept + 1, s.shape[1])  →  (max(kept + 1, s.shape[1]))",
    ): "more Ritz vectors than are used: slower, the same result",
    (
        "curvature/basis.py",
        "if not norm > 0.0:",
        "norm > 0.0  →  (norm >= 0.0)",
    ): "a vector of length 0 becomes NaN, and is refused for that two lines later",
    (
        "curvature/audit.py",
        "t += torch.diag(torch.tensor(beside[: m - 1], dtype=torch.float64), 1)",
        "t += torch.diag(torch.tensor(beside[: m - 1], dtype=torch.float64), 1)  →  "
        "t -= torch.diag(torch.tensor(beside[:m - 1], dtype=torch.float64), 1)",
    ): "eigvalsh reads the lower triangle only",
    (
        "curvature/hessian.py",
        "losses = [0.0] * len(self._batches)",
        "0.0  →  (1.0)",
    ): "each place is filled by the product of its batch",
    (
        "curvature/hessian.py",
        'error=None if self.method != "fd" else self.step.error if self.step is not None else 0.0,',
        "0.0  →  (1.0)",
    ): "the product above has chosen a step by then; the branch is there for mypy",
    (
        "isolation/sandbox.py",
        "stack.enter_context(torch.enable_grad())",
        "stack.enter_context(torch.enable_grad())  →  pass",
    ): "to leave inference mode turns gradients on too, in the versions of torch there are",
    (
        "limits/threshold_check.py",
        "self.spread = 10 ** (2 * torch.rand(self.size, generator=generator, dtype=torch.float64) - 1)",
        "10  →  (11)",
    ): "any spread of gradients ages the state",
    (
        "limits/threshold_check.py",
        "probe = torch.randn(len(units), generator=torch.Generator().manual_seed(0), dtype=torch.float64)",
        "0  →  (1)",
    ): "any random vector tells whether a map is linear",
}


def has_no_consequence(file: str, text: str, change: str) -> bool:
    """Whether a change of a line is listed, or takes the assertion from a ``zip(…, strict=True)``."""
    strict = change.startswith("True ") and text.count("True") == text.count("strict=True") > 0
    return strict or (file, text, change) in _LISTED
