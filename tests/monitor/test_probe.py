"""The gauge in a plain PyTorch loop: it changes nothing, never raises, and tells what it saw."""

import json
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from eos_monitor import (
    Alert,
    CFLMonitor,
    EdgeOfStabilityMonitor,
    PerturbationMonitor,
    Probe,
    Solver,
    StabilityProbe,
    StabilityReading,
    Verdict,
    measure_stability,
)
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.ranks import Ranks
from eos_monitor.monitor.rows import append_jsonl


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def loss_fn(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def stream(n: int = 8, seed: int = 0) -> Callable[[], Any]:
    g = torch.Generator().manual_seed(seed)
    return lambda: (torch.randn(n, 4, generator=g), torch.randint(0, 3, (n,), generator=g))


def train(
    net: nn.Module,
    optimizers: list[Optimizer],
    steps: int,
    probe: StabilityProbe | None = None,
    *,
    draw: Callable[[], Any] | None = None,
    fed: bool = False,
) -> list[StabilityReading | None]:
    draw = draw or stream()
    found = []
    last = None
    for _ in range(steps):
        batch = draw()
        if probe is not None:
            found.append(probe.step(batch, last if fed else None))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_fn(net, batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        last = loss.detach()
    return found


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build()


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "sgd": lambda net: [SGD(net.parameters(), lr=0.1, momentum=0.9)],
    "adamw": lambda net: [AdamW(net.parameters(), lr=1e-2)],
    "two": lambda net: [SGD(net.body[0].parameters(), lr=0.1), Adam(list(net.body.parameters())[2:], lr=1e-2)],
}


@pytest.mark.parametrize("cadence", [3, None], ids=["every-3", "automatic"])
@pytest.mark.parametrize("kind", ["fixed", "batch"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_is_bit_identical(name: str, kind: str, cadence: int | None) -> None:
    """Weights, buffers, optimizer state, gradients and generators, dropout included."""

    def run(*, watched: bool) -> tuple[Any, ...]:
        net = seeded(Net)
        optimizers = OPTIMIZERS[name](net)
        probe = None
        if watched:
            probe = StabilityProbe(
                net, optimizers, loss_fn, every_n_steps=cadence, probe=Probe(kind, samples=16), max_overhead=1.0
            )
        train(net, optimizers, 40, probe, fed=True)
        assert probe is None or len(probe.readings) >= (1 if cadence is None else 2)
        state = [t for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, Tensor)]
        gradients = [p.grad for p in net.parameters()]
        return *net.state_dict().values(), *state, *gradients, torch.get_rng_state()

    for a, b in zip(run(watched=False), run(watched=True), strict=True):
        assert torch.equal(a, b)


def test_a_naive_reading_would_not_be() -> None:
    """So the test above can fail: dropout's draws and batch norm's statistics move on."""
    nets = []
    for looks in (0, 1):
        net = seeded(Net)
        for _ in range(looks):
            loss_fn(net, stream()()).backward()
        train(net, [SGD(net.parameters(), lr=0.1)], 5)
        nets.append(net.state_dict())
    assert not all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])


def test_readings_are_those_of_measure_stability() -> None:
    net, batch = seeded(Net), stream(32)()
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(full_batch=True))
    found = probe.step(batch)
    alone = measure_stability(net, loss_fn, [batch], sgd, full_batch=True)
    assert found is not None
    for field in ("edge_ratio", "sharpness", "normalized_sharpness", "loss", "lr", "samples", "threshold", "converged"):
        assert getattr(found, field) == getattr(alone, field), field
    assert probe.readings == [found]


def test_steps_are_counted_and_filed() -> None:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=4, probe="batch")
    found = train(net, [sgd], 10, probe)
    assert [i for i, reading in enumerate(found) if reading is not None] == [0, 4, 8]
    assert [reading.step for reading in probe.readings] == [0, 4, 8]
    assert probe.overhead is not None
    assert probe.overhead > 0.0


