"""Where alerts go."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eos_monitor.alerts.alert import Alert
from eos_monitor.verdicts.detector import Verdict

Sink = Callable[[Alert], None]

NAMES = ("log", "jsonl", "wandb")
_WAITING = 100  # alerts that a slow receiver may be behind; older ones are dropped
_FATAL_STATUS = range(400, 500)  # the request is wrong; it will be wrong again (429, "later", is not)


class JSONLinesSink:
    """Append each alert to a file, one JSON object a line.

    Args:
        path: File; its folder is made when the first alert comes.

    Example:
        >>> from eos_monitor import EdgeOfStabilityMonitor
        >>> monitor = EdgeOfStabilityMonitor(alerts=["log", JSONLinesSink("alerts.jsonl")])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __call__(self, alert: Alert) -> None:
        """Append ``alert``.

        Raises:
            OSError: If the file cannot be written to; a monitor tells it once.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(alert.as_dict()) + "\n")


class WebhookSink:
    """Post each alert to a URL, as Slack's incoming webhooks expect it: ``{"text": message}``.

    The post is made on a daemon thread that lives while there is something to send: a receiver that is slow, broken or
    gone costs training nothing. Of more than 100 waiting alerts the oldest are dropped. The URL is a secret, of which
    only the host is ever shown.

    Args:
        url: Address, http or https.
        timeout: Seconds to wait for an answer, > 0.
        retries: Further attempts after a failure, ≥ 0; the pauses between them double, from one second.
        payload: Alert -> what is posted as JSON, for receivers with another format.
        headers: Further headers, an authorization, say.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> WebhookSink("https://hooks.slack.com/services/T0/B0/secret")
        WebhookSink('hooks.slack.com')
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        payload: Callable[[Alert], Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("Expected `url` to be an http or https address, got something else (not shown: a secret).")
        if timeout <= 0.0 or retries < 0:
            raise ValueError(f"Expected `timeout` > 0 and `retries` >= 0, got {timeout} and {retries}.")
        self._url = url
        self._host = parts.hostname
        self._timeout = timeout
        self._retries = retries
        self._headers = dict(headers or {})
        self._payload = payload or _slack
        self.sent = 0
        self.dropped = 0
        self.last_error: str | None = None
        self._lock = threading.Lock()
        self._waiting: queue.Queue[bytes] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"WebhookSink({self._host!r})"

    def __call__(self, alert: Alert) -> None:
        """Queue ``alert`` and return at once."""
        body = json.dumps(self._payload(alert)).encode()
        with self._lock:
            while True:
                try:
                    self._waiting.put_nowait(body)
                    break
                except queue.Full:
                    self._waiting.get_nowait()
                    self.dropped += 1
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="eos_monitor webhook", daemon=True)
                self._thread.start()

    def flush(self, seconds: float) -> bool:
        """Wait up to ``seconds`` for what is queued; whether all of it is done."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return thread is None or not thread.is_alive()

    def __getstate__(self) -> dict[str, Any]:
        """Leave thread, lock and queue behind: a spawned process starts its own."""
        return {key: value for key, value in vars(self).items() if key not in ("_thread", "_lock", "_waiting")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(vars(WebhookSink(state["_url"])) | state)

    def _work(self) -> None:
        while True:
            with self._lock:
                try:
                    body = self._waiting.get_nowait()
                except queue.Empty:
                    self._thread = None  # under the lock: whoever queues next starts another
                    return
            self._deliver(body)

    def _deliver(self, body: bytes) -> None:
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            request = urllib.request.Request(
                self._url, body, {"Content-Type": "application/json", **self._headers}, method="POST"
            )
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    answer.read()
                self.sent += 1
                return
            except urllib.error.HTTPError as error:
                self.last_error = f"HTTP {error.code}"
                error.close()
                if error.code in _FATAL_STATUS and error.code != 429:
                    break
            except Exception as error:  # whatever it is, a thread has nobody to raise to
                self.last_error = type(error).__name__  # not its text, which can hold the address
        self.dropped += 1


class AppriseSink:
    """Pass each alert to the services that ``apprise`` knows (mail, Telegram, Teams …).

    Args:
        urls: Apprise's addresses.

    Raises:
        ImportError: If apprise is not installed.
    """

    def __init__(self, *urls: str) -> None:
        try:
            import apprise  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("Expected the package apprise, got none: pip install 'eos-monitor[alerts]'.") from error
        self._services = apprise.Apprise()
        if not urls or not all(self._services.add(url) for url in urls):
            raise ValueError("Expected addresses that apprise understands, got one that it does not (not shown).")

    def __call__(self, alert: Alert) -> None:
        """Notify, on a thread of its own: a mail server may take its time."""
        threading.Thread(
            target=self._services.notify,
            kwargs={"title": f"eos_monitor: {alert.verdict.name}", "body": alert.message},
            name="eos_monitor apprise",
            daemon=True,
        ).start()


class LogSink:
    """Pass alerts to a Python logger.

    Args:
        logger: The logger.
        name: Of the monitor that they come from; None without one.
    """

    def __init__(self, logger: logging.Logger, name: str | None = None) -> None:
        self._logger = logger
        self._speaker = "eos_monitor" if name is None else f"eos_monitor [{name}]"

    def __call__(self, alert: Alert) -> None:
        """Log ``alert``, as a warning from EDGE on."""
        level = logging.WARNING if alert.verdict >= Verdict.EDGE else logging.INFO
        self._logger.log(level, "%s: %s", self._speaker, alert.message)


def check_alerts(alerts: Sequence[str | Sink]) -> None:
    """Check the ``alerts=`` argument: a sequence of names (``"log"``, ``"jsonl"``, ``"wandb"``) and of sinks.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(alerts, str) or not all(callable(alert) or alert in NAMES for alert in alerts):
        raise ValueError(f"Expected `alerts` to be a sequence of {NAMES} and functions of an Alert, got {alerts!r}.")


def _slack(alert: Alert) -> dict[str, str]:
    return {"text": f"eos_monitor: {alert.message}"}


def sinks_of(
    alerts: Sequence[str | Sink],
    logger: logging.Logger,
    folder: Path | None,
    wandb: Sequence[Any],
    name: str | None = None,
) -> list[Sink]:
    """Resolve a checked ``alerts=`` argument.

    Args:
        alerts: Names and sinks.
        logger: Where ``"log"`` goes.
        folder: Folder of the file that ``"jsonl"`` writes; None for none.
        wandb: Weights & Biases runs, to which ``"wandb"`` goes.
        name: Of the monitor that they come from.
    """
    named: dict[str, list[Sink]] = {
        "log": [LogSink(logger, name)],
        "jsonl": [] if folder is None else [JSONLinesSink(folder / f"{name or 'eos'}_alerts.jsonl")],
        "wandb": [_wandb_sink(run) for run in wandb],
    }
    return [sink for alert in alerts for sink in (named[alert] if isinstance(alert, str) else [alert])]


def _wandb_sink(run: Any) -> Sink:
    return lambda alert: run.alert(title=f"eos_monitor: {alert.verdict.name}", text=alert.message)
