"""From readings, losses and updates to one word: the rules, their order, what may be missing, and the memory."""

import json
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest

from eos_monitor import InstabilityDetector, StabilityReading, Verdict

UNKNOWN, WARMING_UP, STABLE, SHARPENING, EDGE, RESTRAINED, DIVERGING = Verdict


def reading(r: float | None, error: float | None = 0.0, *, step: int = 0, **fields: Any) -> StabilityReading:
    defaults = {"full_batch": True, "converged": r is not None, "lr": (0.1,)}
    return StabilityReading(step=step, loss=1.0, edge_ratio=r, error=error, **(defaults | fields))


def verdicts(*readings: StabilityReading, every: int = 1, **settings: Any) -> list[Verdict]:
    detector = InstabilityDetector(**settings)
    return [
        detector.update(i * every, reading=StabilityReading(**(vars(r) | {"step": i * every})))
        for i, r in enumerate(readings)
    ]


def batch(share: float, r: float = 0.2, error: float = 0.0, beta: float = 0.0, **fields: Any) -> StabilityReading:
    """A minibatch reading whose batch sharpness is a share of its small-batch line."""
    lines = (2 * (1 - beta) / 0.1, 2 * (1 + beta) / 0.1)
    sharpness = {
        "batch_sharpness": share * lines[0],
        "batch_sharpness_error": error * lines[0],
        "batch_sharpness_limits": lines,
    }
    return reading(r, full_batch=False, **(sharpness | fields))


# name -> readings one step apart, verdict after each
RULES: dict[str, tuple[list[StabilityReading], list[Verdict]]] = {
    "far-below": ([reading(0.2)], [STABLE]),
    "below-by-less-than-its-error": ([reading(0.9, 0.06)], [UNKNOWN]),
    "below-by-more-than-its-error": ([reading(0.9, 0.04)], [STABLE]),
    "below-by-less-than-two-percent": ([reading(0.97)], [UNKNOWN]),
    "negative": ([reading(-3.0)], [STABLE]),
    "clearly-above": ([reading(1.2, 0.05)], [EDGE]),
    "above-by-less-than-its-error": ([reading(1.05, 0.05)], [UNKNOWN]),
    "near-in-two": ([reading(0.97), reading(0.99)], [UNKNOWN] * 2),
    "near-in-three-of-five": (
        [reading(0.97), reading(0.5), reading(0.97), reading(0.5), reading(0.98)],
        [UNKNOWN] * 4 + [EDGE],
    ),
    "near-but-below-0.95-without-flips": ([reading(0.94)] * 6, [STABLE] * 6),
    "hovering": ([reading(r) for r in (1.02, 0.97, 1.01, 0.96, 0.95, 0.97)], [UNKNOWN] * 2 + [EDGE] * 4),
    "young-state": ([reading(None, None, ready=False)], [WARMING_UP]),
    "young-then-stable": ([reading(None, None, ready=False), reading(0.3)], [WARMING_UP, STABLE]),
    "no-threshold": ([reading(None, None)], [UNKNOWN]),
    "threshold-lost": ([reading(1.2), reading(None, None)], [EDGE, UNKNOWN]),
    "always-stale": ([reading(0.3, stale=True)] * 4, [WARMING_UP] * 2 + [UNKNOWN] * 2),
    "never-converged": ([reading(0.3, converged=False)] * 4, [WARMING_UP] * 2 + [UNKNOWN] * 2),
    "young-then-always-stale": (
        [reading(None, None, ready=False)] + [reading(0.3, stale=True)] * 3,
        [WARMING_UP] * 3 + [UNKNOWN],
    ),
    "stale-until-one-is-not": ([reading(0.3, stale=True)] * 2 + [reading(0.3)], [WARMING_UP] * 2 + [STABLE]),
    "unconverged-first": ([reading(0.3, converged=False)], [WARMING_UP]),
    "unconverged-is-passed-over": ([reading(0.3), reading(5.0, converged=False)], [STABLE, STABLE]),
    "stale-is-passed-over": ([reading(0.3), reading(5.0, stale=True)], [STABLE, STABLE]),
    "minibatch-small-ratio-proves-nothing": ([reading(0.2, full_batch=False)], [UNKNOWN]),
    "minibatch-beyond": ([reading(1.4, full_batch=False)], [EDGE]),
    "minibatch-beyond-by-less-than-a-tenth": ([reading(1.1, full_batch=False)], [UNKNOWN]),
    "minibatch-below-its-line": ([batch(0.5)], [STABLE]),
    "minibatch-below-its-line-but-high-ratio": ([batch(0.5, r=0.9)], [UNKNOWN]),
    "minibatch-near-its-line": ([batch(0.7, error=0.03)], [UNKNOWN]),
    "minibatch-without-error-of-the-gauge": ([batch(0.5, batch_sharpness_error=None)], [UNKNOWN]),
    "minibatch-at-its-line": ([batch(0.8)], [EDGE]),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_readings(name: str) -> None:
    readings, expected = RULES[name]
    assert verdicts(*readings) == expected


def test_momentum_with_small_batches_says_what_it_cannot_know() -> None:
    detector = InstabilityDetector(momentum=0.9)
    assert detector.update(0, reading=batch(0.5, beta=0.9)) is STABLE
    for share in (0.8, 3.0):
        detector = InstabilityDetector(momentum=0.9)
        assert detector.update(0, reading=batch(share, beta=0.9)) is UNKNOWN
        assert "neither the edge ratio nor batch sharpness" in detector.reason


def test_adaptive_optimizer_with_minibatches_has_no_line() -> None:
    detector = InstabilityDetector(family="adam", momentum=0.9)
    assert detector.update(0, reading=reading(0.1, full_batch=False)) is UNKNOWN
    assert "adaptive" in detector.reason


@pytest.mark.parametrize("settings", [{"family": "lion"}, {"momentum": 1.0}, {"momentum": -0.1}], ids=str)
def test_settings_out_of_range_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="Expected"):
        InstabilityDetector(**settings)


