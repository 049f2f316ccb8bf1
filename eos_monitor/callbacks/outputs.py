"""Where a monitored run's numbers go: loggers, the log folder, alerts, the figure."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eos_monitor.alerts.alert import Alert
from eos_monitor.alerts.sinks import LogSink, Sink, sinks_of
from eos_monitor.alerts.throttle import Throttle
from eos_monitor.callbacks.folders import free_path
from eos_monitor.dashboard.layout import custom_scalars_layout
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.rows import append_jsonl
from eos_monitor.readings.guard import Guard

_FLUSH_SECONDS = 2.0  # at the end of fit, for alerts that are still on their way


class RunOutputs:
    """Writes to whatever is attached to a Trainer. An output that fails is told once and never stops the run.

    Args:
        trainer: The Trainer, of either package.
        folder: Where the run's files go, on every process; None for no files.
        name: First part of the log keys.
        alerts: Names of sinks, or functions of an alert.
        guard: Keeps an output that fails from ending the run.
        throttle: Decides which alerts go out.
        silent: Write nothing.
    """

    def __init__(
        self,
        trainer: Any,
        folder: Path | None,
        name: str,
        alerts: Sequence[str | Sink],
        guard: Guard,
        throttle: Throttle,
        *,
        silent: bool = False,
    ) -> None:
        self._trainer = trainer
        self.name = name
        self._guard = guard
        self.silent = silent
        self._speaks = trainer.is_global_zero and not silent
        self._log = lightning_logger(trainer)
        self.shared_folder = folder
        self.folder = folder if self._speaks else None
        self._sinks = sinks_of(alerts, self._log, self.folder, self._experiments("alert"), name) if self._speaks else []
        self.throttle = throttle

    @property
    def _loggers(self) -> list[Any]:
        return [] if self.silent else self._trainer.loggers

    def say(self, message: str) -> None:
        """Log one line where Lightning logs its own."""
        if self._speaks:
            self._log.info("eos_monitor [%s]: %s", self.name, message)

    def layout(self) -> None:
        """Write the custom-scalars layout to every TensorBoard logger."""
        for writer in self._experiments("add_custom_scalars"):
            self._attempt("layout", self._write_layout, writer)

    def _write_layout(self, writer: Any) -> None:
        layout = custom_scalars_layout(self.name)
        folder = getattr(writer, "log_dir", None) or getattr(writer, "logdir", None)  # torch's, tensorboardX's
        if not isinstance(folder, (str, Path)):
            writer.add_custom_scalars(layout)
            return
        # TensorBoard keeps one layout of a run, and shows those of all runs: here it leaves the user's alone.
        own = type(writer)(f"{folder}/{self.name}_layout")
        try:
            own.add_custom_scalars(layout)
        finally:
            own.close()

    def row(self, row: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the metrics of one reading to every logger, under its step, and its row to the file."""
        for logger in self._loggers:
            self._attempt("logger", logger.log_metrics, dict(metrics), row["step"])
        self._attempt("file", self._to_file, dict(row))

    def alert(self, alert: Alert) -> None:
        """Pass an alert to the sinks and to every logger that takes text."""
        if self._speaks and self.throttle.passes(alert):
            self._send(alert)

    def action(self, alert: Alert, row: Mapping[str, Any]) -> None:
        """Tell what was done: it is never held back, and is in the log even where alerts are not."""
        if not any(isinstance(sink, LogSink) for sink in self._sinks):
            self.say(alert.message)
        if self._speaks:
            self._send(alert)
        self._attempt("file", self._to_file, dict(row), "actions")

    def _send(self, alert: Alert) -> None:
        for sink in self._sinks:
            self._attempt("sink", sink, alert)
        key = f"{self.name}/alerts"
        for writer in self._experiments("add_text"):
            self._attempt("text", writer.add_text, key, alert.message, alert.step)
        for logger in self._loggers:
            if callable(getattr(type(logger), "log_text", None)):  # WandbLogger
                self._attempt("text", logger.log_text, key, ["step", "message"], [[alert.step, alert.message]])

    def close_alerts(self) -> None:
        """Tell what alerts there were, if some were held back, and wait a little for those on their way."""
        summary = self.throttle.summary()
        if summary is not None and self.throttle.held_back:
            self.say(summary)
        for sink in self._sinks:
            flush = getattr(sink, "flush", None)
            if callable(flush):
                self._attempt("sink", flush, _FLUSH_SECONDS)

    def finish(self, engine: Engine, step: int, losses: Sequence[tuple[int, float]], title: str) -> None:
        """Draw the run, to a PNG in the log folder and to TensorBoard, and tell its report."""
        if not engine.rows:
            return
        # Between readings too: a verdict may have come from a loss alone.
        verdicts = [*engine.verdicts, (step, engine.verdict)]
        timeline = [*engine.rows, *({"step": at, "verdict": verdict.name} for at, verdict in verdicts)]

        def draw() -> Any:
            from eos_monitor.dashboard.figures import run_figure

            return run_figure(sorted(timeline, key=lambda row: int(row["step"])), losses, title)

        began = time.perf_counter()
        path = self._drawn("run", draw)
        figure = f" Figure ({time.perf_counter() - began:.2g} s): {path}" if path else ""
        self.close_alerts()
        self.say(engine.report().replace("\n", " ") + figure)

    def layers_figure(self, rows: Sequence[Mapping[str, Any]]) -> Path | None:
        """Draw the heat map of layers and steps likewise."""

        def draw() -> Any:
            from eos_monitor.dashboard.layers import layers_figure

            return layers_figure(rows)

        return self._drawn("layers", draw)

    def _drawn(self, what: str, draw: Callable[[], Any]) -> Path | None:
        if self.folder is None:
            return None
        path = free_path(self.folder / f"{self.name}_{what}.png")
        self._attempt("figure", self._save, draw, path, f"{self.name}/{what}")
        return path if path.exists() else None

    def _save(self, draw: Callable[[], Any], path: Path, tag: str) -> None:
        try:
            figure = draw()
        except ImportError:
            self.say("no figure, because matplotlib is missing: pip install 'eos-monitor[plot]'")
            return
        from eos_monitor.dashboard.figures import pixels_of

        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        for writer in self._experiments("add_image"):
            writer.add_image(tag, pixels_of(figure), self._trainer.global_step, dataformats="HWC")

    def _to_file(self, row: dict[str, Any], kind: str = "readings") -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            append_jsonl(self.folder / f"{self.name}_{kind}.jsonl", row)

    def _experiments(self, method: str) -> list[Any]:
        """Experiments of the loggers that have ``method``; by name, because there are two packages."""
        if not self._speaks or self._trainer.fast_dev_run:
            return []
        found = [self._attempt("experiment", getattr, logger, "experiment", None) for logger in self._loggers]
        return [experiment for experiment in found if callable(getattr(experiment, method, None))]

    def _attempt(self, topic: str, action: Callable[..., Any], *args: Any) -> Any:
        return self._guard.run(f"an output ({topic})", lambda: action(*args), gives_up=False)


def lightning_logger(trainer: Any) -> logging.Logger:
    """Return a child of the logger of the Trainer's own package, so that its users' settings hold."""
    package = type(trainer).__module__
    root = "pytorch_lightning" if package.startswith("pytorch_lightning") else "lightning.pytorch"
    return logging.getLogger(f"{root}.eos_monitor")
