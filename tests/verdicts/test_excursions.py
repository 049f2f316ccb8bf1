"""Losses that leave their bounds and come back: each cut from just below and just above."""

import math
from collections.abc import Iterable

import pytest

from eos_monitor.verdicts.excursions import Excursions


def fed(losses: Iterable[float], *, adaptive: bool = False) -> Excursions:
    excursions = Excursions(adaptive)
    for step, loss in enumerate(losses):
        excursions.add(step, loss)
    return excursions


CALM = [1.0] * 100
RISEN = [0.001] * 5 + [0.001 * 1.008**t for t in range(954)] + [2.0] * 300  # never above 3 times the median


@pytest.mark.parametrize(
    ("losses", "out"),
    [
        ([*CALM, *[2.99] * 24], False),
        ([*CALM, *[3.01] * 24], True),
        ([*CALM, *[3.01] * 23], False),
        ([*CALM, *[3.01] * 23, 2.0, 3.01], False),
        # above three times the median, but not above the start
        ([3.5] * 5 + CALM + [3.4] * 24, False),
        ([3.5] * 5 + CALM + [3.5] * 24, False),
        ([3.5] * 5 + CALM + [3.6] * 24, True),
        # the start is the median of five, not more and not fewer
        ([1.0, 1.0, 1.0, 3.5, 3.5, *[3.5] * 4, *CALM, *[3.4] * 24], True),
        ([3.5, 3.5, 1.0, 1.0, 3.5, *CALM, *[3.4] * 24], False),
        # far above median and start, three in a row
        ([*CALM, *[101.0] * 2], False),
        ([*CALM, *[101.0] * 3], True),
        ([*CALM, *[99.0] * 3], False),
        ([1.0] * 5 + [20.0] * 100 + [199.0] * 3, False),
        ([1.0] * 5 + [20.0] * 100 + [201.0] * 3, True),
        # lost at once
        ([*CALM, 9_990.0], False),
        ([*CALM, 10_010.0], True),
        ([*RISEN, 19.0], False),  # 19,000 times the start, but only 9.5 times the median
        ([*RISEN, 21.0], True),
        # the very first loss is above nothing
        ([1e9], False),
        ([1.0, math.nan], True),
    ],
)
def test_a_loss_is_out_of_bounds(losses: list[float], out: bool) -> None:
    assert fed(losses).out is out


@pytest.mark.parametrize(("peak", "adaptive"), [([101.0] * 3, True), ([1e6], True)], ids=["far", "lost"])
def test_a_second_moment_is_given_the_24_steps(peak: list[float], adaptive: bool) -> None:
    assert not fed(CALM + peak, adaptive=adaptive).out
    assert fed(CALM + 24 * peak[:1], adaptive=adaptive).out


@pytest.mark.parametrize(
    ("after", "out"),
    [([1.49] * 127, True), ([1.49] * 128, False), ([1.51] * 128, True), ([1.0] * 100 + [1.6] + [1.0] * 127, True)],
)
def test_a_loss_is_back_below_one_and_a_half_medians_128_times_in_a_row(after: list[float], out: bool) -> None:
    excursions = fed([1.0] * 256 + [200.0] * 3 + after)
    assert excursions.out is out
    known = (excursions.not_finite_at, excursions.crossed_at, excursions.confirmed_at, excursions.lateness)
    assert known == ((None, 256, 258, 2) if out else (None, None, None, None))


def test_all_of_an_excursion_is_forgotten_once_it_is_over() -> None:
    excursions = fed([1.0] * 10 + [math.nan] + [1.0] * 128)
    assert not excursions.out
    assert excursions.not_finite_at is excursions.crossed_at is excursions.confirmed_at is None
    excursions.add(500, math.inf)
    assert (excursions.not_finite_at, excursions.crossed_at, excursions.lateness) == (500, 500, 0)


def test_the_level_is_the_median_of_256_losses() -> None:
    assert fed([]).level is None
    assert fed([3.0]).level == 3.0
    assert fed([3.0, 1.0]).level == 2.0
    assert fed([3.0, 1.0, 7.0]).level == 3.0
    # 128 of each once the first 100 have left
    assert fed([9.0] * 100 + [1.0] * 128 + [2.0] * 128).level == 1.5
    assert fed([9.0] * 101 + [1.0] * 127 + [2.0] * 129).level == 2.0


def test_an_excursion_begins_where_the_last_one_in_a_row_does() -> None:
    excursions = fed([*CALM, 3.5, 3.5, 1.0, 3.5])
    assert excursions.crossed_at == 103
    assert excursions.lateness is None  # not confirmed
    for step in range(104, 127):
        excursions.add(step, 3.5)
    assert excursions.lateness == 23
    excursions.add(127, 1.0)  # not back yet
    assert (excursions.crossed_at, excursions.lateness) == (103, 23)