# Hysteresis.


def test_edge_is_left_after_sixteen_steps() -> None:
    found = verdicts(reading(1.2), *[reading(0.5)] * 20)
    assert found == [EDGE] * 16 + [STABLE] * 5


def test_edge_by_batch_sharpness_is_left_well_below_its_line() -> None:
    """Twenty readings, one a step, so that the sixteen steps of any change are over."""
    up = [batch(0.8)]
    assert verdicts(*up, *[batch(0.7)] * 20)[-1] is EDGE
    assert verdicts(*up, *[batch(0.6)] * 20)[-1] is STABLE
    assert verdicts(*[batch(0.7)] * 20)[-1] is STABLE


def test_edge_is_held_while_one_of_sixteen_steps_shows_it() -> None:
    found = verdicts(reading(1.2), *[*[reading(0.5)] * 14, reading(1.2)] * 2, *[reading(0.5)] * 3)
    assert set(found) == {EDGE}


def test_unknown_is_entered_at_once_and_left_after_sixteen_steps() -> None:
    found = verdicts(reading(0.5), reading(0.9, 0.1), *[reading(0.5)] * 16)
    assert found == [STABLE] + [UNKNOWN] * 16 + [STABLE]


def test_beyond_the_edge_for_32_steps_is_restrained_and_left_after_128_without() -> None:
    detector = InstabilityDetector(full_batch=True)
    found = [
        detector.update(step, reading=reading(1.3 if step <= 40 else 0.5, step=step) if step % 4 == 0 else None)
        for step in range(300)
    ]
    assert found[:32] == [EDGE] * 32
    # the last one beyond was read at 40, and is the oldest of eight at 68
    left = found.index(STABLE)
    assert set(found[32:left]) == {RESTRAINED}
    assert left == 68 + 128
    assert set(found[left:]) == {STABLE}


def test_cut_of_the_learning_rate_ends_an_edge_before_the_next_reading() -> None:
    detector = InstabilityDetector()
    detector.update(0, lr=0.1, reading=reading(1.3))
    assert detector.verdict is EDGE
    found = [detector.update(step, lr=0.02) for step in range(1, 20)]
    assert detector.edge_ratio == pytest.approx(0.26)
    assert found[-1] is STABLE


