"""The rhythm of updates: each cut from both sides, against NumPy."""

import math
from collections.abc import Iterable

import numpy as np
import pytest

from eos_monitor.verdicts.oscillation import Oscillation


def seen(along: Iterable[float], momentum: float = 0.0) -> Oscillation:
    oscillation = Oscillation(momentum)
    for value in along:
        oscillation.add(value, None, None)
    return oscillation


def sized(sizes: Iterable[float]) -> Oscillation:
    oscillation = Oscillation(0.0)
    for value in sizes:
        oscillation.add(None, None, value)
    return oscillation


def correlation(series: np.ndarray, lag: int) -> float:
    early, late = series[:-lag], series[lag:]
    return float(early @ late / np.sqrt((early @ early) * (late @ late)))


@pytest.mark.parametrize(
    ("noise", "locked"), [(0.05, True), (0.1, True), (0.13, True), (0.14, False), (0.2, False), (0.4, False)]
)
def test_updates_are_locked_where_their_correlation_is_above_098(noise: float, locked: bool) -> None:
    series = (-1.0) ** np.arange(64) + noise * np.random.default_rng(3).standard_normal(64)
    rho = correlation(series, 2)
    assert (rho > 0.98) is locked
    assert seen(series).period == (2 if locked else None)


@pytest.mark.parametrize(("factor", "locked"), [(0.9885, False), (0.9905, True)])
def test_a_lock_keeps_half_of_its_power(factor: float, locked: bool) -> None:
    """Between 32 updates the power falls by factor⁶⁴: 0.477 and 0.543. The correlation is 1 all the time."""
    assert (seen((-factor) ** t for t in range(64)).period == 2) is locked


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6, 8])
def test_the_shortest_period_that_repeats_is_named(period: int) -> None:
    shape = [1.0, -0.4, 0.3, -0.9, 0.8, -0.2, 0.6, -1.1][:period]
    series = np.array([shape[t % period] for t in range(64)])
    repeating = [lag for lag in (2, 3, 4, 5, 6, 8) if correlation(series, lag) > 0.98]
    assert seen(series).period == repeating[0] == period


@pytest.mark.parametrize("period", [7, 9, 12])
def test_other_periods_are_none(period: int) -> None:
    rng = np.random.default_rng(period).standard_normal(period)
    assert seen(rng[t % period] for t in range(64)).period is None


def test_a_slow_swing_is_no_lock() -> None:
    """It correlates with itself two updates later, and changes sign in 1 of 32 steps."""
    series = np.sin(2 * np.pi * (np.arange(64) + 0.5) / 64)
    assert correlation(series, 2) > 0.98 - 1e-3
    assert seen(1.0 if x > 0 else -1.0 for x in series).period is None