@pytest.mark.parametrize(("wanted", "first", "samples"), [(8, 3, 8), (9, 3, 16), (40, 4, 40), (None, 3, 8)])
def test_first_reading_comes_when_the_fixed_probe_is_full_and_steps_have_been_timed(
    wanted: int | None, first: int, samples: int
) -> None:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, probe=Probe(samples=wanted))
    train(net, [sgd], 6, probe)
    assert (probe.readings[0].step, probe.readings[0].samples) == (first, samples)


def test_probe_of_the_users_own() -> None:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    own = [stream(5, 1)(), stream(7, 2)()]
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=own)
    found = probe.step(stream()())
    assert found is not None
    assert found.samples == 12
    assert found.loss == pytest.approx(measure_stability(net, loss_fn, own, sgd).loss)


def test_fixed_probe_is_a_copy_of_the_batch_before_the_step() -> None:
    """A loop that edits its batch in place does not edit the probe."""
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(samples=8))
    batch = stream()()
    first = probe.step(batch)
    batch[0].fill_(0.0)
    second = probe.step(batch)
    assert first is not None
    assert second is not None
    assert first.loss == second.loss


def test_full_batch_takes_the_first_batch_for_all_the_data() -> None:
    net, batch = seeded(Net), stream(12)()
    sgd = SGD(net.parameters(), lr=1e-3)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(full_batch=True))
    found = probe.step(batch)
    assert found is not None
    assert (found.full_batch, found.samples, probe.verdict) == (True, 12, Verdict.STABLE)