def test_still_is_stable_at_any_edge_ratio() -> None:
    detector = InstabilityDetector()
    for step in range(31):
        assert detector.update(step, reading=reading(1.3), relative_update=1e-10) is EDGE
    for step in range(31, 40):
        detector.update(step, reading=reading(1.3), relative_update=1e-10)
    assert detector.verdict is STABLE


# Oscillation.


@pytest.mark.parametrize("period", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("series", ["projection", "random_projection"])
def test_lock_to_a_period_is_restrained_with_any_reading_or_none(period: int, series: str) -> None:
    for given in (reading(0.5), None):
        detector = InstabilityDetector()
        for step in range(80):
            phase = step % period
            detector.update(
                step, reading=given if step % 10 == 0 else None, **{series: (-1.0) ** phase * (1 + phase) - 0.3}
            )
        assert detector.verdict is RESTRAINED
        assert detector.oscillation.period is not None
        assert detector.oscillation.period % period == 0 or period % detector.oscillation.period == 0
        assert "period" in detector.reason


def test_oscillation_that_dies_out_is_not_a_lock() -> None:
    detector = InstabilityDetector(full_batch=True)
    found = {
        detector.update(step, reading=reading(0.8) if step % 10 == 0 else None, projection=(-0.9) ** step)
        for step in range(200)
    }
    assert found == {STABLE}


def test_drift_is_not_a_lock() -> None:
    detector = InstabilityDetector(full_batch=True)
    found = {detector.update(step, reading=reading(0.5), projection=1.0) for step in range(200)}
    assert found == {STABLE}


@pytest.mark.parametrize(("beta", "r"), [(0.0, 0.5), (0.0, 0.9), (0.9, 0.1), (0.9, 0.9)])
def test_edge_ratio_without_a_hessian(beta: float, r: float) -> None:
    """On a quadratic with gradient noise, h = 1 and lr = 2(1 + β) r, stepped here."""
    rng = random.Random(3)
    x = before = 0.0
    detector, found = InstabilityDetector(momentum=beta), []
    for step in range(6400):
        x, before = x - 2 * (1 + beta) * r * (x + rng.gauss(0, 1)) + beta * (x - before), x
        detector.update(step, projection=x - before)
        if step % 64 == 63 and step > 640:
            found.append(detector.oscillation.edge_ratio)
    assert None not in found
    # 90 windows with a standard deviation of at most 0.115 each: three standard errors, and the bias of short windows
    assert sum(found) / len(found) == pytest.approx(r, abs=0.04)


def test_amplification_is_the_growth_of_the_projections() -> None:
    detector = InstabilityDetector()
    for step in range(40):
        detector.update(step, projection=(-1.07) ** step)
    assert detector.oscillation.amplification == pytest.approx(math.log(1.07), rel=1e-9)


# Sharpening.


def test_growing_curvature_is_sharpening_with_the_time_to_the_edge() -> None:
    detector = InstabilityDetector()
    for i in range(8):
        detector.update(10 * i, reading=reading(0.1 * math.exp(0.01 * 10 * i), step=10 * i))
    assert detector.verdict is SHARPENING
    # ln(1 / r) / 0.01 with r = 0.1 e^0.7
    assert detector.steps_to_edge == pytest.approx((math.log(10) - 0.7) / 0.01)
    assert "160 steps away" in detector.reason


def test_growing_learning_rate_is_not_sharpening() -> None:
    detector = InstabilityDetector()
    for i in range(8):
        detector.update(10 * i, reading=reading(0.1 * 1.1**i, lr=(0.1 * 1.1**i,), step=10 * i))
    assert detector.verdict is STABLE
    assert detector.steps_to_edge is None


# Losses.


def feed(detector: InstabilityDetector, losses: Iterable[float], start: int = 0, **given: Any) -> list[Verdict]:
    return [detector.update(start + i, loss=loss, **given) for i, loss in enumerate(losses)]


def test_nothing_known_is_warming_up_then_unknown() -> None:
    detector = InstabilityDetector()
    assert detector.verdict is WARMING_UP
    assert detector.update(0) is WARMING_UP
    assert set(feed(detector, [2.0] * 63, 1)) == {WARMING_UP}
    assert set(feed(detector, [2.0] * 5, 64)) == {UNKNOWN}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf], ids=str)
