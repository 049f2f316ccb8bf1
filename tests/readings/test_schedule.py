"""When to measure, on a clock that the tests move."""

import random
from collections.abc import Callable

import pytest

from eos_monitor.readings.schedule import Schedule


class Clock:
    def __init__(self) -> None:
        self.now = 100.0  # clocks do not start at zero

    def __call__(self) -> float:
        return self.now


class Run:
    """A training loop with a monitor in it, in simulated seconds."""

    def __init__(self, schedule: Schedule, clock: Clock, first: int = 0) -> None:
        self.schedule, self.clock, self.first = schedule, clock, first
        self.at: list[int] = []
        self.excess: list[float] = []  # own time over what the share allows, after each reading

    def go(self, steps: int, step_cost: Callable[[int], float], reading_cost: Callable[[int], float]) -> "Run":
        schedule, clock = self.schedule, self.clock
        schedule.begin(self.first)
        for step in range(self.first, self.first + steps):
            if schedule.due(step):
                cost = reading_cost(step)
                with schedule.own_time():
                    clock.now += cost
                schedule.measured(step, cost)
                self.at.append(step)
                self.excess.append(schedule.spent - schedule.max_overhead * schedule.training_seconds)
            clock.now += step_cost(step)
        return self

    @property
    def intervals(self) -> list[int]:
        return [b - a for a, b in zip(self.at, self.at[1:], strict=False)]


def run(
    steps: int,
    step_cost: Callable[[int], float],
    reading_cost: Callable[[int], float],
    *,
    max_overhead: float = 0.05,
    seed: int = 0,
) -> Run:
    clock = Clock()
    return Run(Schedule(max_overhead=max_overhead, seed=seed, clock=clock), clock).go(steps, step_cost, reading_cost)


def noisy(value: float, spread: float, seed: int) -> Callable[[int], float]:
    generator = random.Random(seed)
    return lambda _: value * generator.uniform(1 - spread, 1 + spread)


# name -> seconds a step, seconds a reading, how far a reading can exceed its prediction
COSTS: dict[str, tuple[Callable[[int], float], Callable[[int], float], float]] = {
    "constant": (lambda s: 0.01, lambda s: 0.1, 0.0),
    "cheap-readings": (lambda s: 0.01, lambda s: 0.0001, 0.0),
    "cold-start": (lambda s: 0.01, lambda s: 1.0 if s == 0 else 0.1, 0.0),
    "growing-readings": (lambda s: 0.01, lambda s: 0.1 * (1 + s / 5_000), 0.2),
    "readings-jump": (lambda s: 0.01, lambda s: 0.1 if s < 10_000 else 0.5, 0.4),
    "steps-speed-up": (lambda s: 0.05 if s < 5_000 else 0.005, lambda s: 0.1, 0.0),
    "steps-slow-down": (lambda s: 0.005 if s < 10_000 else 0.05, lambda s: 0.1, 0.0),
    "noise": (noisy(0.01, 0.9, 1), noisy(0.1, 0.5, 2), 0.1),
}


@pytest.mark.parametrize("max_overhead", [0.01, 0.05, 0.5])
@pytest.mark.parametrize("name", COSTS)
def test_budget_is_held_and_used(name: str, max_overhead: float) -> None:
    step_cost, reading_cost, surprise = COSTS[name]
    done = run(20_000, step_cost, reading_cost, max_overhead=max_overhead)
    # After every reading own time is within the share, but for what a reading took beyond its prediction. The first is
    # free, and predicts the second at half its cost.
    assert done.excess[1] <= reading_cost(0) / 2 + surprise
    assert max(done.excess[2:]) <= surprise + 1e-9
    overhead = done.schedule.overhead
    assert overhead is not None
    assert overhead <= max_overhead * 1.05
    # Where every other step is affordable, that is all there is; else jitter leaves a part of the budget unused.
    possible = reading_cost(19_999) / step_cost(19_999) / 2
    assert overhead >= 0.7 * min(max_overhead, possible)


def test_first_reading_comes_at_once_and_is_paid_back() -> None:
    done = run(10_000, lambda s: 0.01, lambda s: 0.5, max_overhead=0.05)
    assert done.at[0] == 3  # a step's time is known by then
    # Two readings of 0.5 s at 5 % are 20 s of training; the first predicts the second at half its cost.
    assert 1_500 <= done.at[1] <= 2_250


