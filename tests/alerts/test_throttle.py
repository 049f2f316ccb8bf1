"""What goes out of a flood of alerts."""

import json
from typing import Any

import pytest

from eos_monitor import Alert, Verdict
from eos_monitor.alerts.throttle import Throttle

V = Verdict


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def change(previous: Verdict, verdict: Verdict) -> Alert:
    return Alert(0, verdict, previous, "")


def throttle(clock: Clock, **settings: Any) -> Throttle:
    return Throttle(**{"cooldown": 100.0, "per_minute": 5, "clock": clock, **settings})


def test_the_same_change_waits_for_the_cooldown() -> None:
    clock = Clock()
    t = throttle(clock)
    flicker = [change(V.STABLE, V.EDGE), change(V.EDGE, V.STABLE)] * 3
    assert [t.passes(a) for a in flicker] == [True, True, False, False, False, False]
    clock.now += 99
    assert not t.passes(change(V.STABLE, V.EDGE))
    clock.now += 2
    assert t.passes(change(V.STABLE, V.EDGE))
    assert t.held_back == 5


def test_getting_worse_is_never_held_back_by_the_cooldown() -> None:
    clock = Clock()
    t = throttle(clock)
    assert t.passes(change(V.EDGE, V.DIVERGING))
    clock.now += 101
    assert t.passes(change(V.STABLE, V.EDGE))
    clock.now += 50
    assert t.passes(change(V.EDGE, V.DIVERGING))
    assert t.passes(change(V.DIVERGING, V.EDGE))
    assert not t.passes(change(V.EDGE, V.DIVERGING))


def test_a_thousand_in_a_second_become_a_few() -> None:
    clock = Clock()
    t = throttle(clock, cooldown=0.0)
    passed = 0
    for i in range(1000):
        passed += t.passes(change(V(i % 5), V(i % 5 + 1)))
        clock.now += 0.001
    assert passed == 5
    assert t.held_back == 995
    assert "995 not sent" in (t.summary() or "")
    clock.now += 60
    assert t.passes(change(V.STABLE, V.EDGE))


def test_a_resume_in_the_middle_of_a_cooldown_keeps_it() -> None:
    clock = Clock()
    before = throttle(clock)
    assert before.passes(change(V.STABLE, V.EDGE))
    state = json.loads(json.dumps(before.state_dict()))
    after = throttle(clock)
    after.load_state_dict(state)
    clock.now += 50
    assert not after.passes(change(V.STABLE, V.EDGE))
    clock.now += 51
    assert after.passes(change(V.STABLE, V.EDGE))
    assert after.summary() == "alerts of this run: 3 × STABLE to EDGE; 1 not sent one by one"


def test_nothing_to_sum_up() -> None:
    assert throttle(Clock()).summary() is None


@pytest.mark.parametrize("wrong", [{"cooldown": -1.0}, {"per_minute": 0}], ids=["cooldown", "rate"])
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        throttle(Clock(), **wrong)