def test_part_of_the_data_is_not_called_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch over the memory limit is cut: then the probe is a sample, and STABLE would be a guess."""
    monkeypatch.setattr("eos_monitor.readings.samples._MAX_BYTES", 512)
    net = seeded(Net)
    probe = StabilityProbe(net, SGD(net.parameters(), lr=1e-3), loss_fn, every_n_steps=1, probe=Probe(full_batch=True))
    found = probe.step(stream(200)())
    assert found is not None
    assert found.samples < 200
    assert not found.full_batch
    assert probe.verdict is Verdict.UNKNOWN


def test_minibatches_are_never_called_stable() -> None:
    net = seeded(Net)
    probe = StabilityProbe(net, SGD(net.parameters(), lr=1e-3), loss_fn, every_n_steps=1, probe=Probe(samples=8))
    assert probe.step(stream()()) is not None
    assert probe.verdict is Verdict.UNKNOWN


def test_large_learning_rate_is_called_edge() -> None:
    net = seeded(Net)
    probe = StabilityProbe(net, SGD(net.parameters(), lr=100.0), loss_fn, every_n_steps=1, probe=Probe(samples=8))
    probe.step(stream()())
    assert probe.verdict is Verdict.EDGE


def test_adam_warms_up_first() -> None:
    net = seeded(Net)
    adam = Adam(net.parameters(), lr=1e-3)
    probe = StabilityProbe(net, adam, loss_fn, every_n_steps=10, probe=Probe(samples=8))
    found = train(net, [adam], 31, probe)
    assert [r.ready for r in found if r is not None] == [False, False, False, False]
    assert probe.verdict is Verdict.WARMING_UP
    train(net, [adam], 10, probe)
    assert probe.readings[-1].ready
    assert probe.readings[-1].edge_ratio is not None
    assert probe.verdict is not Verdict.WARMING_UP


def test_automatic_cadence_looks_again_soon_while_adam_warms_up() -> None:
    net = seeded(Net)
    adam = Adam(net.parameters(), lr=1e-3)
    probe = StabilityProbe(net, adam, loss_fn, probe=Probe(samples=8))
    train(net, [adam], 34, probe)
    assert [r.step for r in probe.readings] == [3, 13, 23, 33]
    assert [r.ready for r in probe.readings] == [False] * 3 + [True]


@pytest.mark.parametrize("loss", [math.nan, torch.tensor(math.inf)], ids=["float", "tensor"])
def test_loss_that_is_not_finite_is_diverging(loss: Any) -> None:
    net = seeded(Net)
    probe = StabilityProbe(net, SGD(net.parameters(), lr=0.1), loss_fn, every_n_steps=1000)
    probe.step(stream()(), 1.0)
    assert probe.verdict is Verdict.WARMING_UP
    probe.step(stream()(), loss)
    assert probe.verdict is Verdict.DIVERGING


# Failures.


def probe_with(loss: Callable[[Any, Any], Any], **arguments: Any) -> tuple[StabilityProbe, nn.Module, Optimizer]:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    return StabilityProbe(net, sgd, loss, **({"every_n_steps": 1, "probe": Probe(samples=8)} | arguments)), net, sgd


def test_failing_loss_warns_once_and_is_off_after_three() -> None:
    calls = []

    def broken(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        raise KeyError("labels")

    probe, net, sgd = probe_with(broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(net, [sgd], 10, probe)
    assert found == [None] * 10
    assert len(calls) == 3
    assert probe.readings == []
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert "could not take a reading; training goes on. KeyError: 'labels'" in messages[0]
    assert "test_probe.py:" in messages[0]
    assert "stops measuring; training goes on. 3 readings in a row failed" in messages[1]


def test_failures_that_are_not_in_a_row_do_not_turn_it_off() -> None:
    calls = []

    def flaky(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        if probe._step % 3:
            raise KeyError("now and then")
        return loss_fn(module, batch)

    probe, net, sgd = probe_with(flaky)
    with pytest.warns(UserWarning, match="could not take a reading") as caught:
        train(net, [sgd], 12, probe)
    assert [r.step for r in probe.readings] == [2, 5, 8, 11]
    assert len(caught) == 1


def test_failing_reading_leaves_training_bit_identical() -> None:
    def late(module: Any, batch: Any) -> Tensor:
        loss_fn(module, batch)
        raise RuntimeError("after the forward pass")

    probe, net, sgd = probe_with(late)
    with pytest.warns(UserWarning, match="after the forward pass"):
        train(net, [sgd], 10, probe)
    plain = seeded(Net)
    train(plain, [SGD(plain.parameters(), lr=0.1)], 10)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True))


def test_wrong_products_turn_it_off_with_the_reason() -> None:
    net = seeded(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3))
    )
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(samples=8))
    with pytest.warns(UserWarning, match="stops measuring.* differ from finite differences") as caught:
        train(net, [sgd], 5, probe)
    assert len(caught) == 1
    assert len(probe.readings) == 1
    assert probe.readings[0].edge_ratio is None
    assert probe.verdict is Verdict.UNKNOWN


def test_unconverged_reading_is_kept_marked_and_told_once() -> None:
    net = nn.Linear(400, 3, bias=False)
    x = torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(
        net, sgd, lambda m, b: m(b).square().mean(), every_n_steps=1, probe=[x], solver=Solver(k=20, rtol=1e-6)
    )
    with pytest.warns(UserWarning, match=r"The reading at step 0 did not converge in 64 products") as caught:
        train(net, [sgd], 3, probe, draw=lambda: (x, torch.zeros(500, dtype=torch.long)))
    assert len(caught) == 1
    assert [r.converged for r in probe.readings] == [False] * 3
    assert probe.verdict is Verdict.UNKNOWN  # after three that do not count


def test_batch_that_cannot_be_kept_turns_it_off() -> None:
    probe, *_ = probe_with(loss_fn)
    with pytest.warns(UserWarning, match="stops measuring.*Expected a batch with a tensor"):
        assert probe.step(["words"]) is None
    assert probe.step(stream()()) is None


def test_no_batches_given_is_a_failure_told() -> None:
    probe, *_ = probe_with(loss_fn, probe=[])
    with pytest.warns(UserWarning, match="Expected at least one batch, got none"):
        assert probe.step(stream()()) is None


# What is written.


def test_rows_are_appended_as_json_lines(tmp_path: Path) -> None:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=2, probe=Probe(samples=8))
    train(net, [sgd], 5, probe)
    path = tmp_path / "readings.jsonl"
    path.write_text('{"step": -1}\n', encoding="utf-8")
    probe.to_jsonl(path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [-1, 0, 2, 4]
    for row, reading in zip(rows[1:], probe.readings, strict=True):
        assert row["edge_ratio"] == reading.edge_ratio
        assert row["lr"] == list(reading.lr)
        assert row["sampling_error"] is None
        assert row["verdict"] in Verdict.__members__
    assert len({row["run"] for row in rows[1:]}) == 1


def test_rows_are_appended_once(tmp_path: Path) -> None:
    """However often they are filed; a file that was taken away, or another one, gets all of them."""
    net = Net()
    probe = StabilityProbe(net, SGD(net.parameters(), lr=0.05), loss_fn, every_n_steps=1, probe=Probe(samples=8))
    draw = stream()
    file, other = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"

    def steps_in(path: Path) -> list[int]:
        return [json.loads(line)["step"] for line in path.read_text().splitlines()]

    for step in range(6):
        probe.step(draw())
        if step % 2:
            probe.to_jsonl(file)
            probe.to_jsonl(str(file))
    assert steps_in(file) == list(range(6))
    probe.to_jsonl(other)
    assert steps_in(other) == list(range(6))
    file.unlink()
    probe.to_jsonl(file)
    assert steps_in(file) == list(range(6))


@pytest.mark.parametrize("ask", ["verdict", "report", "state_dict", "to_jsonl"])
@pytest.mark.parametrize("last", [1, 20])
def test_losses_that_are_read_in_lots_are_read_when_asked(ask: str, last: int, tmp_path: Path) -> None:
    """As on an accelerator: the losses of 64 steps wait for one another, and the run ends with some that are NaN."""
    net = Net()
    told: list[Alert] = []
    probe = StabilityProbe(
        net, SGD(net.parameters(), lr=0.01), loss_fn, every_n_steps=70, probe=Probe(samples=8), alerts=[told.append]
    )
    probe._steps._cheap = False
    probe._steps._buffered = 64
    draw = stream()
    for step in range(100):
        probe.step(draw(), torch.tensor(math.nan if step >= 100 - last else 1.0))
    assert all(alert.verdict is not Verdict.DIVERGING for alert in told)
    if ask == "verdict":
        assert probe.verdict is Verdict.DIVERGING
    elif ask == "report":
        assert "DIVERGING" in probe.report()
    elif ask == "state_dict":
        assert probe.state_dict()["detector"]["verdict"][0] == int(Verdict.DIVERGING)
    else:
        probe.to_jsonl(tmp_path / "rows.jsonl")
    assert [alert.step for alert in told if alert.verdict is Verdict.DIVERGING] == [100 - last]


def test_a_reading_is_judged_after_the_steps_before_it() -> None:
    net = Net()
    probe = StabilityProbe(net, SGD(net.parameters(), lr=0.01), loss_fn, every_n_steps=30, probe=Probe(samples=8))
    probe._steps._cheap = False
    probe._steps._buffered = 64
    seen: list[int] = []
    real = probe._engine.detector.update
    probe._engine.detector.update = lambda step, **inputs: seen.append(step) or real(step, **inputs)
    draw = stream()
    for _ in range(100):
        probe.step(draw(), torch.tensor(1.0))
    assert probe.verdict is not Verdict.DIVERGING
    assert seen == sorted(seen)
    assert set(seen) == set(range(100))


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"a": math.nan, "b": (math.inf, 1.0, {"c": -math.inf}), "d": None, "e": "x", "f": 3})
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "a": None,
        "b": [None, 1.0, {"c": None}],
        "d": None,
        "e": "x",
        "f": 3,
    }


def test_run_ids_differ_and_use_no_generator_of_the_run() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second = Engine(Probe(), Solver()), Engine(Probe(), Solver())
    assert first.run_id != second.run_id
    assert torch.equal(torch.get_rng_state(), before)


def test_state_goes_through_json_and_the_run_goes_on() -> None:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=100.0)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=2, probe=Probe(samples=8))
    probe.step(stream()())
    assert probe.verdict is Verdict.EDGE
    state = json.loads(json.dumps(probe.state_dict()))
    resumed = StabilityProbe(net, sgd, loss_fn, every_n_steps=2, probe=Probe(samples=8))
    resumed.load_state_dict(state)
    assert resumed.verdict is Verdict.EDGE
    assert resumed.step(stream()()) is None  # step 1
    found = resumed.step(stream()())
    assert found is not None
    assert found.step == 2
    assert found.matvecs > 6  # a cold one


def test_changes_of_verdict_are_kept() -> None:
    engine = Engine(Probe(), Solver())
    for step, loss in enumerate((1.0, math.nan, 1.0)):
        engine.add_step(step, loss=loss)
    assert engine.verdicts == [(0, Verdict.WARMING_UP), (1, Verdict.DIVERGING)]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "Expected `every_n_steps` >= 1", {"every_n_steps": 0}),
        (ValueError, "Expected 0 < `max_overhead` <= 1", {"max_overhead": 2.0}),
        (ValueError, "Expected `probe` to be one of", {"probe": "all"}),
        (TypeError, "Expected `probe` to be one of", {"probe": 3}),
        (ValueError, "Expected `samples` >= 1", {"probe": lambda: Probe(samples=0)}),
        (ValueError, "Expected 1 <= `k`", {"solver": lambda: Solver(k=0)}),
        (ValueError, "Expected 0 < `rtol` < 1", {"solver": lambda: Solver(rtol=0.0)}),
    ],
    ids=["cadence", "overhead", "probe", "probe-type", "samples", "k", "rtol"],
)
def test_arguments_are_checked_at_once(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    net = Net()
    sgd = SGD(net.parameters(), lr=0.1)
    with pytest.raises(error, match=message):
        StabilityProbe(
            net, sgd, loss_fn, **{name: value() if callable(value) else value for name, value in arguments.items()}
        )


@pytest.mark.parametrize(
    ("failures", "full", "ready"),
    [(0.0, 2.0, True), (0.0, 1.0, False), (1.0, 1.0, False)],
    ids=["all-full", "one-still-collects", "one-failed"],
)
def test_processes_agree_on_being_ready(failures: float, full: float, ready: bool) -> None:
    """This process is full; what the sum over two says decides, and a failure elsewhere switches measuring off here."""
    engine = Engine(Probe(samples=1), Solver())
    engine.collect(torch.ones(1, 2))
    engine.ranks = Ranks(2, lambda tensor: torch.tensor([failures, full]))
    with pytest.warns(UserWarning, match="another process") if failures else nullcontext():
        assert engine.ready() is ready
    assert (engine.off is not None) is bool(failures)


# What it has of the callback.


def diverging(probe: StabilityProbe, losses: list[float]) -> None:
    for loss in losses:
        probe.step(stream()(), loss)


def test_alerts_go_to_the_log_and_to_functions_and_a_failing_one_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Alert] = []

    def refuses(alert: Alert) -> None:
        raise OSError("no line")

    probe, net, sgd = probe_with(loss_fn, every_n_steps=1000, alerts=("log", refuses, heard.append))
    with pytest.warns(UserWarning, match=r"an output \(sink\) failed.*no line") as caught:
        diverging(probe, [1.0, 1.0, math.nan, 1.0])
    assert len(caught) == 1
    assert (heard[-1].step, heard[-1].verdict) == (2, Verdict.DIVERGING)
    assert any("The loss is not finite, as of step 2" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("name", ["jsonl", "wandb"])
def test_sinks_that_need_a_trainer_are_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=r"plain loop.*Pass JSONLinesSink\(path\)"):
        probe_with(loss_fn, alerts=("log", name))


def test_advisory_and_report_are_those_of_the_run() -> None:
    probe, net, sgd = probe_with(loss_fn, every_n_steps=100)
    assert probe.advisory is None
    train(net, [sgd], 3, probe)
    assert probe.report().startswith("1 reading, at step 0.")
    # Ten times the learning rate, from one step to the next, at an edge ratio where such jumps fail.
    ratio = probe.readings[0].edge_ratio
    assert ratio is not None
    sgd.param_groups[0]["lr"] *= 20.0 / ratio
    train(net, [sgd], 1, probe)
    assert probe.advisory == "jump-risk"


class Memory:
    """An object that says itself what a copy of it is: no sandbox copies it."""

    def __init__(self) -> None:
        self.calls = 0

    def __copy__(self) -> "Memory":
        return self


@pytest.mark.parametrize(("verify", "stops"), [("first", True), (False, False)])
def test_a_loss_that_leaves_a_trace_is_named_and_measuring_stops(verify: Any, stops: bool) -> None:
    net = seeded(Net)
    net.memory = Memory()  # type: ignore[assignment]

    def counts(module: Any, batch: Any) -> Tensor:
        module.memory.calls += 1
        return loss_fn(module, batch)

    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, counts, every_n_steps=1, probe=Probe(samples=8), verify=verify)
    with pytest.warns(UserWarning, match="memory.calls changed") if stops else nullcontext():
        train(net, [sgd], 3, probe)
    assert list(probe.off) == (["measuring"] if stops else [])


class Wrapped:
    """As Accelerate hands schedulers out: with the real one behind an attribute, and no `interval`."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self) -> None:
        self.scheduler.step()

    def get_last_lr(self) -> Any:
        return self.scheduler.get_last_lr()


