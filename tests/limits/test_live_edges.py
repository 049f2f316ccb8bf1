"""Every optimizer hovers where its threshold says: full-batch runs with the live state, 2,000 steps each."""

import pytest

from tests.benchmarks.live_edges import BAND, CASES, STEPS, run


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.banded])
def test_optimizer_hovers_at_edge_ratio_one(name: str) -> None:
    trail = run(CASES[name])
    assert trail.steps[-1] > STEPS - 30  # nothing ended it early
    assert len(trail.ratios) > 40
    # The band of averaging momenta: r swings about 1 by the delay with which second moments follow.
    assert BAND[0] <= trail.mean <= BAND[1]
