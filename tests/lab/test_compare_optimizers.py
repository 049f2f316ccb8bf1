"""The comparison of the optimizers on a smoothed loss with SGD."""

import statistics
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch.optim import SGD

from eos_monitor.lab.compare_optimizers import (
    METHODS,
    Comparison,
    Method,
    compare_optimizers,
    comparison_figure,
    comparison_table,
)
from eos_monitor.optim import ElasticSGD

BY_NAME = {method.name: method for method in METHODS}


def test_differences_are_paired() -> None:
    first = Comparison(METHODS[0], (1.0,), ((1.0,), (2.0,), (4.0,), (3.0,)))
    other = Comparison(METHODS[1], (1.0,), ((1.5,), (2.25,), (4.75,), (3.0,)))
    mean, half = other.difference(first)
    interval = stats.ttest_rel(other.final, first.final).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high), rel=1e-12)
    assert mean == 0.375
    table = comparison_table([first, other])
    assert f"{statistics.fmean(other.final):.2f} ± {statistics.stdev(other.final):.2f}" in table
    assert f"+0.38 ± {half:.2f}" in table or f"+0.37 ± {half:.2f}" in table


def test_seed_is_the_same_run_for_all_methods() -> None:
    """One worker is SGD: were splits, weights, dropout or batches drawn apart, the errors would differ."""
    sgd = Method("SGD", "", lambda params, g: SGD(params, lr=0.1))
    lone = Method("one worker", "", lambda params, g: ElasticSGD(params, lr=0.1, workers=1))
    state = torch.get_rng_state()
    one, other = compare_optimizers([sgd, lone], seeds=(3, 4), epochs=2, tests=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.errors == other.errors
    assert one.errors[0] != one.errors[1]
    assert one.epochs == (1.0, 2.0)


def test_all_gradients_count() -> None:
    """Two passes are 40 gradients: 40 steps of SGD, 2 of Entropy-SGD, 10 rounds of four workers."""
    calls = {}

    def counted(method: Method) -> Method:
        def build(params, g):  # type: ignore[no-untyped-def]
            optimizer = method.build(params, g)
            optimizer.register_step_post_hook(lambda *_: calls.update({method.name: calls.get(method.name, 0) + 1}))
            return optimizer

        return Method(method.name, method.settings, build)

    names = ("SGD", "Entropy-SGD", "Hamilton–Jacobi", "Elastic-SGD")
    compared = compare_optimizers([counted(BY_NAME[name]) for name in names], seeds=(0,), epochs=2, tests=1)
    assert calls == {"SGD": 40, "Entropy-SGD": 2, "Hamilton–Jacobi": 8, "Elastic-SGD": 10}
    assert {one.epochs for one in compared} == {(2.0,)}


def test_figure_is_written(tmp_path: Path) -> None:
    compared = compare_optimizers(METHODS[:2], seeds=(0, 1), epochs=1, tests=1)
    assert comparison_figure(compared, tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_test_errors_are_within_one_and_a_half_points_of_sgd() -> None:
    names = ("SGD", "Entropy-SGD", "Hamilton–Jacobi", "Heat", "Elastic-SGD")
    sgd, *others = compare_optimizers([BY_NAME[name] for name in names], seeds=range(8), tests=1)
    assert statistics.fmean(sgd.final) < 3
    for one in others:
        mean, _ = one.difference(sgd)
        assert mean < 1.5, (one.method.name, mean)
