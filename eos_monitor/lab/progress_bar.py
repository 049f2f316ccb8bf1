"""What the terminal shows of a run: a bar, and the monitor's messages above it."""

from __future__ import annotations

import logging
import shutil
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_utilities.core import rank_zero
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from tqdm import tqdm

from eos_monitor.callbacks.edge_of_stability import EdgeOfStabilityMonitor


class RunBar(TQDMProgressBar):
    """One bar for one run, with the edge ratio in it.

    Args:
        title: What stands before it.
        monitor: Monitor of the run.
        refresh_rate: Steps between its updates.
    """

    def __init__(self, title: str, monitor: EdgeOfStabilityMonitor, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._title = title
        self._monitor = monitor

    @property
    def train_description(self) -> str:
        """The title."""
        return self._title

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Show the title without an epoch."""
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.train_description)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the last edge ratio."""
        readings = self._monitor.readings
        ratio = readings[-1].edge_ratio if readings else None
        return {} if ratio is None else {"edge_ratio": f"{ratio:.2f}"}


class _AboveTheBar(logging.Handler):
    """Handler that writes messages above the progress bar, wrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        width = min(shutil.get_terminal_size().columns, 120)
        tqdm.write(textwrap.fill(record.getMessage(), width, subsequent_indent="  "))


@contextmanager
def only_our_messages() -> Iterator[None]:
    """Leave out what Lightning tells of devices, loggers and workers; show what the monitor says."""
    # Of the logger under three package names, the one that was imported last speaks for all.
    theirs = rank_zero.log
    ours = logging.getLogger("pytorch_lightning.eos_monitor")
    handler = _AboveTheBar()
    before = (theirs.level, ours.level, ours.propagate)
    theirs.setLevel(logging.WARNING)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(handler)
    try:
        with warnings.catch_warnings():
            for message in (".*does not have many workers.*", ".*isinstance.treespec, LeafSpec.*"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        ours.removeHandler(handler)
        theirs.setLevel(before[0])
        ours.setLevel(before[1])
        ours.propagate = before[2]