def test_loss_that_is_not_finite_is_diverging(loss: float) -> None:
    assert InstabilityDetector().update(0, loss=loss) is DIVERGING


def test_divergence_wins_over_every_reading() -> None:
    detector = InstabilityDetector()
    detector.update(0, reading=reading(1.5))
    assert detector.update(1, loss=math.nan) is DIVERGING
    assert detector.update(2, reading=reading(0.1)) is DIVERGING
    assert detector.update(3) is DIVERGING


def test_divergence_is_left_after_128_good_losses_in_a_row() -> None:
    detector = InstabilityDetector()
    detector.update(0, reading=reading(0.1))
    detector.update(1, loss=math.nan)
    assert {detector.update(2 + i, loss=1.0) for i in range(127)} == {DIVERGING}
    detector.update(129, loss=math.inf)  # begins anew
    assert {detector.update(130 + i, loss=1.0) for i in range(127)} == {DIVERGING}
    assert detector.update(257, loss=1.0) is STABLE


def test_excess_of_24_steps_is_diverging_and_says_how_late() -> None:
    detector = InstabilityDetector()
    feed(detector, [1.0] * 100)
    found = feed(detector, [4.0] * 30, 100)
    assert DIVERGING not in found[:23]
    assert set(found[23:]) == {DIVERGING}
    assert detector.lateness == 23
    assert "since step 100" in detector.reason
    assert "23 steps later" in detector.reason


def test_loss_that_is_lost_after_an_excess_tells_both_steps() -> None:
    detector = InstabilityDetector()
    feed(detector, [1.0] * 100 + [5.0] * 30 + [math.inf])
    assert detector.verdict is DIVERGING
    assert detector.lateness == 23
    assert "not finite, as of step 130" in detector.reason


def test_excess_that_returns_sooner_is_not() -> None:
    detector = InstabilityDetector()
    feed(detector, [1.0] * 100)
    for start in range(100, 400, 30):
        assert DIVERGING not in feed(detector, [50.0] * 23 + [1.0] * 7, start)


def test_loss_below_its_start_is_never_out_of_bounds() -> None:
    detector = InstabilityDetector()
    feed(detector, [10.0] * 10 + [1.0] * 200)
    assert DIVERGING not in feed(detector, [9.0] * 60, 210)


def test_far_excess_is_diverging_after_three_steps_but_not_for_adam() -> None:
    for family, expected in (("sgd", [False, False, True]), ("adam", [False] * 3)):
        detector = InstabilityDetector(family=family)
        feed(detector, [1.0] * 50)
        assert [v is DIVERGING for v in feed(detector, [1e3] * 3, 50)] == expected


@pytest.mark.parametrize("family", ["sgd", "nesterov", "adam"])
def test_one_loss_ten_thousand_times_the_start_is_diverging_but_not_for_adam(family: str) -> None:
    for loss, expected in ((9.9e3, False), (1.01e4, family != "adam")):
        detector = InstabilityDetector(family=family)
        feed(detector, [1.0] * 50, 0)
        assert (detector.update(50, loss=loss) is DIVERGING) == expected


def test_excess_without_an_edge_is_a_note_about_the_data() -> None:
    detector = InstabilityDetector()
    found = feed(detector, [1.0] * 100 + [5.0] * 40, reading=reading(0.2))
    assert DIVERGING not in found
    assert detector.advisory == "loss-excess"
    assert "look at the data" in (detector.advice or "")


def test_excess_becomes_divergence_when_the_edge_ratio_follows() -> None:
    detector = InstabilityDetector()
    feed(detector, [1.0] * 100 + [5.0] * 40, reading=reading(0.2))
    assert detector.update(140, loss=5.0, reading=reading(1.5)) is DIVERGING
    assert detector.advisory is None