@pytest.mark.parametrize(("turns", "locked"), [(12, False), (13, True)])
def test_a_lock_changes_sign_in_a_fifth_of_the_steps(turns: int, locked: bool) -> None:
    """Of 63 steps 12 are 19 % and 13 are 21 %: a series of large equal parts, whose small rests only turn."""
    series = np.array([1e3 if t % 4 == 0 else 1.0 for t in range(64)])
    places = [t for t in range(64) if t % 4 == 2][: turns // 2]
    series[places] *= -1  # two turns each
    if turns % 2:
        series[63] *= -1
    assert np.mean(series[1:] * series[:-1] < 0) == turns / 63
    assert correlation(series, 4) > 0.98
    assert (seen(series).period is not None) is locked


def test_a_period_is_looked_for_once_in_eight_and_needs_64_updates() -> None:
    found = [seen((-1.0) ** t for t in range(count)).period for count in (56, 63, 64)]
    assert found == [None, None, 2]
    oscillation = seen((-1.0) ** t for t in range(64))
    for t in range(64, 72):
        assert oscillation.period == 2
        oscillation.add(float((7 * t * t) % 11) - 5.0, None, None)
    assert oscillation.period is None


def test_numbers_that_are_not_finite_are_passed_over() -> None:
    oscillation = seen([1.0, math.nan, -1.0, math.inf] * 8)
    assert oscillation.flips == 1.0


def test_the_share_of_flips_is_known_from_16_updates_on() -> None:
    assert seen([1.0, -1.0] * 7 + [1.0]).flips is None
    assert seen([1.0, -1.0] * 8).flips == 1.0
    assert seen([1.0, 1.0, -1.0, -1.0] * 4).flips == pytest.approx(7 / 15)
    assert seen([1.0, 0.0] * 8).flips == 0.0
    # of the last 64 only
    assert seen([1.0] * 30 + [1.0, -1.0] * 32).flips == 1.0


def test_the_random_vector_speaks_where_there_is_no_mode() -> None:
    oscillation = Oscillation(0.0)
    for t in range(64):
        oscillation.add(None, (-1.0) ** t, None)
    assert (oscillation.flips, oscillation.period, oscillation.edge_ratio) == (1.0, 2, None)
    assert oscillation.amplification == pytest.approx(0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_edge_ratio_comes_from_the_correlation_of_neighbours(momentum: float) -> None:
    series = np.random.default_rng(1).standard_normal(64)
    assert seen(series[:63], momentum).edge_ratio is None
    expected = (momentum - correlation(series, 1)) / (1 + momentum)
    assert seen(series, momentum).edge_ratio == pytest.approx(expected)


def test_amplification_is_known_from_32_updates_on_and_about_the_last_32() -> None:
    assert seen((-1.1) ** t for t in range(31)).amplification is None
    assert seen((-1.1) ** t for t in range(32)).amplification == pytest.approx(math.log(1.1))
    assert seen([*[5.0] * 20, *((-0.9) ** t for t in range(32))]).amplification == pytest.approx(math.log(0.9))
    assert seen([1.0] * 16 + [0.0] * 16).amplification is None
    assert seen([0.0] * 16 + [1.0] * 16).amplification is None


def test_nothing_moves_below_1e_9_for_32_updates() -> None:
    assert not sized([0.9e-9] * 31).still
    assert sized([0.9e-9] * 32).still
    assert not sized([1.1e-9] * 32).still
    assert not sized([1.0] + [0.9e-9] * 31).still
    assert sized([1.0] + [0.9e-9] * 32).still


def test_updates_move_above_1e_7() -> None:
    assert sized([1e-9] * 31).moving  # not known yet
    assert not sized([0.9e-7] * 32).moving
    assert sized([1.1e-7] * 32).moving
    assert sized([1.1e-7] + [0.9e-7] * 31).moving
    assert not sized([1.1e-7] + [0.9e-7] * 32).moving
    assert not sized([1.0] * 96 + [0.4] * 32).moving  # they die out


@pytest.mark.parametrize(
    ("sizes", "decaying"),
    [
        ([1.0] * 96 + [0.49] * 32, True),
        ([1.0] * 96 + [0.51] * 32, False),
        ([1.0] * 95 + [0.49] * 32, False),  # 128 are needed
        ([1.0] + [0.1] * 95 + [0.49] * 32, True),  # the largest of the oldest
        ([9.0] + [0.1] * 96 + [0.49] * 32, False),  # which has left
        ([0.1] * 63 + [1.0] + [0.1] * 32 + [0.49] * 32, True),
        ([0.1] * 64 + [1.0] + [0.1] * 31 + [0.49] * 32, False),
        ([1.0] * 96 + [0.9] + [0.1] * 31, False),
        ([1.0] * 95 + [0.9] + [0.1] * 32, True),
    ],
)
def test_updates_die_out_below_half(sizes: list[float], decaying: bool) -> None:
    assert sized(sizes).decaying is decaying


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_the_size_of_projections_does_not_matter(size: float) -> None:
    series = np.random.default_rng(1).standard_normal(64)
    assert seen(size * series).edge_ratio == pytest.approx(seen(series).edge_ratio)
    assert seen(size * (-1.0) ** t for t in range(64)).period == 2
    assert seen(size * (-1.1) ** t for t in range(32)).amplification == pytest.approx(math.log(1.1))
    assert seen([size, -size] * 8).flips == 1.0
