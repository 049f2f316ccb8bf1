"""Sinks against a real local server, slow and broken receivers, and files that cannot be written."""

import json
import pickle
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from eos_monitor import Alert, JSONLinesSink, Verdict, WebhookSink
from eos_monitor.alerts import sinks
from eos_monitor.alerts.sinks import check_alerts


def alert(step: int = 3, verdict: Verdict = Verdict.EDGE, previous: Verdict = Verdict.STABLE) -> Alert:
    return Alert(step, verdict, previous, f"step {step}: at the edge [{verdict.name}]")


class Receiver:
    """A local HTTP server that answers with the statuses it is given, the last one for ever."""

    def __init__(self, statuses: list[int], hold: threading.Event | None = None) -> None:
        self.posts: list[tuple[dict[str, str], Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 60

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.posts.append((dict(self.headers), json.loads(body)))
                if hold is not None:
                    hold.wait(60)
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # closing it waits for them
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/secret-token"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receivers() -> Iterator[Any]:
    opened: list[Receiver] = []

    def open_receiver(*statuses: int, hold: threading.Event | None = None) -> Receiver:
        opened.append(Receiver(list(statuses), hold))
        return opened[-1]

    yield open_receiver
    for receiver in opened:
        receiver.close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks.time, "sleep", lambda seconds: None)


def test_webhook_posts_what_slack_expects(receivers: Any) -> None:
    receiver = receivers(200)
    sink = WebhookSink(receiver.url, headers={"Authorization": "Bearer x"})
    sink(alert())
    assert sink.flush(10)
    [(headers, body)] = receiver.posts
    assert body == {"text": "eos_monitor: step 3: at the edge [EDGE]"}
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer x"
    assert (sink.sent, sink.dropped) == (1, 0)


def test_payload_can_be_anothers(receivers: Any) -> None:
    receiver = receivers(204)
    sink = WebhookSink(receiver.url, payload=lambda a: {"content": a.message, "step": a.step})
    sink(alert(step=9))
    assert sink.flush(10)
    assert receiver.posts[0][1] == {"content": "step 9: at the edge [EDGE]", "step": 9}


def test_a_failing_server_is_tried_again_and_then_left(receivers: Any) -> None:
    receiver = receivers(500, 503, 200)
    sink = WebhookSink(receiver.url)
    sink(alert())
    assert sink.flush(10)
    assert (len(receiver.posts), sink.sent, sink.dropped) == (3, 1, 0)
    broken = receivers(500)
    sink = WebhookSink(broken.url, retries=2)
    sink(alert())
    assert sink.flush(10)
    assert (len(broken.posts), sink.sent, sink.dropped, sink.last_error) == (3, 0, 1, "HTTP 500")


def test_a_wrong_address_is_not_tried_again(receivers: Any) -> None:
    receiver = receivers(404)
    sink = WebhookSink(receiver.url)
    sink(alert())
    assert sink.flush(10)
    assert (len(receiver.posts), sink.dropped) == (1, 1)


def test_a_receiver_that_hangs_holds_nobody_up_and_the_queue_is_bounded(receivers: Any) -> None:
    hold = threading.Event()
    receiver = receivers(200, hold=hold)
    sink = WebhookSink(receiver.url, timeout=60.0)
    began = time.monotonic()
    for step in range(1000):
        sink(alert(step))
    # The receiver hangs for a minute; generous, because the machine may be busy.
    assert time.monotonic() - began < 10
    assert not sink.flush(0.01)
    # One may be on its way beside the hundred that wait.
    assert sink.dropped in (899, 900)
    hold.set()
    assert sink.flush(30)
    assert receiver.posts[-1][1]["text"].startswith("eos_monitor: step 999")
    assert sink.sent == 1000 - sink.dropped


def test_nobody_listening_is_no_error() -> None:
    sink = WebhookSink("http://127.0.0.1:9/secret", retries=1)
    sink(alert())
    assert sink.flush(10)
    assert sink.dropped == 1
    assert "secret" not in f"{sink!r} {sink.last_error}"


def test_the_address_is_never_shown() -> None:
    assert repr(WebhookSink("https://hooks.example.com/T0/secret")) == "WebhookSink('hooks.example.com')"
    with pytest.raises(ValueError, match="not shown") as caught:
        WebhookSink("ftp://hooks.example.com/secret")
    assert "hooks" not in str(caught.value)


def test_webhook_survives_pickling(receivers: Any) -> None:
    receiver = receivers(200)
    sink = WebhookSink(receiver.url)
    sink(alert())
    assert sink.flush(10)
    again = pickle.loads(pickle.dumps(sink))
    again(alert(step=5))
    assert again.flush(10)
    assert len(receiver.posts) == 2


@pytest.mark.parametrize("wrong", [{"timeout": 0.0}, {"retries": -1}], ids=["timeout", "retries"])
def test_wrong_arguments_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WebhookSink("https://example.com/x", **wrong)


def test_json_lines(tmp_path: Path) -> None:
    sink = JSONLinesSink(tmp_path / "new" / "alerts.jsonl")
    sink(alert(step=1))
    sink(alert(step=2, verdict=Verdict.DIVERGING))
    rows = [json.loads(line) for line in sink.path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["verdict"] == "DIVERGING"
    assert rows[0]["previous"] == "STABLE"


def test_json_lines_on_a_full_disk_raises_for_the_monitor_to_tell(tmp_path: Path) -> None:
    """/dev/full is a disk without room."""
    with pytest.raises(OSError, match="space"):
        JSONLinesSink("/dev/full")(alert())


@pytest.mark.parametrize("wrong", ["log", [3], ["slack"]], ids=["string", "number", "name"])
def test_alerts_argument_is_checked(wrong: Any) -> None:
    with pytest.raises(ValueError, match="alerts"):
        check_alerts(wrong)
