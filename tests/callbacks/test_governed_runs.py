"""Runs that diverge or spike by their learning rate train on with a monitor that acts."""

import warnings
from pathlib import Path

import pytest

from tests.callbacks.governed_runs import RUNS, best, fails, final, fit, loop


@pytest.mark.slow
def test_runs_that_fail_train_on(tmp_path: Path) -> None:
    """At least eight of ten end no worse than 1.5 × the same run at the best of six fixed learning rates."""
    held = {}
    for name, run in RUNS.items():
        assert fails(loop(run, run.lr, scheduled=True)), name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CyclicLR and SequentialLR warn of themselves
            losses, monitor, _ = fit(run, tmp_path / name, actions=("cap-lr", "restore"), dry_run=False)
        assert monitor.actions, name
        held[name] = final(losses) <= 1.5 * best(run)
    assert sum(held.values()) >= 8, held
