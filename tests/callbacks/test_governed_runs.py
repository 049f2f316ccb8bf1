"""Runs that diverge or spike by their learning rate train on with a monitor that acts."""

from pathlib import Path

import pytest

from tests.callbacks.governed_runs import RUNS, fails, holds, loop


@pytest.mark.slow
def test_runs_that_fail_train_on(tmp_path: Path) -> None:
    """At least eight of ten end no worse than 1.5 × the same run at the best of six fixed learning rates."""
    for name, run in RUNS.items():
        assert fails(loop(run, run.lr, scheduled=True)), name
    held = {name: holds(run, tmp_path / name) for name, run in RUNS.items()}
    assert sum(held.values()) >= 8, held