@pytest.mark.parametrize("wrap", [lambda s: s, Wrapped, lambda s: Wrapped(Wrapped(s))], ids=["bare", "once", "twice"])
def test_wrapped_schedulers_are_looked_ahead_like_bare_ones(wrap: Any) -> None:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    scheduler = wrap(torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5))
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(samples=8), schedulers=[scheduler])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the scheduler is stepped without a step of the optimizer
        for _ in range(3):
            reading = probe.step(stream()())
            assert reading is not None
            # Gradient descent: the edge ratio is proportional to the learning rate, and that is halved.
            assert reading.edge_ratio_next == pytest.approx(reading.edge_ratio / 2, rel=1e-6)
            scheduler.step()
    assert probe.off == {}


class NotAScheduler:
    """Has nothing that a look-ahead asks for."""


@pytest.mark.parametrize("entry", [NotAScheduler(), None, 3])
def test_nothing_raises_into_the_loop(entry: Any) -> None:
    net = seeded(Net)
    sgd = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, sgd, loss_fn, every_n_steps=1, probe=Probe(samples=8), schedulers=[entry])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = train(net, [sgd], 6, probe)
    assert sum(reading is not None for reading in found) == 6
    assert all(reading.edge_ratio_next is None for reading in probe.readings)


def test_a_failure_of_its_own_is_told_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(Engine, "due", fails)
    probe, net, sgd = probe_with(loss_fn)
    with pytest.warns(UserWarning, match="watching the loop.*ArithmeticError: on purpose") as caught:
        assert train(net, [sgd], 8, probe) == [None] * 8
    assert len(caught) == 2
    assert "watching the loop" in probe.off


