"""What the layer-wise monitor does in a real Trainer."""

import importlib
import json
import logging
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, Probe, Solver, Verdict, estimate_cfl
from eos_monitor.callbacks.observer import Observers
from eos_monitor.cfl.tiers import CFLGauge
from eos_monitor.monitor.engine import Engine
from eos_monitor.verdicts.change import Change
from tests.callbacks import cfl_run
from tests.callbacks.runs import NAMESPACES, Case, differences, logs_of, make_logger, mlp, run
from tests.launching import run_script

pl = importlib.import_module("pytorch_lightning")

PROBE = torch.tensor([[1.0, 0.0], [0.0, 3.0]])  # Hessian 2/N XᵀX of the least squares below: λ_max is 9


class Line(pl.LightningModule):
    """Least squares with one layer, whose learning rate and momentum are set when the step uses them."""

    def __init__(self, *rates: float, momenta: Sequence[float] = ()) -> None:
        super().__init__()
        self.rates, self.momenta = rates, momenta
        self.net = nn.Linear(2, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.rates[0], momentum=self.momenta[0] if self.momenta else 0.0)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
        step = self.trainer.global_step
        for group in optimizer.param_groups:
            group["lr"] = self.rates[min(step, len(self.rates) - 1)]
            if self.momenta:
                group["momentum"] = self.momenta[min(step, len(self.momenta) - 1)]
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Deep(pl.LightningModule):
    """Any net with cross-entropy."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer or (lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def layered(layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    hidden = [module for _ in range(layers - 1) for module in (nn.Linear(4, 4), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(4, 3))


def samples(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(24, 4, generator=g, dtype=torch.float64).to(dtype), torch.randint(3, (24,), generator=g)


def fit(module: Any, callbacks: Any, tmp_path: Path, batches: Any = None, **settings: Any) -> Any:
    defaults: dict[str, Any] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "logger": False,
        "callbacks": callbacks,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(**{**defaults, **settings})
    batches = batches or ([PROBE] if isinstance(module, Line) else [samples()])
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs_of(folder) / "cfl_readings.jsonl").read_text().splitlines()]


def layers_of(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {layer["layer"]: layer for layer in row["layers"]}


@pytest.fixture
def said() -> Any:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, log = Keep(), logging.getLogger("pytorch_lightning.eos_monitor")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(level)


# ---------------------------------------------------------------- no trace

ATTACHED: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "alone": lambda s: [CFLMonitor(**s)],
    "first": lambda s: [CFLMonitor(), EdgeOfStabilityMonitor(**s)],
    "second": lambda s: [EdgeOfStabilityMonitor(**s), CFLMonitor()],
}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, betas=(0.5, 0.9))  # ready after ten steps


RUNS = {
    "batch-norm-dropout-metrics": Case(
        net=lambda: mlp(norm=True, dropout=0.3, activation=nn.SiLU), metrics=True, validate=True
    ),
    "adamw-accumulate-scheduler": Case(
        net=lambda: mlp(activation=nn.GELU),
        optimizer=adamw,
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
        trainer={"accumulate_grad_batches": 2, "max_epochs": 4},
    ),
    "bf16-mixed-clip": Case(
        net=lambda: mlp(norm=True, activation=nn.ReLU),
        trainer={"precision": "bf16-mixed", "gradient_clip_val": 0.5},
    ),
    "resumed": Case(net=lambda: mlp(dropout=0.2), resume=True),
}


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize(
    ("namespace", "name"),
    [
        # The packages differ in nothing but their names: one row in both at every commit, the others before a release.
        pytest.param(namespace, name, marks=[pytest.mark.slow] * (namespace != NAMESPACES[0] and i > 0))
        for namespace in NAMESPACES
        for i, name in enumerate(RUNS)
    ],
)
def test_run_is_bit_identical(namespace: str, attached: str, name: str, tmp_path: Path) -> None:
    case = RUNS[name]
    without = run(namespace, case, tmp_path / "without", lambda pl: None)
    settings = {"every_n_steps": 3, "probe": Probe(samples=16)}
    monitored = run(namespace, case, tmp_path / "with", lambda pl: ATTACHED[attached](settings))
    assert differences(without["compared"], monitored["compared"]) == []
    (monitor,) = (c for c in monitored["callback"] if isinstance(c, CFLMonitor))
    assert [e.layer for e in sorted(monitor.estimates, key=lambda e: e.layer)][0] == "net.0"
    assert all(e.cfl_number is not None and e.cfl_number > 0 for e in monitor.estimates)
    prefixes = {key.split("/")[0] for _, metrics in monitored["ours"] for key in metrics}
    assert prefixes == ({"cfl"} if attached == "alone" else {"cfl", "eos"})


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_exact_list_of_steps_and_keys(namespace: str, tmp_path: Path) -> None:
    """Two layers, of which the last has no activation behind it; nothing of the silent host."""
    monitored = run(
        namespace,
        Case(trainer={"max_epochs": 1}),  # 8 steps
        tmp_path / "run",
        lambda pl: [CFLMonitor(every_n_steps=3, probe=Probe(samples=8))],
    )
    keys = {f"cfl/net.{layer}/{key}" for layer in (0, 3) for key in ("number", "lr_max", "crossings")}
    keys |= {f"cfl/net.0/{key}" for key in ("activated", "transitioning", "not_activated")}
    assert [(step, set(metrics)) for step, metrics in monitored["ours"]] == [(0, keys), (3, keys), (6, keys)]
    folder = tmp_path / "run" / "rows" / "version_0"  # name and version of the logger
    assert [row["step"] for row in rows_of(folder)] == [0, 3, 6]
    assert {path.name for path in folder.iterdir()} == {"cfl_readings.jsonl", "cfl_layers.png"}


def test_tensorboard_gets_numbers_and_heat_map(tmp_path: Path) -> None:
    logger = pl.loggers.TensorBoardLogger(tmp_path)
    fit(Deep(layered()), [EdgeOfStabilityMonitor(every_n_steps=2), CFLMonitor()], tmp_path, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    written = rows_of(Path(logger.log_dir))
    assert [row["step"] for row in written] == [0, 2, 4]
    numbers = events.Scalars("cfl/net.2/number")
    assert [event.step for event in numbers] == [0, 2, 4]
    # single precision in the event file
    expected = [layers_of(row)["net.2"]["cfl_number"] for row in written]
    assert [event.value for event in numbers] == pytest.approx(expected, rel=1e-6)
    assert set(events.Tags()["images"]) == {"eos/run", "cfl/layers"}


def test_heat_map_and_report_have_the_layers(tmp_path: Path, said: list[str]) -> None:
    monitor = CFLMonitor(every_n_steps=1)
    assert monitor.report() == "No reading was taken."
    fit(Deep(layered()), [monitor], tmp_path)
    assert (logs_of(tmp_path) / "cfl_layers.png").stat().st_size > 10_000
    lines = monitor.report().splitlines()
    assert [line.split()[0] for line in lines] == [e.layer for e in monitor.estimates]
    for part in ("of its limit", "of its entries transitioning", "of the top mode"):
        assert part in lines[0] or part in lines[1]
    assert any("cfl_layers.png" in line for line in said)


def test_second_fit_starts_afresh(tmp_path: Path) -> None:
    monitor = CFLMonitor(every_n_steps=2)
    fit(Line(0.1), [monitor], tmp_path)
    first = [row["run"] for row in rows_of(tmp_path)]
    fit(Line(0.1), [monitor], tmp_path)
    second = [row["run"] for row in rows_of(tmp_path)]
    assert len(first) == len(second) == 3
    assert len({*first, *second}) == 2


# ---------------------------------------------------------------- the numbers


def test_numbers_are_those_of_the_dense_blocks(tmp_path: Path) -> None:
    """λ_max of each block, the top mode's shares and both limits, from a dense Hessian in double precision."""
    points: list[dict[str, torch.Tensor]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            points.append({name: p.detach().clone() for name, p in pl_module.net.named_parameters()})

    x, y = samples(torch.float64)
    host = EdgeOfStabilityMonitor(every_n_steps=1, solver=Solver(rtol=1e-6, max_matvecs=200))
    monitor = CFLMonitor(exact=True)
    module = Deep(layered(3), lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5, weight_decay=0.1))
    fit(module, [host, monitor, Look()], tmp_path, [(x, y)], precision="64-true")
    for point, row in zip(points, rows_of(tmp_path), strict=False):
        names, sizes = list(point), [p.numel() for p in point.values()]

        def loss(flat: torch.Tensor, names: Any = names, sizes: Any = sizes, point: Any = point) -> torch.Tensor:
            p = {n: part.view(point[n].shape) for n, part in zip(names, torch.split(flat, sizes), strict=True)}
            h = (x @ p["0.weight"].T + p["0.bias"]).tanh()
            h = (h @ p["2.weight"].T + p["2.bias"]).tanh()
            return F.cross_entropy(h @ p["4.weight"].T + p["4.bias"], y)

        hessian = torch.autograd.functional.hessian(loss, torch.cat([p.flatten() for p in point.values()]))
        mode = torch.linalg.eigh(hessian)[1][:, -1].split(sizes)
        begin = 0
        for name, size, part in zip(names, sizes, mode, strict=True):
            if name.endswith("weight"):
                block = hessian[begin : begin + size, begin : begin + size]
                curvature = float(torch.linalg.eigvalsh(block)[-1])
                layer = layers_of(row)[f"net.{name[0]}"]
                # residual 1e-4: the eigenvalue's error is its square over the gap
                assert layer["curvature"] == pytest.approx(curvature, rel=1e-5)
                assert layer["cfl_number"] == pytest.approx(0.2 * (curvature + 0.1) / 3.0, rel=1e-5)
                # 2(1 + γ)/(λ + wd)
                assert layer["lr_max"] == pytest.approx(3.0 / (curvature + 0.1), rel=1e-5)
                # the mode has the residual itself, 1e-6 over a gap that is not small
                assert layer["top_mode_share"] == pytest.approx(float(part.square().sum()), abs=1e-3)
            begin += size


