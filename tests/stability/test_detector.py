"""From readings and losses to one word: the rules, their order, and that a hovering reading does not flicker."""

import json
import math
from typing import Any

import pytest

from eos_monitor import InstabilityDetector, StabilityReading, Verdict

UNKNOWN, WARMING_UP, STABLE, EDGE, DIVERGING = (
    Verdict.UNKNOWN,
    Verdict.WARMING_UP,
    Verdict.STABLE,
    Verdict.EDGE,
    Verdict.DIVERGING,
)


def reading(r: float | None, error: float | None = 0.0, **fields: Any) -> StabilityReading:
    defaults = {"full_batch": True, "converged": r is not None}
    return StabilityReading(step=0, loss=1.0, lr=(0.1,), edge_ratio=r, error=error, **(defaults | fields))


def verdicts(*readings: StabilityReading) -> list[Verdict]:
    detector = InstabilityDetector()
    return [detector.update(i, reading=r) for i, r in enumerate(readings)]


# name -> readings, verdict after each
RULES: dict[str, tuple[list[StabilityReading], list[Verdict]]] = {
    "far-below": ([reading(0.2)], [STABLE]),
    "below-by-less-than-its-error": ([reading(0.9, 0.06)], [UNKNOWN]),
    "below-by-more-than-its-error": ([reading(0.9, 0.04)], [STABLE]),
    "negative": ([reading(-3.0)], [STABLE]),
    "minibatch-proves-nothing": ([reading(0.2, full_batch=False)], [UNKNOWN]),
    "minibatch-at-the-edge": ([reading(1.2, full_batch=False)], [EDGE]),
    "clearly-above": ([reading(1.2, 0.05)], [EDGE]),
    "above-by-less-than-its-error": ([reading(1.05, 0.05)], [UNKNOWN]),
    "once-near": ([reading(0.97)], [STABLE]),
    "twice-near": ([reading(0.97), reading(0.96)], [STABLE, EDGE]),
    "twice-of-three": ([reading(0.97), reading(0.5), reading(0.96)], [STABLE, STABLE, EDGE]),
    "twice-of-four": (
        [reading(0.97), reading(0.5), reading(0.5), reading(0.96)],
        [STABLE, STABLE, STABLE, STABLE],
    ),
    "just-under-near": ([reading(0.949)] * 3, [STABLE] * 3),
    "hovering": (
        [reading(r) for r in (1.02, 0.97, 1.01, 0.9, 0.88, 0.86, 0.9, 1.0)],
        [EDGE] * 8,
    ),
    "left-after-three-in-a-row": (
        [reading(r) for r in (1.2, 0.8, 0.8, 0.8)],
        [EDGE, EDGE, EDGE, STABLE],
    ),
    "not-left-while-one-of-three-is-high": (
        [reading(r) for r in (1.2, 0.8, 0.8, 0.86, 0.8, 0.8, 0.8)],
        [EDGE] * 6 + [STABLE],
    ),
    "not-left-with-large-errors": ([reading(1.2), *[reading(0.8, 0.03)] * 4], [EDGE] * 5),
    "left-to-unknown-with-minibatches": (
        [reading(r, full_batch=False) for r in (1.2, 0.8, 0.8, 0.8)],
        [EDGE, EDGE, EDGE, UNKNOWN],
    ),
    "entered-again": ([reading(r) for r in (1.2, 0.8, 0.8, 0.8, 1.2)], [EDGE, EDGE, EDGE, STABLE, EDGE]),
    "young-state": ([reading(None, None, ready=False)], [WARMING_UP]),
    "young-then-stable": ([reading(None, None, ready=False), reading(0.3)], [WARMING_UP, STABLE]),
    "no-threshold": ([reading(None, None)], [UNKNOWN]),
    "threshold-lost": ([reading(1.2), reading(None, None)], [EDGE, UNKNOWN]),
    "unconverged-first": ([reading(0.3, converged=False)], [WARMING_UP]),
    "unconverged-is-passed-over": ([reading(0.3), reading(5.0, converged=False)], [STABLE, STABLE]),
    "stale-is-passed-over": ([reading(0.3), reading(5.0, stale=True)], [STABLE, STABLE]),
    "unconverged-does-not-count-for-leaving": (
        [reading(1.2), reading(0.8), reading(0.8), reading(0.8, converged=False), reading(0.8)],
        [EDGE, EDGE, EDGE, EDGE, STABLE],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_readings(name: str) -> None:
    readings, expected = RULES[name]
    assert verdicts(*readings) == expected


def test_nothing_known_is_warming_up() -> None:
    detector = InstabilityDetector()
    assert detector.verdict is WARMING_UP
    assert detector.update(0) is WARMING_UP
    assert detector.update(1, loss=2.0) is WARMING_UP


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf], ids=str)
def test_loss_that_is_not_finite_is_diverging(loss: float) -> None:
    assert InstabilityDetector().update(0, loss=loss) is DIVERGING


def test_divergence_wins_over_every_reading() -> None:
    detector = InstabilityDetector()
    detector.update(0, reading=reading(1.5))
    assert detector.update(1, loss=math.nan) is DIVERGING
    assert detector.update(2, reading=reading(0.1)) is DIVERGING
    assert detector.update(3) is DIVERGING


def test_divergence_is_left_after_128_finite_losses_in_a_row() -> None:
    detector = InstabilityDetector()
    detector.update(0, reading=reading(0.1))
    detector.update(1, loss=math.nan)
    assert {detector.update(2 + i, loss=1.0) for i in range(127)} == {DIVERGING}
    detector.update(129, loss=math.inf)  # begins anew
    assert {detector.update(130 + i, loss=1.0) for i in range(127)} == {DIVERGING}
    assert detector.update(257, loss=1.0) is STABLE


def test_state_round_trips_through_json_at_every_point() -> None:
    """A detector restored in the middle goes on exactly as one that was never interrupted."""
    events: list[dict[str, Any]] = [
        {"loss": 1.0},
        {"reading": reading(0.97)},
        {"reading": reading(0.5)},
        {"reading": reading(0.96)},
        {"loss": math.nan},
        {"loss": 1.0},
        *[{"reading": reading(0.5)}] * 4,
        *[{"loss": 1.0}] * 130,
    ]
    whole = InstabilityDetector()
    expected = [whole.update(i, **event) for i, event in enumerate(events)]
    assert {EDGE, DIVERGING, STABLE} <= set(expected)
    for cut in (0, 1, 2, 3, 4, 5, 7, 9, 50):
        first, second = InstabilityDetector(), InstabilityDetector()
        found = [first.update(i, **event) for i, event in enumerate(events[:cut])]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.verdict is first.verdict
        found += [second.update(cut + i, **event) for i, event in enumerate(events[cut:])]
        assert found == expected


def test_verdicts_are_ordered_by_how_bad_they_are() -> None:
    assert [v.name for v in sorted(Verdict)] == [
        "UNKNOWN",
        "WARMING_UP",
        "STABLE",
        "SHARPENING",
        "EDGE",
        "RESTRAINED",
        "DIVERGING",
    ]
    assert [int(v) for v in sorted(Verdict)] == [-1, 0, 1, 2, 3, 4, 5]