def test_state_of_another_run_is_told_and_its_verdict_dropped() -> None:
    probe, net, sgd = probe_with(loss_fn, every_n_steps=1000, alerts=())
    diverging(probe, [1.0, math.nan])
    state = json.loads(json.dumps(probe.state_dict()))
    other = seeded(lambda: nn.Linear(4, 3))
    resumed = StabilityProbe(other, AdamW(other.parameters()), loss_fn, alerts=())
    with pytest.warns(UserWarning, match=r"trained \[\['SGD', 83\]\].*\[\['AdamW', 15\]\]; its verdict starts afresh"):
        resumed.load_state_dict(state)
    assert resumed.verdict is Verdict.WARMING_UP


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("probe_samples", r"probe=Probe\(samples=...\)"),
        ("full_batch", r"probe=Probe\(full_batch=...\)"),
        ("batch_size_fn", r"probe=Probe\(batch_size_fn=...\)"),
        ("rtol", r"solver=Solver\(rtol=...\)"),
        ("seed", r"solver=Solver\(seed=...\)"),
        ("actions", r"StabilityActions\(...\)"),
    ],
)
@pytest.mark.parametrize("cls", [StabilityProbe, EdgeOfStabilityMonitor, CFLMonitor, PerturbationMonitor])
def test_arguments_of_earlier_versions_say_where_they_went(cls: Any, name: str, place: str) -> None:
    net = Net()
    first = (net, SGD(net.parameters(), lr=0.1), loss_fn) if cls is StabilityProbe else ()
    with pytest.raises(TypeError, match=f"Expected no argument '{name}', got one: it is part of .*{place}"):
        cls(*first, **{name: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample'"):
        cls(*first, sample=1)