def test_first_reading_after_a_resume_comes_after_three_steps_too() -> None:
    clock = Clock()
    resumed = Run(Schedule(clock=clock), clock, first=777).go(10, lambda s: 0.01, lambda s: 0.1)
    assert resumed.at == [780]


def test_automatic_intervals_are_jittered_and_reproducible() -> None:
    def intervals(seed: int) -> list[int]:
        return run(100_000, lambda s: 0.01, lambda s: 0.1, seed=seed).intervals[5:]

    steady = intervals(0)
    assert len(steady) > 200
    # 5 % allows one in 200 steps. A late reading leaves budget to an early one, so that the plan of 200 to 300 steps
    # from a full account becomes 100 to 300.
    assert 200 <= sum(steady) / len(steady) <= 230
    assert min(steady) >= 100
    assert max(steady) <= 302
    assert len(set(steady)) > 50
    assert max(steady) - min(steady) > 0.4 * 200  # ± 20 %
    assert steady == intervals(0) != intervals(1)


@pytest.mark.parametrize(("n", "first"), [(1, 0), (7, 0), (7, 3), (50, 50)])
def test_every_n_steps_is_an_exact_grid(n: int, first: int) -> None:
    clock = Clock()
    schedule = Schedule(every_n_steps=n, max_overhead=0.01, clock=clock)
    done = Run(schedule, clock, first).go(200, lambda s: 0.001, lambda s: 100.0)  # whatever it costs
    assert done.at == [step for step in range(first, first + 200) if step % n == 0]


@pytest.mark.parametrize("every_n_steps", [1, None])
def test_step_is_decided_once(every_n_steps: int | None) -> None:
    """Micro-batches of one accumulation window share their step."""
    schedule = Schedule(every_n_steps, clock=Clock())
    schedule.begin(0)
    assert [schedule.due(step) for step in range(4)] == [every_n_steps == 1] * 3 + [True]
    schedule.measured(3, 1.0)
    assert not schedule.due(3)


def test_postponed_step_is_not_due_before_its_time() -> None:
    schedule = Schedule(clock=Clock())
    schedule.begin(0)
    assert schedule.due(3)
    schedule.postpone(3, 10)
    assert [step for step in range(20) if schedule.due(step)][0] == 13


def test_start_up_is_kept_apart() -> None:
    clock = Clock()
    schedule = Schedule(clock=clock)
    schedule.begin(0)
    with schedule.own_time(startup=True):
        clock.now += 7.0
    with schedule.own_time():
        clock.now += 2.0
    clock.now += 10.0
    assert (schedule.startup, schedule.spent) == (7.0, 2.0)
    assert schedule.training_seconds == pytest.approx(10.0)
    assert schedule.overhead == pytest.approx(0.2)


def test_time_before_the_start_does_not_count_as_training() -> None:
    clock = Clock()
    schedule = Schedule(clock=clock)
    with schedule.own_time():
        clock.now += 3.0
    assert (schedule.training_seconds, schedule.overhead) == (0.0, None)
    clock.now += 50.0
    schedule.begin(0)
    clock.now += 10.0
    assert schedule.training_seconds == pytest.approx(10.0)
    assert schedule.overhead == pytest.approx(0.3)


def test_time_is_charged_when_a_reading_fails() -> None:
    clock = Clock()
    schedule = Schedule(clock=clock)
    schedule.begin(0)

    def fail() -> None:
        with schedule.own_time():
            clock.now += 2.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert schedule.spent == 2.0


def test_early_steps_are_not_trusted_as_a_clock() -> None:
    """The first steps are slow (caches, compilation); a plan made from them would wait far too long."""
    done = run(3_000, lambda s: 1.0 if s < 3 else 0.01, lambda s: 0.05, max_overhead=0.05)
    assert done.at[1] <= 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "Expected `every_n_steps` >= 1 or None, got 0"),
        ({"max_overhead": 0.0}, "Expected 0 < `max_overhead` <= 1, got 0.0"),
        ({"max_overhead": 1.5}, "Expected 0 < `max_overhead` <= 1, got 1.5"),
    ],
    ids=["every_n_steps", "zero", "over-one"],
)
def test_arguments_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)  # type: ignore[arg-type]
