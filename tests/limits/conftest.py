"""What the tests of thresholds share."""

from typing import Any

import pytest

from eos_monitor.limits.thresholds import _RULES


@pytest.fixture
def registry() -> Any:
    """Let a test register rules that are forgotten after it."""
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)