def test_edge_ratio_counts_for_64_steps_before_the_excess() -> None:
    for gap, expected in ((60, True), (80, False)):
        detector = InstabilityDetector()
        detector.update(0, loss=1.0, reading=reading(1.2))
        feed(detector, [1.0] * (gap - 1), 1, reading=reading(0.2))
        assert (DIVERGING in feed(detector, [5.0] * 24, gap, reading=reading(0.2))) == expected


# Jumps of the learning rate.


@pytest.mark.parametrize("ahead", [False, True], ids=["by-hand", "scheduled"])
def test_jump_is_flagged_before_the_first_step_at_the_new_rate(ahead: bool) -> None:
    detector = InstabilityDetector(full_batch=True)
    detector.update(0, lr=0.1, reading=reading(0.5))
    for step in range(1, 20):
        detector.update(step, lr=0.1, lr_ahead=0.1 if step < 15 or not ahead else 1.0)
        assert detector.advisory == ("jump-risk" if ahead and step >= 15 else None)
    detector.update(20, lr=1.0)
    assert detector.advisory == "jump-risk"
    assert detector.jump_ratio == pytest.approx(5.0)
    assert "edge ratio of 5" in (detector.advice or "")
    for step in range(21, 100):
        detector.update(step, lr=1.0)
    assert detector.advisory is None


def test_slow_rise_is_no_jump() -> None:
    detector = InstabilityDetector(full_batch=True)
    detector.update(0, lr=0.1, reading=reading(0.5))
    for step in range(1, 60):
        detector.update(step, lr=0.1 * 1.05**step)
        assert detector.advisory is None
    assert detector.edge_ratio is not None
    assert detector.edge_ratio > 5


def test_small_jump_is_no_risk() -> None:
    detector = InstabilityDetector(full_batch=True)
    detector.update(0, lr=0.1, reading=reading(0.1))
    detector.update(1, lr=1.0)
    assert detector.advisory is None


def test_edge_ratio_of_the_caller_wins_over_the_rescaled_one() -> None:
    detector = InstabilityDetector(full_batch=True)
    detector.update(0, lr=0.1, reading=reading(0.5))
    detector.update(1, lr=0.2, edge_ratio=3.0)
    assert detector.edge_ratio == 3.0
    assert detector.advisory == "jump-risk"


def test_groups_that_move_apart_give_an_upper_bound() -> None:
    detector = InstabilityDetector()
    detector.update(0, lr=(0.1, 0.2), reading=reading(0.5, lr=(0.1, 0.2)))
    detector.update(1, lr=(0.05, 0.1))
    assert detector.edge_ratio == pytest.approx(0.25)
    detector.update(2, lr=(0.1, 0.1))
    assert detector.edge_ratio == pytest.approx(0.5)


# What may be missing, and the memory.


def story(seed: int = 0, steps: int = 420) -> list[dict[str, Any]]:
    """A run with everything in it: gaps, jumps, a cut, an excess, numbers that are not."""
    rng = random.Random(seed)
    events = []
    for step in range(steps):
        lr = 0.1 if step < 150 else 0.5 if step < 300 else 0.02
        r = (0.2 + 0.005 * step if step < 150 else 1.4 if step < 300 else 0.1) + 0.03 * rng.random()
        event: dict[str, Any] = {
            "lr": lr if rng.random() < 0.9 else None,
            "lr_ahead": lr if rng.random() < 0.5 else None,
        }
        if rng.random() < 0.95:
            event["loss"] = 6.0 if 200 < step < 240 else 1.0
        if step == 390:
            event["loss"] = math.nan
        if step % 7 == 0:
            kind = {"converged": False} if rng.random() < 0.1 else {"stale": True} if rng.random() < 0.1 else {}
            event["reading"] = reading(r, step=step, lr=(lr,), **kind)
        if rng.random() < 0.9:
            event["projection"] = rng.choice([math.nan, 1e300]) if rng.random() < 0.01 else (-1) ** step + rng.random()
            event["random_projection"], event["relative_update"] = rng.gauss(0, 1), 0.01 * rng.random()
        events.append(event)
    return events