def test_first_reading_is_estimate_cfl_at_the_same_point(tmp_path: Path) -> None:
    """Adam, whose limits are a number for each weight: bit by bit the function's own, regimes and tiers included."""
    by_hand: list[Any] = []

    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 12:
                # A micro-second later it would be another point; the monitor's own reading leaves no trace either.
                loss = lambda m, b: F.cross_entropy(m(b[0]), b[1])  # noqa: E731
                by_hand.extend(estimate_cfl(pl_module, loss, [batch], trainer.optimizers))

    module = Deep(layered(6), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.9)))
    monitor = CFLMonitor(every_n_steps=12)
    fit(module, [ByHand(), monitor], tmp_path, [samples(torch.float64)], precision="64-true", max_epochs=13)
    assert {e.method for e in by_hand} == {"cheap", "exact"}
    assert [e.layer for e in monitor.estimates] == [e.layer for e in by_hand]
    for mine, theirs in zip(monitor.estimates, by_hand, strict=True):
        for key in ("method", "curvature", "lr_max", "cfl_number", "transitioning", "transition_share", "form"):
            assert getattr(mine, key) == getattr(theirs, key), key


def test_loss_written_by_hand_on_a_part_of_the_module(tmp_path: Path) -> None:
    """As in many a training_step: no forward of its own, no loss function of torch's; two bends to cut at."""

    def by_hand(net: Any, batch: Any) -> torch.Tensor:
        out = net(batch[0])
        return (out.logsumexp(1) - out.gather(1, batch[1][:, None])[:, 0]).mean()

    class Part(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return by_hand(self.net, batch)

    torch.manual_seed(0)
    hidden = [m for _ in range(4) for m in (nn.Linear(4, 4), nn.Tanh(), nn.SiLU())]
    net, batch = nn.Sequential(*hidden, nn.Linear(4, 3)), samples(torch.float64)
    start = {name: p.clone() for name, p in net.double().state_dict().items()}
    monitor = CFLMonitor(every_n_steps=1)
    fit(Part(net), [monitor], tmp_path, [batch], precision="64-true", max_steps=1)
    net.load_state_dict(start)
    # The net itself as the root: its output is the loss's argument, which is the other way to find it.
    expected = {e.layer: e for e in estimate_cfl(net, by_hand, [batch])}
    found = layers_of(rows_of(tmp_path)[0])
    assert {layer["method"] for layer in found.values()} == {"cheap", "exact"}
    for name, layer in found.items():
        # double precision, the same seed
        assert layer["curvature"] == pytest.approx(expected[name.removeprefix("net.")].curvature, rel=1e-9)
        assert layer["method"] == expected[name.removeprefix("net.")].method


def test_numbers_are_of_the_rate_that_the_step_uses(tmp_path: Path) -> None:
    rates = (0.01, 0.02, 0.03, 0.05)
    fit(Line(*rates), [CFLMonitor(every_n_steps=1)], tmp_path)
    found = [layers_of(row)["net"] for row in rows_of(tmp_path)][:4]  # the fifth is taken after the last step
    # float32 and a converged solve
    assert [layer["cfl_number"] for layer in found] == pytest.approx([9 * lr / 2 for lr in rates], rel=1e-5)
    assert [layer["lr_max"] for layer in found] == pytest.approx([2 / 9] * 4, rel=1e-5)


def test_limits_follow_the_momentum_that_the_step_uses(tmp_path: Path) -> None:
    """As OneCycleLR does it: with the rate the momentum moves, and with it the limit 2(1 + γ)/λ."""
    rates, momenta = (0.01, 0.02, 0.02), (0.9, 0.5, 0.1)
    fit(Line(*rates, momenta=momenta), [CFLMonitor(every_n_steps=1)], tmp_path, max_epochs=3)
    found = [layers_of(row)["net"] for row in rows_of(tmp_path)][:3]
    limits = [2 * (1 + g) / 9 for g in momenta]
    assert [layer["lr_max"] for layer in found] == pytest.approx(limits, rel=1e-5)
    numbers = [lr / limit for lr, limit in zip(rates, limits, strict=True)]
    assert [layer["cfl_number"] for layer in found] == pytest.approx(numbers, rel=1e-5)


def test_number_is_not_told_where_settings_moved_apart(tmp_path: Path) -> None:
    class Apart(Deep):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": self.net[0].parameters()}, {"params": self.net[2].parameters()}], lr=0.1)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:
            optimizer.param_groups[0]["lr"] = 0.1 * 0.5**self.trainer.global_step
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    fit(Apart(layered(2)), [CFLMonitor(every_n_steps=1)], tmp_path, max_epochs=3)
    told = [[layer["cfl_number"] is not None for layer in row["layers"]] for row in rows_of(tmp_path)]
    assert told == [[True, True], [False, False], [False, False], [True, True]]


# ---------------------------------------------------------------- one probe, one budget, two tiers


class Spy:
    """Notes how the gauge is called, and calls it."""

    def __init__(self, patch: Any, *, seconds: float = 0.0, fails: Callable[[int], bool] = lambda i: False) -> None:
        self.calls: list[dict[str, Any]] = []
        real = CFLGauge.measure

        def measure(gauge: CFLGauge, module: Any, loss_fn: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append({"batches": list(batches), **kwargs})
            time.sleep(seconds)
            if fails(len(self.calls)):
                raise RuntimeError("no layers today")
            return real(gauge, module, loss_fn, batches, *args, **kwargs)

        patch.setattr(CFLGauge, "measure", measure)


def test_probe_and_budget_are_the_hosts(tmp_path: Path, monkeypatch: Any) -> None:
    spy = Spy(monkeypatch, seconds=0.05)
    host, monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe(samples=2)), CFLMonitor()
    fit(Line(0.01), [monitor, host], tmp_path, [PROBE, 2 * PROBE], max_epochs=2)
    assert [len(call["batches"]) for call in spy.calls] == [1] * 5
    assert all(torch.equal(call["batches"][0], PROBE) for call in spy.calls)
    schedule = host._engine.schedule
    assert schedule.predicted_cost >= 0.05  # the sleep is at least that long; the reading alone takes some 2 ms
    assert schedule.spent >= 5 * 0.05
    assert [reading.seconds < 0.05 for reading in host.readings] == [True] * 5
    assert monitor._own_host.readings == []
    assert not monitor._own_host._engine.samples.full


def test_a_dear_companion_makes_readings_rarer(tmp_path: Path, monkeypatch: Any) -> None:
    """A quarter of the time, steps of 5 ms, 0.1 s for the layers: at least 0.4 s of training between readings."""

    class Slow(Line):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            time.sleep(0.005)
            return super().training_step(batch, batch_idx)

    def square(module: Any, batch: Any) -> torch.Tensor:
        return module.net(batch).square().mean()

    Spy(monkeypatch, seconds=0.1)
    host = EdgeOfStabilityMonitor(max_overhead=0.25, loss_fn=square)
    fit(Slow(0.01), [host, CFLMonitor()], tmp_path, max_epochs=150)
    steps = [reading.step for reading in host.readings]
    assert 2 <= len(steps) <= 4
    # Steps may take longer than they sleep on a busy machine, so the bound is on the time itself.
    assert (host._engine.schedule.overhead or 1.0) <= 0.25 + 0.1 / host._engine.schedule.training_seconds


def test_exact_tier_at_every_fifth_reading_and_on_a_change_of_verdict(tmp_path: Path, monkeypatch: Any) -> None:
    spy = Spy(monkeypatch)
    rates = [0.01] * 7 + [0.25] * 2 + [0.01] * 6  # beyond the limit of 0.222 for two steps
    verdicts: list[Verdict] = []
    real = CFLMonitor.measure
    monkeypatch.setattr(CFLMonitor, "measure", lambda self, o: (verdicts.append(o.verdict), real(self, o))[1])
    fit(Line(*rates), [CFLMonitor(every_n_steps=1)], tmp_path, max_epochs=len(rates) - 1)
    assert Verdict.EDGE in verdicts
    # The verdict at the last exact reading is what a change is one of.
    expected, last = [], None
    for i, verdict in enumerate(verdicts):
        expected.append(i % 5 == 0 or verdict != last)
        last = verdict if expected[-1] else last
    assert [call["refine"] for call in spy.calls] == expected
    assert 0 < expected.count(False) < len(expected)


def test_tiers_of_the_layers(tmp_path: Path) -> None:
    fit(Deep(layered(6)), [CFLMonitor(every_n_steps=1)], tmp_path, max_epochs=4)
    methods = [sorted(layer["method"] for layer in row["layers"]) for row in rows_of(tmp_path)]
    # The first, and the next, before which the verdict has come; six layers, of which three are looked at closely.
    assert methods[:2] == [["cheap"] * 3 + ["exact"] * 3] * 2
    assert methods[2] == ["cheap"] * 6


# ---------------------------------------------------------------- crossings


def test_crossings_are_counted_and_survive_a_checkpoint(tmp_path: Path) -> None:
    low, high = 0.1, 0.3  # of 0.222
    first = CFLMonitor(every_n_steps=1)
    trainer = fit(Line(low, high, low, high, high, low), [first], tmp_path / "one", max_epochs=6)
    assert first.crossings == {"net": 2}
    told = [layers_of(row)["net"]["cfl_number"] > 1 for row in rows_of(tmp_path / "one")]
    assert told == [False, True, False, True, True, False, False]
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    json.dumps(torch.load(path, weights_only=True)["callbacks"][first.state_key])
    again, logger = CFLMonitor(every_n_steps=1), make_logger(pl)
    fit(Line(low, *[high] * 7), [again], tmp_path / "two", max_epochs=8, ckpt_path=path, logger=logger)
    assert again.crossings == {"net": 3}  # below at the end of the first run
    counts = [metrics["cfl/net/crossings"] for _, metrics in logger.rows if "cfl/net/crossings" in metrics]
    assert counts == [3.0, 3.0, 3.0]


def test_a_run_that_begins_beyond_its_limit_has_not_crossed_it(tmp_path: Path) -> None:
    monitor = CFLMonitor(every_n_steps=1)
    fit(Line(0.3), [monitor], tmp_path, max_epochs=2)
    assert monitor.crossings == {"net": 0}


# ---------------------------------------------------------------- layers of all kinds


class Zoo(nn.Module):
    """A layer used twice, one frozen, one never used, one with weight norm, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(torch.tanh(self.twice(F.silu(self.first(x)))))
        x = torch.tanh(self.normed(torch.tanh(self.frozen(x))))
        x = x.unflatten(0, (-1, 2))
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(0, 1))


def test_layers_that_cannot_be_attributed_are_told_as_such(tmp_path: Path) -> None:
    torch.manual_seed(0)
    monitor = CFLMonitor(every_n_steps=1)
    fit(Deep(Zoo()), [monitor], tmp_path, max_epochs=3)
    for row in rows_of(tmp_path):
        layers = layers_of(row)
        assert layers["net.twice"]["reason"] == "its weight is used 2 times"
        assert layers["net.twice"]["form"] == "weak"
        reasons = {name: layer["reason"] for name, layer in layers.items() if layer["method"] == "none"}
        assert "not used in this batch" in reasons.pop("net.unused")
        assert "nn.MultiheadAttention" in reasons.pop("net.attention.in_proj_weight")
        assert "nn.MultiheadAttention" in reasons.pop("net.attention.out_proj")
        assert "its weight goes into" in reasons.pop("net.normed")
        assert set(reasons) <= {"net.frozen"}
        assert layers["net.first"]["cfl_number"] > 0
    (missing,) = [line for line in monitor.report().splitlines() if line.startswith("not attributed:")]
    projections = "net.attention.in_proj_weight, net.attention.out_proj (inside"
    for name in ("net.unused (not used in this batch)", projections, "net.normed (its"):
        assert name in missing
    assert monitor.report().count("net.first") == 1


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: nn.BatchNorm1d(3), "no Linear or convolution layer"),
        (lambda: nn.Sequential(nn.Embedding(5, 3), nn.Flatten(0, 1)), "embedding"),
    ],
    ids=["no-matrix", "embedding-only"],
)
def test_a_net_without_layers_gets_one_message_and_costs_nothing(
    net: Any, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    spy = Spy(monkeypatch)
    host = EdgeOfStabilityMonitor(every_n_steps=1)
    batch = (torch.randn(8, 3), torch.zeros(8).long())
    if "Embedding" in str(net()):
        batch = (torch.arange(4)[:, None], torch.zeros(4).long())
    with pytest.warns(UserWarning, match="eos_monitor") as caught:
        trainer = fit(Deep(net()), [CFLMonitor(), host], tmp_path, [batch], max_epochs=6)
    (ours,) = [str(w.message) for w in caught if "eos_monitor" in str(w.message)]
    assert message in ours
    assert trainer.global_step == 6
    assert len(host.readings) == 7
    assert len(spy.calls) <= 1
    assert not (logs_of(tmp_path) / "cfl_readings.jsonl").exists()


def test_patterns_choose_layers(tmp_path: Path) -> None:
    monitor = CFLMonitor(every_n_steps=1, layers=["net.0", "*.6"])
    fit(Deep(layered()), [monitor], tmp_path)
    assert {name for row in rows_of(tmp_path) for name in layers_of(row)} == {"net.0", "net.6"}


def test_patterns_that_match_nothing_are_told(tmp_path: Path) -> None:
    monitor = CFLMonitor(every_n_steps=1, layers="conv*")
    with pytest.warns(UserWarning, match="eos_monitor") as caught:
        fit(Deep(layered()), [monitor], tmp_path)
    (ours,) = [str(w.message) for w in caught if "eos_monitor" in str(w.message)]
    assert "conv*" in ours
    assert "net.0, net.2, net.4, net.6" in ours


# ---------------------------------------------------------------- failures and switches


def test_failing_gauge_is_told_once_and_given_up_while_the_host_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    spy = Spy(monkeypatch, fails=lambda i: True)
    host = EdgeOfStabilityMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="eos_monitor") as caught:
        trainer = fit(Line(0.01), [host, CFLMonitor()], tmp_path, max_epochs=8)
    ours = [str(w.message) for w in caught if "eos_monitor" in str(w.message)]
    assert len(ours) == 2
    assert "no layers today" in ours[0]
    assert "stops what CFLMonitor measures" in ours[1]
    assert len(spy.calls) == 3
    assert trainer.global_step == 8
    assert len(host.readings) == 9


def test_one_failure_leaves_a_gap(tmp_path: Path, monkeypatch: Any) -> None:
    Spy(monkeypatch, fails=lambda i: i == 2)
    with pytest.warns(UserWarning, match="no layers today"):
        fit(Line(0.01), [CFLMonitor(every_n_steps=1)], tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 2, 3, 4]


def test_nothing_is_measured_where_the_host_cannot(tmp_path: Path, monkeypatch: Any) -> None:
    """A probe that fails is told once, and the run goes on."""

    def broken() -> Any:
        yield PROBE
        raise OSError("disk gone")

    class Probe:
        def __iter__(self) -> Any:
            return broken()

    spy = Spy(monkeypatch)
    host = EdgeOfStabilityMonitor(every_n_steps=1, probe=Probe())
    with pytest.warns(UserWarning, match="disk gone"):
        trainer = fit(Line(0.01), [host, CFLMonitor()], tmp_path)
    assert trainer.global_step == 4
    assert spy.calls == []


def test_nothing_is_measured_before_adam_is_warm(tmp_path: Path) -> None:
    module = Deep(layered(), lambda p: torch.optim.Adam(p, lr=0.01))
    fit(module, [CFLMonitor(every_n_steps=10)], tmp_path, max_epochs=50)
    # more than 3 / (1 − 0.9) = 30 steps
    assert [row["step"] for row in rows_of(tmp_path)] == [40, 50]


def test_optimizer_without_a_limit_still_has_curvatures(tmp_path: Path) -> None:
    module = Deep(layered(), lambda p: torch.optim.Rprop(p, lr=1e-3))
    monitor = CFLMonitor(every_n_steps=1)
    fit(module, [monitor], tmp_path)
    assert {e.cfl_number for e in monitor.estimates} == {None}
    assert all(e.curvature > 0 for e in monitor.estimates)
    assert "curvature" in monitor.report()


def test_a_run_in_which_nothing_is_attributed_says_why_and_draws_nothing(tmp_path: Path, said: list[str]) -> None:
    torch.manual_seed(0)
    monitor = CFLMonitor(every_n_steps=1, layers=["net.unused", "net.normed"])
    fit(Deep(Zoo()), [monitor], tmp_path)
    assert {e.method for e in monitor.estimates} == {"none"}
    (line,) = [line for line in said if "layer-wise readings" in line]
    assert "no layer was attributed" in line
    for estimate in monitor.estimates:
        assert f"{estimate.layer} ({estimate.reason})" in line
    assert "crossed its limit" not in line
    assert "Heat map" not in line
    assert list(tmp_path.rglob("*.png")) == []


def test_a_run_without_limits_does_not_say_that_they_held(tmp_path: Path, said: list[str]) -> None:
    fit(Deep(layered(), lambda p: torch.optim.Rprop(p, lr=1e-3)), [CFLMonitor(every_n_steps=1)], tmp_path)
    (line,) = [line for line in said if "layer-wise readings" in line]
    assert "no limit that is known" in line
    assert "crossed its limit" not in line
    assert "Heat map" in line


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_switched_off_does_nothing(how: str, tmp_path: Path, monkeypatch: Any) -> None:
    if how == "environment":
        monkeypatch.setenv("EOS_MONITOR", "off")
    monitor = CFLMonitor(every_n_steps=1, enabled=how == "environment")
    fit(Line(0.1), [monitor], tmp_path)
    assert monitor.estimates == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("off", ["host", "companion"])
def test_each_can_be_switched_off_alone(off: str, tmp_path: Path) -> None:
    host = EdgeOfStabilityMonitor(every_n_steps=1, enabled=off != "host")
    monitor = CFLMonitor(every_n_steps=2, enabled=off != "companion")
    fit(Line(0.1), [host, monitor], tmp_path)
    assert len(host.readings) == (0 if off == "host" else 5)
    assert (logs_of(tmp_path) / "cfl_readings.jsonl").exists() == (off == "host")


def test_host_forgets_a_companion_that_is_not_attached_any_more(tmp_path: Path) -> None:
    host, monitor = EdgeOfStabilityMonitor(every_n_steps=1), CFLMonitor()
    fit(Line(0.1), [host, monitor], tmp_path)
    fit(Line(0.1), [host], tmp_path)
    assert list(logs_of(tmp_path).glob("cfl_*")) == []
    fit(Line(0.1), [host, monitor], tmp_path)
    assert len({row["run"] for row in rows_of(tmp_path)}) == 1


def test_synchronized_batch_norm_is_refused() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2))
    trainer = SimpleNamespace(lightning_module=module, world_size=2, is_global_zero=True, optimizers=[])
    monitor = CFLMonitor()
    with pytest.warns(UserWarning, match="Synchronized batch normalization needs every process"):
        monitor.turn_off_if_synchronized(trainer)
    Observers([monitor]).measure(SimpleNamespace(trainer=trainer))  # type: ignore[arg-type]
    assert monitor.estimates == []


def test_monitor_can_be_pickled_for_spawned_processes(tmp_path: Path) -> None:
    monitor = pickle.loads(pickle.dumps(CFLMonitor(every_n_steps=2, layers="n*")))
    fit(Line(0.1), [monitor], tmp_path)
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 2, 4]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"probes": 0}, "probes.*got 0"),
        ({"every_n_steps": 0}, "every_n_steps.*got 0"),
        ({"max_overhead": 2.0}, "max_overhead.*got 2.0"),
        ({"name": "a/b"}, "name.*got 'a/b'"),
        ({"verify": "never"}, "verify.*got 'never'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_told_at_once(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFLMonitor(**kwargs)


# ---------------------------------------------------------------- the table in the log


@pytest.mark.parametrize("attached", ["alone", "second"])
def test_ranked_table_when_the_verdict_goes_beyond_the_edge(attached: str, tmp_path: Path, said: list[str]) -> None:
    """A loss that is not finite, between two readings: the last one tells where it came from."""

    class Breaking(Deep):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (float("nan") if self.trainer.global_step == 5 else 1.0)

    callbacks = ATTACHED[attached]({"every_n_steps": 3})
    with pytest.warns(UserWarning, match="could not take a reading"):  # nothing is left to measure
        fit(Breaking(layered()), callbacks, tmp_path, max_epochs=8)
    (table,) = [line for line in said if "Layers by their own limits" in line]
    head, *lines = table.splitlines()
    assert "DIVERGING since step 5" in head
    assert "as of step 3; the whole net at 0.0" in head
    assert len(lines) == 4
    numbers = [float(line.split(" at ")[1].split()[0]) for line in lines]
    assert numbers == sorted(numbers, reverse=True)


def test_table_of_a_restrained_run_has_exact_numbers(tmp_path: Path, said: list[str], monkeypatch: Any) -> None:
    """The reading that makes the verdict is one of the cheap ones; the next, after a change, is not."""
    states = {3: Verdict.RESTRAINED, 4: Verdict.RESTRAINED}
    # Which runs are restrained is the detector's matter, not this monitor's.
    real = Engine.add_step

    def update(engine: Engine, step: int, **inputs: Any) -> Verdict:
        before = engine.detector.verdict
        real(engine, step, **inputs)
        engine.detector.verdict = states.get(step, Verdict.STABLE)
        if engine.detector.verdict != before:
            engine.changed(Change(step, engine.detector.verdict, before, None, "as told"))
        return engine.detector.verdict

    monkeypatch.setattr(Engine, "add_step", update)
    fit(Deep(layered(6)), [CFLMonitor(every_n_steps=1)], tmp_path, max_epochs=5)
    (table,) = [line for line in said if "Layers by their own limits" in line]
    assert "RESTRAINED since step 3. " in table
    assert "as of step 4" in table
    assert table.count("exact") == 3


# ---------------------------------------------------------------- two processes


def launch(attached: str, fault: str, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    run_script(cfl_run.__file__, attached, fault, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "fails"])
def test_the_first_of_two_processes_measures_and_writes(fault: str, tmp_path: Path) -> None:
    """Also where it fails: that is no matter of the other's, which waits in the next step's reduction alone."""
    without, found = launch("without", fault, tmp_path / "without"), launch("with", fault, tmp_path / "with")
    for before, after in zip(without, found, strict=True):
        assert differences(before["compared"], after["compared"]) == []
    assert found[0]["readings"] == found[1]["readings"] == [2, 4, 6, 8, 10, 12]
    assert found[0]["steps"] == (found[0]["readings"] if fault == "none" else [])
    assert sorted(found[0]["layers"]) == (["net.0", "net.3"] if fault == "none" else [])
    assert (found[1]["steps"], found[1]["layers"]) == ([], [])
    assert (tmp_path / "with" / "rows" / "version_0" / "cfl_layers.png").exists() == (fault == "none")
