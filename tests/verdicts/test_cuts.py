"""Each cut that the pages name, from just below and from just above: losses, readings, jumps of the learning rate."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eos_monitor import InstabilityDetector, StabilityReading, Verdict
from eos_monitor.verdicts.edge_history import EdgeHistory
from eos_monitor.verdicts.excursions import Excursions
from eos_monitor.verdicts.jump_risk import JumpRisk, class_of, cut_of

UNKNOWN, WARMING_UP, STABLE, SHARPENING, EDGE, RESTRAINED, DIVERGING = Verdict
PAGE = (Path(__file__).parents[2] / "docs" / "detector.md").read_text(encoding="utf-8")


def reading(r: float | None, error: float | None = 0.0, *, step: int = 0, **fields: Any) -> StabilityReading:
    defaults = {"full_batch": True, "converged": r is not None, "lr": (0.1,)}
    return StabilityReading(step=step, loss=1.0, edge_ratio=r, error=error, **(defaults | fields))


def batch(share: float, error: float = 0.0, r: float = 0.2) -> StabilityReading:
    """A minibatch reading whose batch sharpness is a share of its line 2 / lr."""
    lines = (20.0, 20.0)
    return reading(
        r,
        full_batch=False,
        sampling_error=0.0,
        batch_sharpness=20.0 * share,
        batch_sharpness_error=20.0 * error,
        batch_sharpness_limits=lines,
    )


# Losses out of bounds.


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


# Which excess is the optimizer's doing.


def excess_after(r: float | None, gap: int = 10, **settings: Any) -> InstabilityDetector:
    """A run whose edge ratio is r at step 0 and small after, and whose loss leaves its bounds ``gap`` steps later."""
    full = settings.pop("full", True)
    detector = InstabilityDetector(**settings)
    for step in range(100):
        detector.update(step, loss=1.0, reading=reading(0.01, full_batch=full, sampling_error=0.0))
    detector.update(100, loss=1.0, reading=reading(r, full_batch=full, sampling_error=0.0))
    for step in range(101, 100 + gap + 30):
        loss = 5.0 if step >= 100 + gap else 1.0
        detector.update(step, loss=loss, reading=reading(0.01, full_batch=full, sampling_error=0.0))
    return detector


@pytest.mark.parametrize(
    ("r", "gap", "settings", "lost"),
    [
        (0.89, 10, {}, False),
        (0.91, 10, {}, True),
        (0.91, 64, {}, True),
        (0.91, 65, {}, False),
        # with momentum and minibatches runs fail from (1 − β) / (1 + β) on: 0.9 of it is 0.0474 at β = 0.9
        (0.046, 10, {"momentum": 0.9, "full": False}, False),
        (0.049, 10, {"momentum": 0.9, "full": False}, True),
        (0.049, 10, {"momentum": 0.9}, False),
        (0.31, 10, {"momentum": 0.5, "full": False}, True),
        (0.29, 10, {"momentum": 0.5, "full": False}, False),
        (0.89, 10, {"momentum": 0.49, "full": False}, False),
        (0.89, 10, {"family": "adam", "momentum": 0.9, "full": False}, False),
    ],
)
def test_an_excess_is_blamed_on_an_edge_ratio(r: float, gap: int, settings: dict[str, Any], lost: bool) -> None:
    detector = excess_after(r, gap, **settings)
    assert (detector.verdict is DIVERGING) is lost
    assert detector.advisory == (None if lost else "loss-excess")


def test_blame_ends_with_the_excess() -> None:
    detector = excess_after(0.95)
    assert detector.verdict is DIVERGING
    for step in range(130, 130 + 128):
        detector.update(step, loss=1.0)
    assert detector.verdict is STABLE
    for step in range(300, 330):
        detector.update(step, loss=5.0, reading=reading(0.01))
    assert detector.verdict is STABLE
    assert detector.advisory == "loss-excess"


# Readings.


@pytest.mark.parametrize(
    ("r", "flips", "expected"),
    [
        (0.949, False, STABLE),
        (0.951, False, EDGE),
        (0.949, True, EDGE),
        (0.901, True, EDGE),
        (0.899, True, STABLE),
    ],
)
def test_an_edge_ratio_hovers_within_a_tenth_of_one(r: float, flips: bool, expected: Verdict) -> None:
    detector = InstabilityDetector(full_batch=True)
    for step in range(40):
        # five of six neighbours change sign, or none; no lag repeats
        size = (1.0 + math.sin(0.7 * step * step)) * (1.0 if not flips or step % 6 else -1.0)
        detector.update(step, reading=reading(r), projection=(-1.0) ** (step if flips else 0) * size)
    assert detector.verdict is expected


@pytest.mark.parametrize(("flipping", "expected"), [(0.45, STABLE), (0.55, EDGE)])
def test_below_095_most_updates_must_flip(flipping: float, expected: Verdict) -> None:
    detector = InstabilityDetector(full_batch=True)
    sign = 1.0
    debt = 0.0
    for step in range(200):
        debt += flipping
        if debt >= 1.0:
            debt -= 1.0
            sign = -sign
        detector.update(step, reading=reading(0.93), projection=sign * (1.1 + math.sin(0.7 * step * step)))
    assert detector.oscillation.period is None
    assert detector.verdict is expected


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([0.97, 0.97], EDGE),
        ([0.5, 0.97], UNKNOWN),
        ([0.97, 0.97, 0.5, 0.5], EDGE),
        ([0.97, 0.97, 0.5, 0.5, 0.5], UNKNOWN),
    ],
)
def test_it_hovers_in_three_of_five_readings(others: list[float], expected: Verdict) -> None:
    detector = InstabilityDetector(full_batch=True)
    for i, r in enumerate([*others, 0.97]):
        detector.update(100 * i, reading=reading(r, step=100 * i))
    assert detector.verdict is expected


def test_an_error_widens_what_counts_as_hovering() -> None:
    for error, expected in ((0.06, EDGE), (0.04, STABLE)):  # twice that: 0.12 and 0.08 around 0.885
        detector = InstabilityDetector(full_batch=True)
        for step in range(40):
            size = 1.1 + math.sin(0.7 * step * step)
            detector.update(step, reading=reading(0.885, error), projection=(-1.0) ** step * size)
        assert detector.verdict is expected


def test_margin_follows_the_learning_rate() -> None:
    detector = InstabilityDetector(full_batch=True)
    assert detector.update(0, lr=0.1, reading=reading(0.5, 0.05)) is STABLE
    assert detector.update(1, lr=0.16) is STABLE  # 0.8 + 2 · 0.08
    assert detector.update(2, lr=0.17) is UNKNOWN  # 0.85 + 2 · 0.085
    assert "0.85" in detector.reason


@pytest.mark.parametrize(
    ("share", "error", "expected"),
    [
        (0.74, 0.0, STABLE),
        (0.76, 0.0, EDGE),
        (0.64, 0.06, UNKNOWN),
        (0.64, 0.05, STABLE),
    ],
)
def test_batch_sharpness_has_a_line_at_three_quarters(share: float, error: float, expected: Verdict) -> None:
    assert InstabilityDetector().update(0, reading=batch(share, error)) is expected


@pytest.mark.parametrize(("share", "expected"), [(0.66, EDGE), (0.64, STABLE)])
def test_and_it_is_left_at_065(share: float, expected: Verdict) -> None:
    detector = InstabilityDetector()
    assert detector.update(0, reading=batch(0.8)) is EDGE
    for step in range(1, 20):
        detector.update(step, reading=batch(share))
    assert detector.verdict is expected


def test_batch_sharpness_below_its_line_proves_nothing_where_the_edge_ratio_is_near() -> None:
    for r, expected in ((0.95, STABLE), (0.99, UNKNOWN)):  # 2 % of error, twice
        assert InstabilityDetector().update(0, reading=batch(0.5, r=r)) is expected


def test_batch_sharpness_follows_the_learning_rate() -> None:
    detector = InstabilityDetector()
    assert detector.update(0, lr=0.1, reading=batch(0.5)) is STABLE
    assert detector.update(1, lr=0.16) is EDGE
    assert "0.80" in detector.reason


@pytest.mark.parametrize(("momentum", "last"), [(0.0, 63), (0.9, 63), (0.99, 299)])
def test_a_run_without_readings_counts_as_unknown(momentum: float, last: int) -> None:
    """After 64 steps, or three times the memory of the momentum."""
    detector = InstabilityDetector(momentum=momentum)
    found = [detector.update(7 + step, loss=1.0) for step in range(400)]
    assert found.index(UNKNOWN) == last + 1
    assert set(found[: last + 1]) == {WARMING_UP}


def test_without_readings_updates_that_flip_at_the_edge_say_so() -> None:
    """r̂ = −ρ1 without momentum, and the sign changes at each step: the closer sizes are, the closer ρ1 is to −1."""
    for spread, expected in ((0.22, EDGE), (0.4, WARMING_UP)):
        detector = InstabilityDetector()
        sizes = [1.0 + spread * math.sin(0.7 * step * step) for step in range(64)]
        for step, size in enumerate(sizes):
            detector.update(step, projection=(-1.0) ** step * size)
        early = np.array(sizes[:-1])
        late = np.array(sizes[1:])
        rho = float(early @ late / np.sqrt((early @ early) * (late @ late)))
        assert (rho >= 0.95) == (expected is EDGE)
        assert detector.oscillation.edge_ratio == pytest.approx(rho)
        assert detector.verdict is expected


# History of readings.


def history(*readings: StabilityReading, lr: tuple[float, ...] = (0.1,)) -> EdgeHistory:
    edge = EdgeHistory()
    for one in readings:
        edge.add(one)
    edge.follow(lr)
    return edge


def test_a_reading_has_an_error_of_two_percent_and_a_probe_one_of_ten() -> None:
    probe = {"full_batch": False, "sampling_error": None}
    found = history(
        *(reading(2.0, 0.001), reading(-2.0, 0.001), reading(2.0, 0.1)),
        *(reading(2.0, 0.15, **probe), reading(2.0, 0.15, full_batch=False, sampling_error=0.1)),
    )
    assert [e.error for e in found.entries] == pytest.approx([0.04, 0.04, 0.1, 0.25, 0.15])


def test_a_rise_comes_from_below_one_to_above_it_by_its_error() -> None:
    def rises(*ratios: float) -> int:
        return history(*[reading(r, 0.05) for r in ratios]).rises

    assert rises(0.8, 1.04) == 0
    assert rises(0.8, 1.06) == 1
    assert rises(0.8, 1.2, 1.3) == 1
    # it has to be below by its error before it can rise again
    assert rises(0.8, 1.2, 0.96, 1.2) == 1
    assert rises(0.8, 1.2, 0.94, 1.2) == 2
    assert rises(1.2, *[0.9] * 15) == 1
    assert rises(1.2, *[0.9] * 16) == 0  # sixteen are kept


def test_what_was_beyond_shrinks_with_a_cut_and_does_not_grow_with_a_raise() -> None:
    readings = [reading(0.8, 0.05), reading(1.5, 0.1)]
    at = [history(*readings, lr=(lr,)) for lr in (0.1, 0.08, 0.0765, 0.0675, 0.066, 0.5)]
    # 1.5 − 2 · 0.1 is 1 at 10/13 of the rate, 1.5 itself at 2/3
    assert [edge.beyond for edge in at] == [[False, b] for b in (True, True, False, False, False, True)]
    assert [edge.rises for edge in at] == [1, 1, 1, 1, 0, 1]
    assert [edge.ratio for edge in at] == pytest.approx(
        [1.5 * lr / 0.1 for lr in (0.1, 0.08, 0.0765, 0.0675, 0.066, 0.5)]
    )


def test_a_raise_does_not_put_an_older_reading_beyond() -> None:
    edge = history(reading(0.8), lr=(0.2,))
    assert edge.beyond == [False]
    assert edge.ratio == pytest.approx(1.6)


@pytest.mark.parametrize(
    ("then", "now", "factor"),
    [
        ((0.1,), None, 1.0),
        ((0.1, 0.4), (0.2,), 2.0),  # a common rate: that of the first group speaks
        ((0.1, 0.4), (0.1, 0.8), 2.0),
        ((0.1, 0.4), (0.05, 0.1), 0.5),
        ((0.1, 0.0), (0.3, 0.0), 3.0),  # a group that rests
        ((0.1, 0.0), (0.1, 0.1), None),
        ((0.0,), (0.1,), None),
        ((0.1, 0.1), (0.1, 0.1, 0.1), None),
        ((0.0,), (0.0,), 1.0),
    ],
)
def test_an_edge_ratio_follows_the_rates_of_its_groups(
    then: tuple[float, ...], now: tuple[float, ...] | None, factor: float | None
) -> None:
    ratio = history(reading(0.5, lr=then), lr=now).ratio  # type: ignore[arg-type]
    assert ratio == (None if factor is None else pytest.approx(0.5 * factor))


def growth(*points: tuple[int, float], lr: tuple[float, ...] = (0.1,)) -> float | None:
    return history(*[reading(r, step=step, lr=lr) for step, r in points]).growth


def exponential(rate: float, count: int, every: int = 10) -> list[tuple[int, float]]:
    return [(every * i, 0.1 * math.exp(rate * every * i)) for i in range(count)]


def test_growth_is_the_rate_of_the_curvature() -> None:
    assert growth(*exponential(0.01, 8)) == pytest.approx(0.01)
    assert growth(*exponential(0.01, 6)) == pytest.approx(0.01)
    assert growth(*exponential(0.01, 5)) is None
    assert growth(*exponential(1.1e-4, 8)) == pytest.approx(1.1e-4)
    assert growth(*exponential(0.9e-4, 8)) is None
    assert growth(*exponential(-0.01, 8)) is None
    # the last eight only
    assert growth(*[(i - 200, 9.0 / (i + 1)) for i in range(8)], *exponential(0.01, 8)) == pytest.approx(0.01)
    # a negative ratio has no logarithm, and leaves too few
    assert growth(*exponential(0.01, 5), (50, -1.0)) is None
    assert growth((-10, -1.0), *exponential(0.01, 6)) == pytest.approx(0.01)


def test_growth_needs_nine_of_ten_slopes_upwards() -> None:
    """Of the 15 slopes between six readings the second smallest decides."""
    rising = exponential(0.01, 6)
    one_down = [*rising[:2], (20, rising[1][1] * 0.99), *rising[3:]]
    two_down = [*rising[:3], (30, rising[1][1] * 0.99), *rising[4:]]
    assert growth(*one_down) is not None
    assert growth(*two_down) is None


def test_growth_of_curvature_is_measured_by_the_highest_rate_of_the_groups() -> None:
    """The ratio and the highest rate double together: the curvature stays, whatever the other group does."""
    edge = EdgeHistory()
    for i in range(8):
        edge.add(reading(0.1 * 1.1**i, step=10 * i, lr=(0.1 * 1.1**i, 0.01)))
    assert edge.growth is None


def test_all_is_forgotten_when_cleared() -> None:
    edge = history(*[reading(r, step=10 * i) for i, r in enumerate((0.5, 0.6, 0.7, 0.8, 0.9, 1.5))])
    assert (edge.rises, edge.beyond[-1], edge.growth is None) == (1, True, False)
    edge.clear()
    assert (edge.entries, edge.beyond, edge.rises, edge.growth, edge.ratio, edge.batch_share) == (
        [],
        [],
        0,
        None,
        None,
        None,
    )
    edge.add(reading(1.5))
    edge.follow((0.1,))
    assert edge.rises == 1  # nothing was above before


# Restrained.


def restrained(beyond: Iterable[bool], every: int = 4) -> list[int]:
    """Steps with the verdict RESTRAINED, of readings of 1.3 or 0.99."""
    detector = InstabilityDetector(full_batch=True)
    found = []
    for i, one in enumerate(beyond):
        for step in range(every * i, every * (i + 1)):
            given = reading(1.3 if one else 0.99, step=step) if step == every * i else None
            if detector.update(step, reading=given) is RESTRAINED:
                found.append(step)
    return found


def test_an_instability_is_restrained_from_the_32nd_step_beyond_the_edge() -> None:
    assert restrained([True] * 8)[:1] == []
    assert restrained([True] * 9) == [32, 33, 34, 35]


def test_it_takes_two_of_the_last_four_readings() -> None:
    T, F = True, False
    assert restrained([T] * 5 + [F] * 2 + [T, T]) != []
    assert restrained([T, F, F, F, F, F, F, F, F, F, T, F, F], every=4) == []
    assert restrained([T, T, T, T, T, T, F, F, T]) == [32, 33, 34, 35]
    assert restrained([T, F, F, F, F, F, T, F, F, T], every=8) == [72, 73, 74, 75, 76, 77, 78, 79]


def test_or_two_rises_from_below_one() -> None:
    """Each is read beyond once, far from the other, and in between far below."""
    detector = InstabilityDetector(full_batch=True)
    found = []
    for i in range(12):
        r = 1.3 if i in (1, 7) else 0.5
        found.append(detector.update(10 * i, reading=reading(r, step=10 * i)))
    assert RESTRAINED not in found[:7]
    assert found[7] is RESTRAINED


@pytest.mark.parametrize(("update", "expected"), [(1e-4, RESTRAINED), (1e-8, EDGE)])
def test_updates_that_vanish_are_not_restrained(update: float, expected: Verdict) -> None:
    detector = InstabilityDetector(full_batch=True)
    for step in range(60):
        detector.update(step, reading=reading(1.3, step=step), relative_update=update)
    assert detector.verdict is expected


# Jumps of the learning rate.


@pytest.mark.parametrize(
    ("rates", "flagged"),
    [
        ([0.1, 0.139], False),
        ([0.1, 0.141], True),
        ([0.1, 0.11, 0.12, 0.13, 0.135, 0.141], True),  # over five steps
        ([0.1, 0.11, 0.12, 0.13, 0.135, 0.139, 0.141], False),  # over six
        ([0.141, 0.1], False),
    ],
)
def test_a_rise_is_a_factor_of_14_within_five_steps(rates: list[float], flagged: bool) -> None:
    risk = JumpRisk()
    for step, lr in enumerate(rates):
        risk.add(step, lr, None, 4.0, "gradient descent")
    assert (risk.ratio is not None) is flagged
    assert risk.at == (len(rates) - 1 if flagged else None)


def test_a_rise_is_told_for_64_steps_with_the_highest_ratio_that_it_reaches() -> None:
    risk = JumpRisk()
    risk.add(0, 0.1, 0.2, 2.0, "gradient descent")  # foreseen
    assert risk.ratio == pytest.approx(4.0)
    risk.add(1, 0.2, 0.2, 3.5, "gradient descent")
    assert risk.ratio == pytest.approx(4.0)
    risk.add(2, 0.2, 0.2, 4.5, "gradient descent")
    assert (risk.ratio, risk.at) == (pytest.approx(4.5), 0)
    risk.add(64, 0.2, 0.2, 4.5, "gradient descent")
    assert risk.ratio is not None
    risk.add(65, 0.2, 0.2, 4.5, "gradient descent")
    assert risk.ratio is risk.at is None


@pytest.mark.parametrize("lr", [None, 0.0, math.inf, math.nan])
def test_a_rate_that_says_nothing_is_passed_over(lr: float | None) -> None:
    risk = JumpRisk()
    risk.add(0, 0.1, None, 4.0, "gradient descent")
    risk.add(1, lr, 1.0, 4.0, "gradient descent")
    assert risk.ratio is None
    risk.add(2, 0.2, math.inf, 4.0, "gradient descent")
    assert risk.ratio == pytest.approx(4.0)


CLASSES = {
    "gradient descent": (("sgd", 0.49, True), 2.3),
    "Nesterov": (("nesterov", 0.9, True), 1.2),
    "heavy ball": (("sgd", 0.5, True), 1.35),
    "Adam": (("adam", 0.9, False), 2.0),
    "SGD, minibatches": (("sgd", 0.49, False), 1.7),
    "momentum, minibatches": (("nesterov", 0.5, False), 0.3),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_each_class_of_optimizers_has_its_cut(kind: str) -> None:
    settings, cut = CLASSES[kind]
    assert class_of(*settings) == kind
    assert cut_of(kind) == cut
    for reached, flagged in ((0.99 * cut, False), (1.01 * cut, True)):
        risk = JumpRisk()
        risk.add(0, 0.1, None, reached / 2, kind)
        risk.add(1, 0.2, None, reached, kind)
        assert (risk.ratio is not None) is flagged


def published() -> dict[str, list[str]]:
    """Rows of the page's table of failed jumps, written by the benchmark."""
    table = PAGE.partition("<!-- bench:risks -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.strip().splitlines()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("kind", CLASSES)
def test_the_advice_quotes_the_published_failures(kind: str) -> None:
    table = published()
    head = next(row for name, row in table.items() if name.startswith("failed"))
    for bounds, cell in zip(head, table[kind], strict=True):
        low, high = (float(bound) for bound in bounds.split("–"))
        failed, jumps = (int(number) for number in re.findall(r"\d+", cell))
        for r in (low + 0.01, min(high - 0.01, 1e3)):
            risk = JumpRisk()
            risk.ratio = r
            quoted = f"; of {jumps} such jumps in the benchmark {failed} failed." if jumps else f"{r:.2g}."
            assert (risk.advice(kind) or "").endswith(quoted)
