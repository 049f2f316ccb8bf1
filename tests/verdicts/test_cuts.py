"""Each cut of the verdicts, from just below and from just above."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from eos_monitor import InstabilityDetector, StabilityReading, Verdict

UNKNOWN, WARMING_UP, STABLE, SHARPENING, EDGE, RESTRAINED, DIVERGING = Verdict


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


def test_blame_stays_when_a_small_edge_ratio_becomes_known_also_after_a_restart() -> None:
    detector = InstabilityDetector(full_batch=True)
    for step in range(124):
        detector.update(step, loss=1.0 if step < 100 else 5.0)
    assert detector.verdict is DIVERGING  # the ratio was not known, and may have been the reason
    resumed = InstabilityDetector(full_batch=True)
    resumed.load_state_dict(detector.state_dict())
    for one in (detector, resumed):
        assert one.update(124, loss=5.0, reading=reading(0.2)) is DIVERGING
        assert one.advisory is None


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


@pytest.mark.parametrize("line", [1e-6, 0.5, 0.0])
def test_a_line_may_lie_anywhere_above_nothing(line: float) -> None:
    given = reading(
        0.2,
        full_batch=False,
        sampling_error=0.0,
        batch_sharpness=0.8 * line,
        batch_sharpness_error=0.0,
        batch_sharpness_limits=(line, line),
    )
    assert InstabilityDetector().update(0, reading=given) is (EDGE if line else UNKNOWN)


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


def dying(last: float, *, r: float = 0.97, full: bool = True, older: float | None = None) -> InstabilityDetector:
    """A run close to its edge whose updates shrink from 1 to ``last``, with five readings, and time for a verdict."""
    detector = InstabilityDetector(full_batch=full)
    for step in range(148):
        given = None
        if step % 30 == 0:
            ratio = older if older is not None and step == 0 else r
            given = reading(ratio, step=step, full_batch=full, sampling_error=0.0)
        detector.update(step, reading=given, relative_update=last if step >= 96 else 1.0)
    return detector


@pytest.mark.parametrize(
    ("given", "stable"),
    [
        ({"last": 0.4}, True),
        ({"last": 0.6}, False),  # they do not die out
        ({"last": 0.4, "r": 1.0}, False),
        ({"last": 0.4, "full": False}, False),  # with minibatches that proves nothing
        ({"last": 0.4, "older": 1.01}, True),  # it has left the last four
    ],
)
def test_updates_that_die_out_below_the_edge_are_stable(given: dict[str, Any], stable: bool) -> None:
    detector = dying(**given)
    assert (detector.verdict is STABLE) is stable
    assert (detector.reason == "The updates die out.") is stable


def test_one_of_four_readings_above_one_is_enough_to_doubt_it() -> None:
    detector = InstabilityDetector(full_batch=True)
    for i in range(20):
        for step in range(32 * i, 32 * (i + 1)):
            detector.update(
                step,
                reading=reading(1.01 if i == 5 else 0.97, step=step) if step == 32 * i else None,
                relative_update=0.97**step,
            )
        # 1.01 is not clearly above 1: no rise, but within the last four readings it counts
        if i >= 4:
            assert ("die out" in detector.reason) is (i == 4 or i >= 9), i


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
