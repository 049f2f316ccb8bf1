"""What the last readings say: errors, rises, growth, and how they follow the learning rates of the groups."""

import math
from typing import Any

import pytest

from eos_monitor import StabilityReading
from eos_monitor.verdicts.edge_history import EdgeHistory


def reading(r: float | None, error: float | None = 0.0, *, step: int = 0, **fields: Any) -> StabilityReading:
    defaults = {"full_batch": True, "converged": r is not None, "lr": (0.1,)}
    return StabilityReading(step=step, loss=1.0, edge_ratio=r, error=error, **(defaults | fields))


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
