"""Mutants that no test can notice, each with the reason: they count neither as killed nor as survivors."""

from __future__ import annotations

# (file, line, change) -> why nothing changes that anybody could see
EQUIVALENT: dict[tuple[str, str, str], str] = {}
