"""Failures stay inside: told once, given up after three in a row, and never raised on one process alone."""

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch

from eos_monitor.readings.guard import MEASURING, Guard, everywhere


def fails() -> None:
    raise KeyError("labels")


def told_by(action: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


def test_three_failures_in_a_row_end_an_activity_and_are_told_twice() -> None:
    guard, calls = Guard(), []

    def run() -> None:
        for _ in range(5):
            assert guard.run(MEASURING, lambda: (calls.append(1), fails())) is None

    first, second = told_by(run)
    assert "could not take a reading; training goes on. KeyError: 'labels' (test_guard.py:" in first
    assert "stops measuring; training goes on. 3 readings in a row failed" in second
    assert len(calls) == 3
    assert "KeyError" in guard.off[MEASURING]


def test_a_success_in_between_starts_the_count_afresh() -> None:
    guard = Guard()
    outcomes = [fails, fails, lambda: 1, fails, fails, lambda: 2]

    def run() -> None:
        assert [guard.run("acting", outcome) for outcome in outcomes] == [None, None, 1, None, None, 2]

    assert len(told_by(run)) == 1
    assert guard.off == {}


def test_activities_fail_each_for_itself() -> None:
    guard = Guard()

    def run() -> None:
        for _ in range(3):
            guard.run("acting", fails)
        assert guard.run(MEASURING, lambda: "read") == "read"

    assert len(told_by(run)) == 2
    assert set(guard.off) == {"acting"}


def test_an_output_is_tried_again_for_ever() -> None:
    guard, calls = Guard(), []

    def run() -> None:
        for _ in range(5):
            guard.run("an output (sink)", lambda: (calls.append(1), fails()), gives_up=False)

    (message,) = told_by(run)
    assert "an output (sink) failed; training goes on" in message
    assert len(calls) == 5


def test_what_has_to_be_alike_on_all_processes_is_not_swallowed_on_one() -> None:
    guard = Guard()
    guard.alone = False
    with pytest.raises(KeyError):
        guard.run("acting", fails, together=True)
    guard.alone = True
    assert told_by(lambda: guard.run("acting", fails, together=True)) != []


def test_out_of_memory_is_tried_again_with_less_and_the_first_attempt_is_gone_by_then() -> None:
    class Held:
        """Stands for the tensors of the attempt."""

    guard, alive = Guard(), []
    sizes = [2, 1]

    def attempt() -> str:
        if sizes[0] == 2:
            held = Held()
            alive.append(weakref.ref(held))
            raise torch.OutOfMemoryError("too much")
        gc.collect()
        assert alive[0]() is None  # the second attempt has its memory
        return "less"

    assert guard.run(MEASURING, attempt, smaller=lambda: bool(sizes.pop(0))) == "less"
    assert "too much" in told_by(lambda: guard.run(MEASURING, lambda: raise_oom(), smaller=lambda: False))[0]


def raise_oom() -> None:
    raise torch.OutOfMemoryError("too much")


@pytest.mark.parametrize(("here", "elsewhere"), [(False, 1.0), (True, 0.0)], ids=["here", "elsewhere"])
def test_processes_fail_together(here: bool, elsewhere: float) -> None:
    """This process and another: whoever fails, both do."""
    sums: list[float] = []

    def sum_over_two(flag: torch.Tensor) -> torch.Tensor:
        sums.append(float(flag))
        return flag + (1.0 - elsewhere)

    action = (lambda: 3) if here else fails
    with pytest.raises(RuntimeError if here else KeyError):
        everywhere(action, sum_over_two, "a reading")
    assert sums == [0.0 if here else 1.0]