def outputs(detector: InstabilityDetector) -> tuple[Any, ...]:
    return (
        *(detector.verdict, detector.reason, detector.advisory, detector.advice, detector.lateness),
        *(detector.steps_to_edge, detector.edge_ratio, detector.jump_ratio),
        *(detector.oscillation.period, detector.oscillation.flips, detector.oscillation.edge_ratio),
    )


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_resumed_at_any_step_it_goes_on_as_one_that_was_never_interrupted(seed: int) -> None:
    """After eight steps its whole state is that of the other, so that it stays so to the end."""
    events = story(seed)
    whole, states, expected = InstabilityDetector(full_batch=True), [], []
    for step, event in enumerate(events):
        states.append(json.dumps(whole.state_dict()))
        whole.update(step, **event)
        expected.append(outputs(whole))
    assert {EDGE, RESTRAINED, DIVERGING} <= {out[0] for out in expected}
    assert "jump-risk" in {out[2] for out in expected}
    for cut, state in enumerate(states):
        resumed = InstabilityDetector(full_batch=True)
        resumed.load_state_dict(json.loads(state))
        for step in range(cut, min(cut + 8, len(events))):
            resumed.update(step, **events[step])
            assert outputs(resumed) == expected[step]
        # its whole state is the same, and so is what follows
        later = cut + 8
        if later < len(states):
            assert json.dumps(resumed.state_dict()) == states[later]


@pytest.mark.parametrize("missing", ["loss", "lr", "reading", "projection", "random_projection", "relative_update"])
def test_any_input_may_be_missing_throughout(missing: str) -> None:
    detector = InstabilityDetector(full_batch=True)
    found = {
        detector.update(step, **{key: value for key, value in event.items() if key != missing})
        for step, event in enumerate(story())
    }
    assert found - {WARMING_UP, UNKNOWN}


def test_without_readings_updates_say_at_most_restrained() -> None:
    detector = InstabilityDetector()
    found = {
        detector.update(step, loss=1.0, projection=(-1.0) ** step, random_projection=(-1.2) ** min(step, 500))
        for step in range(300)
    }
    assert found == {WARMING_UP, RESTRAINED}


def test_with_readings_only_it_knows_the_edge() -> None:
    detector = InstabilityDetector(full_batch=True)
    found = [detector.update(50 * i, reading=reading(1.3 if i < 6 else 0.4, step=50 * i)) for i in range(20)]
    assert found[:2] == [EDGE, RESTRAINED]
    assert found[-1] is STABLE


def test_losses_may_come_after_the_reading_of_their_step() -> None:
    together, apart = InstabilityDetector(full_batch=True), InstabilityDetector(full_batch=True)
    for step, event in enumerate(story()):
        together.update(step, **event)
        loss = event.pop("loss", None)
        apart.update(step, **event)
        if loss is not None:
            apart.update(step, loss=loss)
        assert apart.verdict is together.verdict
        assert apart.advisory == together.advisory


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


def test_why_no_reading_counts_is_the_reason() -> None:
    detector = InstabilityDetector(momentum=0.99)  # would wait for 300 steps
    why = "stale: after it was measured and before the step the learning rates went apart"
    for step in range(4):
        detector.update(step, reading=reading(0.3, stale=True, step=step, notes=("another note", why)))
        assert why in detector.reason
    assert detector.verdict is UNKNOWN
    assert "last 4 readings" in detector.reason
    copy = InstabilityDetector(momentum=0.99)
    copy.load_state_dict(json.loads(json.dumps(detector.state_dict())))
    assert copy.update(4) is UNKNOWN
    assert copy.reason == detector.reason


def test_early_stale_readings_do_not_prolong_the_warm_up() -> None:
    detector = InstabilityDetector()
    detector.update(0, reading=reading(0.3, stale=True))
    assert detector.update(63) is WARMING_UP
    assert detector.update(64) is UNKNOWN
