"""Where a monitored run's numbers go: loggers, the log folder, alerts, the figure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eos_monitor.alerts.alert import Alert
from eos_monitor.alerts.sinks import LogSink, Sink, sinks_of
from eos_monitor.alerts.throttle import Throttle
from eos_monitor.dashboard.layout import custom_scalars_layout
from eos_monitor.monitor.engine import append_jsonl
from eos_monitor.readings.reading import StabilityReading

# Row keys that every logger gets, in this order.
_SCALARS = (
    "sharpness",
    "normalized_sharpness",
    "threshold",
    "edge_ratio",
    "error",
    "edge_scale",
    "edge_ratio_clipped",
    "edge_ratio_next",
    "batch_sharpness",
    "directional_ratio",
    "matvecs",
    "overhead",
)


_FLUSH_SECONDS = 2.0  # at the end of fit, for alerts that are still on their way


class RunOutputs:
    """Writes to whatever is attached to a Trainer. An output that fails is told once and never stops the run.

    Args:
        trainer: The Trainer, of either package.
        name: First part of the log keys.
        alerts: Names of sinks, or functions of an alert.
        warn_once: ``warn_once(topic, message)``.
        throttle: Decides which alerts go out.
        silent: Write nothing.
    """

    def __init__(
        self,
        trainer: Any,
        name: str,
        alerts: Sequence[str | Sink],
        warn_once: Callable[[str, str], None],
        throttle: Throttle,
        *,
        silent: bool = False,
    ) -> None:
        self._trainer, self.name, self._warn_once = trainer, name, warn_once
        self._silent = silent
        self._speaks = trainer.is_global_zero and not silent
        self._log = lightning_logger(trainer)
        # All ranks have to ask: log_dir broadcasts.
        folder = trainer.log_dir or trainer.default_root_dir
        self.shared_folder = None if trainer.fast_dev_run else Path(folder)  # on every rank
        self.folder = self.shared_folder if self._speaks else None
        self._sinks = sinks_of(alerts, self._log, self.folder, self._experiments("alert")) if self._speaks else []
        self.throttle = throttle

    @property
    def _loggers(self) -> list[Any]:
        return [] if self._silent else self._trainer.loggers

    def say(self, message: str) -> None:
        """Log one line where Lightning logs its own."""
        if self._speaks:
            self._log.info("eos_monitor: %s", message)

    def layout(self) -> None:
        """Write the custom-scalars layout to every TensorBoard logger."""
        for writer in self._experiments("add_custom_scalars"):
            self._guard("layout", writer.add_custom_scalars, custom_scalars_layout(self.name))

    def row(self, row: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the metrics of one reading to every logger, under its step, and its row to the file."""
        for logger in self._loggers:
            self._guard("logger", logger.log_metrics, dict(metrics), row["step"])
        self._guard("file", self._to_file, dict(row))

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
        self._guard("file", self._to_file, dict(row), "actions")

    def _send(self, alert: Alert) -> None:
        for sink in self._sinks:
            self._guard("sink", sink, alert)
        key = f"{self.name}/alerts"
        for writer in self._experiments("add_text"):
            self._guard("text", writer.add_text, key, alert.message, alert.step)
        for logger in self._loggers:
            if callable(getattr(type(logger), "log_text", None)):  # WandbLogger
                self._guard("text", logger.log_text, key, ["step", "message"], [[alert.step, alert.message]])

    def close_alerts(self) -> None:
        """Tell what alerts there were, if some were held back, and wait a little for those on their way."""
        summary = self.throttle.summary()
        if summary is not None and self.throttle.held_back:
            self.say(summary)
        for sink in self._sinks:
            flush = getattr(sink, "flush", None)
            if callable(flush):
                self._guard("sink", flush, _FLUSH_SECONDS)

    def figure(self, rows: Sequence[Mapping[str, Any]], losses: Sequence[tuple[int, float]], title: str) -> Path | None:
        """Draw the run, to a PNG in the log folder and to TensorBoard; return the PNG's path."""

        def draw() -> Any:
            from eos_monitor.dashboard.figures import run_figure

            return run_figure(rows, losses, title)

        return self._drawn("run", draw) if rows else None

    def layers_figure(self, rows: Sequence[Mapping[str, Any]]) -> Path | None:
        """Draw the heat map of layers and steps likewise."""

        def draw() -> Any:
            from eos_monitor.dashboard.layers import layers_figure

            return layers_figure(rows)

        return self._drawn("layers", draw)

    def _drawn(self, what: str, draw: Callable[[], Any]) -> Path | None:
        if self.folder is None:
            return None
        try:
            figure = draw()
        except ImportError:
            self.say("no figure, because matplotlib is missing: pip install 'eos-monitor[plot]'")
            return None
        path = self.folder / f"{self.name}_{what}.png"
        self._guard("figure", self._save, figure, path, f"{self.name}/{what}")
        return path if path.exists() else None

    def _save(self, figure: Any, path: Path, tag: str) -> None:
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
        found = [getattr(logger, "experiment", None) for logger in self._loggers]
        return [experiment for experiment in found if callable(getattr(experiment, method, None))]

    def _guard(self, topic: str, action: Callable[..., Any], *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:
            self._warn_once(topic, f"eos_monitor: an output ({topic}) failed; training goes on. {error!r}")


def edge_metrics(name: str, row: Mapping[str, Any], verdict: int, group_names: Sequence[str]) -> dict[str, float]:
    """Return what loggers get of one reading."""
    metrics: dict[str, float] = {f"{name}/{key}": row[key] for key in _SCALARS if row.get(key) is not None}
    metrics[f"{name}/verdict"] = verdict
    rates = row["edge_lr"] or ()
    for group, rate in zip(group_names, rates, strict=False):
        metrics[f"{name}/edge_lr" + (f"/{group}" if len(rates) > 1 else "")] = rate
    return metrics


def lightning_logger(trainer: Any) -> logging.Logger:
    """Return a child of the logger of the Trainer's own package, so that its users' settings hold."""
    package = type(trainer).__module__
    root = "pytorch_lightning" if package.startswith("pytorch_lightning") else "lightning.pytorch"
    return logging.getLogger(f"{root}.eos_monitor")


def group_names(optimizers: Sequence[Any]) -> list[str]:
    """Name parameter groups as LearningRateMonitor does for optimizers without a named scheduler."""
    names: list[str] = []
    seen: dict[str, int] = {}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        count = seen.get(kind, 0)
        seen[kind] = count + 1
        base = f"lr-{kind}" + (f"-{count}" if count else "")
        groups = optimizer.param_groups
        names += [
            base if len(groups) == 1 else f"{base}/{group.get('name', f'pg{i + 1}')}" for i, group in enumerate(groups)
        ]
    return names


def describe_optimizers(optimizers: Sequence[Any]) -> str:
    """Return the optimizers and their learning rates in words."""

    def rates(optimizer: Any) -> str:
        found = dict.fromkeys(f"{float(group['lr']):.3g}" for group in optimizer.param_groups if "lr" in group)
        return ", ".join(found)

    return " and ".join(f"{type(optimizer).__name__}, lr {rates(optimizer)}" for optimizer in optimizers)


def describe_threshold(reading: StabilityReading) -> str:
    """Return the threshold of a reading in words."""
    if reading.threshold is not None:
        return f"threshold {reading.threshold:.4g}"
    if reading.edge_ratio is not None:
        return "different thresholds in different groups"
    return "no threshold: " + ("; ".join(reading.notes) or "unknown")
