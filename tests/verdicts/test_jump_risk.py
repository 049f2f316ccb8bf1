"""Fast rises of the learning rate: when they are told, for how long, and with which numbers."""

import math
import re
from pathlib import Path

import pytest

from eos_monitor.verdicts.jump_risk import JumpRisk, class_of, cut_of

PAGE = (Path(__file__).parents[2] / "docs" / "detector.md").read_text(encoding="utf-8")


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


def test_what_is_said_twice_of_a_step_is_no_rise() -> None:
    risk = JumpRisk()
    risk.add(0, 0.1, None, 4.0, "gradient descent")
    risk.add(0, 0.2, None, 4.0, "gradient descent")
    assert risk.ratio is None


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
