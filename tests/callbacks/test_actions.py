"""What a monitor does about instabilities: nothing in a dry run, only what it says otherwise, and back by one call."""

import json
import math
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from eos_monitor import EdgeOfStabilityMonitor, JSONLinesSink, Probe, StabilityActions, Verdict, WebhookSink
from eos_monitor.callbacks.rate_factors import RateFactors
from eos_monitor.callbacks.snapshots import Snapshot, Snapshots
from eos_monitor.forecast.lr_governor import LrGovernor
from eos_monitor.monitor.rows import append_jsonl
from tests.callbacks.runs import NAMESPACES, Case, differences, logs_of, mlp, run

ALL = ("stop", "checkpoint", "cap-lr", "restore")
SHARP = 4.0  # largest curvature of the quadratic: gradient descent has its edge at lr 0.5


class Quadratic(pl.LightningModule):
    """½ Σ h x², with a schedule that multiplies the learning rate 0.1 by 10 at step 20."""

    def __init__(self, at: int = 20, factor: float = 10.0, lr: float = 0.1) -> None:
        super().__init__()
        self.at, self.factor, self.lr = at, factor, lr
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.register_buffer("h", torch.tensor([SHARP, 1.0], dtype=torch.float64))
        self.used: list[float] = []
        self.scheduled: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0.5 * (self.h * self.x.square()).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        # What the update uses can be seen from it: Δx = −lr h x.
        before: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(lambda *args: before.append(self.x.detach().clone()))
        optimizer.register_step_post_hook(
            lambda *args: self.used.append(float((before[-1] - self.x.detach())[1] / before[-1][1]))
        )
        jump = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: self.factor if t >= self.at else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": jump, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.scheduled.append(self.optimizers().param_groups[0]["lr"])


def fit(folder: Path, module: Any, steps: int = 40, ckpt_path: Any = None, trainer: Any = None, **settings: Any) -> Any:
    monitor = EdgeOfStabilityMonitor(5, probe=Probe(samples=1, full_batch=True), alerts=())
    acting = StabilityActions(**settings)
    runs = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=[monitor, acting],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **(trainer or {}),
    )
    runs.fit(module, torch.utils.data.DataLoader(torch.zeros(1, 1)), ckpt_path=ckpt_path)
    return monitor, acting, runs


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (logs_of(folder) / "eos_actions.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the cap


def test_cap_holds_from_the_very_step_and_schedulers_never_see_it(tmp_path: Path) -> None:
    module = Quadratic(factor=9.0)
    monitor, acting, trainer = fit(tmp_path, module, what=("cap-lr",), dry_run=False, edge_target=0.8)
    # The jump leads to r = 0.9 · 4 / 2 = 1.8; the line for a jump of gradient descent is 2.3: nothing to do.
    assert acting.done == []
    assert module.used == pytest.approx([0.1] * 20 + [0.9] * 20, rel=1e-9)
    module = Quadratic(factor=20.0)
    monitor, acting, trainer = fit(tmp_path, module, what=("cap-lr",), dry_run=False, edge_target=0.8)
    # r = 0.8 is lr 0.4 on this quadratic. The reading is good to a hundredth.
    assert module.used == pytest.approx([0.1] * 20 + [0.4] * 20, rel=0.02)
    assert module.scheduled == pytest.approx([0.1] * 19 + [2.0] * 21, rel=1e-12)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 2.0
    [action] = acting.done
    assert (action["step"], action["action"], action["dry_run"]) == (20, "cap-lr", False)
    assert action["lr"] == [2.0]
    assert action["to"] == pytest.approx([0.4], rel=0.02)
    assert "lowered lr 2 → 0.4" in action["message"]
    assert rows_of(tmp_path) == [action]
    assert monitor.readings[-2].lr == pytest.approx((0.4,), rel=0.02)  # what was in effect
    assert max(r.edge_ratio for r in monitor.readings) < 0.82


def test_release_gives_the_rates_back(tmp_path: Path) -> None:
    class Release(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 30:
                next(c for c in trainer.callbacks if isinstance(c, StabilityActions)).release()

    module = Quadratic(factor=20.0)
    monitor = EdgeOfStabilityMonitor(5, probe=Probe(samples=1, full_batch=True))
    acting = StabilityActions("cap-lr", dry_run=False)
    settings = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_steps=40,
        logger=False,
        accelerator="cpu",
        callbacks=[Release(), monitor, acting],
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(40, 1)))
    assert max(module.used[20:30]) < 0.6
    assert module.used[30:] == pytest.approx([2.0] * 10, rel=1e-9)


def test_resume_in_the_middle_of_a_cooldown(tmp_path: Path) -> None:
    """30 steps of cooldown from step 20 on; the run is ended at 35 and goes on from its checkpoint."""
    settings = {"what": ("cap-lr",), "dry_run": False, "edge_target": 0.8, "cooldown": 30}
    whole = Quadratic(factor=20.0)
    fit(tmp_path / "whole", whole, 90, **settings)
    first, second = Quadratic(factor=20.0), Quadratic(factor=20.0)
    _, _, trainer = fit(tmp_path / "first", first, 35, **settings)
    trainer.save_checkpoint(tmp_path / "at35.ckpt")
    monitor, acting, _ = fit(tmp_path / "second", second, 90, ckpt_path=tmp_path / "at35.ckpt", **settings)
    assert len(acting.done) == 1  # that of the first part
    # Each reading is good to a hundredth, and the first after a resume is a cold one.
    assert first.used + second.used == pytest.approx(whole.used, rel=0.02)
    assert whole.used[49] == pytest.approx(0.4, rel=0.02)


def reading_of(ratio: float, lr: tuple[float, ...], shares: tuple[float, ...], params: list[Any]) -> Any:
    """A measurement of gradient descent in full batches, whose mode has these shares."""
    c = torch.cat([torch.full((p.numel(),), 2 / rate, dtype=torch.float64) for p, rate in zip(params, lr, strict=True)])
    mode = torch.cat(
        [
            torch.full((p.numel(),), math.sqrt(s / p.numel()), dtype=torch.float64)
            for p, s in zip(params, shares, strict=True)
        ]
    )
    reading = SimpleNamespace(edge_ratio=ratio, lr=lr, converged=True, full_batch=True)
    curvature = SimpleNamespace(c=c, params=params)
    return SimpleNamespace(reading=reading, mode=mode / c.sqrt(), curvature=curvature)


def two_groups() -> tuple[list[Any], list[Any]]:
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    return params, [torch.optim.SGD([{"params": [p]} for p in params], lr=0.1)]


def test_only_the_group_that_jumped_is_capped() -> None:
    params, optimizers = two_groups()
    governor = LrGovernor(target=1.0)
    governor.measured(reading_of(0.5, (0.1, 0.1), (0.9, 0.1), params), optimizers)
    assert governor.decide(0, (0.1, 0.1)) is None
    cap = governor.decide(1, (2.0, 0.1))
    assert cap is not None
    assert cap.groups == (0,)
    # 0.5 / (0.9 · 0.1 / lr + 0.1) = 1 at lr = 0.09 / 0.4
    assert cap.after == pytest.approx((0.225, 0.1), rel=1e-9)
    assert governor.factors[1] == 1.0


def test_cap_waits_then_doubles_and_is_gone_at_the_schedule() -> None:
    params, optimizers = two_groups()
    governor = LrGovernor(target=1.0, cooldown=10)
    governor.measured(reading_of(0.5, (0.1, 0.1), (0.5, 0.5), params), optimizers)
    governor.decide(0, (0.1, 0.1))
    used = []
    for step in range(1, 61):
        if step == 2:  # the curvature has fallen to a hundredth
            governor.measured(reading_of(0.005, (0.1, 0.1), (0.5, 0.5), params), optimizers)
        governor.decide(step, (1.0, 1.0))
        used.append(governor.factors[0])
    assert used[:10] == pytest.approx([0.2] * 10)  # 0.5 · 10 is five times the target
    assert used[10:33] == pytest.approx([0.2 * 2 ** ((i + 1) / 10) for i in range(23)])
    assert used[34:] == [1.0] * 26
    assert governor.caps == (None, None)


def test_governor_goes_on_from_its_state() -> None:
    params, optimizers = two_groups()
    one, other = LrGovernor(target=1.0, cooldown=10), LrGovernor(target=1.0, cooldown=10)
    for step in range(6):
        one.measured(reading_of(0.5, (0.1, 0.1), (0.5, 0.5), params), optimizers)
        one.decide(step, (0.1 if step < 3 else 1.0,) * 2)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(6, 40):
        for governor in (one, other):
            governor.measured(reading_of(0.02, (0.1, 0.1), (0.5, 0.5), params), optimizers)
            governor.decide(step, (1.0, 1.0))
        assert one.factors == other.factors


def test_caps_stay_with_their_groups_when_one_is_added() -> None:
    """Two optimizers: a group that is added to the first moves those of the second on."""
    params, _ = two_groups()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in params]
    governor = LrGovernor(target=1.0, cooldown=100)
    governor.measured(reading_of(0.5, (0.1, 0.1), (0.1, 0.9), params), optimizers)
    governor.decide(0, (0.1, 0.1), places=((0, 0), (1, 0)))
    governor.decide(1, (0.1, 2.0), places=((0, 0), (1, 0)))
    # 0.5 / (0.1 + 0.9 · 0.1 / lr) = 1 at lr = 0.09 / 0.4
    assert governor.factors == pytest.approx((1.0, 0.225 / 2.0), rel=1e-9)
    wider = ((0, 0), (0, 1), (1, 0))
    other = LrGovernor(target=1.0, cooldown=100)
    other.load_state_dict(json.loads(json.dumps(governor.state_dict())))
    for one in (governor, other):
        one.decide(2, (0.1, 0.3, 2.0), places=wider)
        assert one.factors == pytest.approx((1.0, 1.0, 0.225 / 2.0), rel=1e-9)
        one.decide(3, (0.1, 2.0), places=((0, 0), (1, 0)))  # and when it goes
        assert one.factors == pytest.approx((1.0, 0.225 / 2.0), rel=1e-9)


def test_lowered_rates_go_back_to_the_caps_of_their_groups() -> None:
    params, optimizers = two_groups()
    governor = LrGovernor(target=1.0, cooldown=100)
    governor.measured(reading_of(0.5, (0.1, 0.1), (0.9, 0.1), params), optimizers)
    governor.decide(0, (0.1, 0.1))
    governor.decide(1, (2.0, 0.1))
    kept = governor.caps_by_place
    governor.decide(2, (2.0, 0.1, 0.3))
    cap = governor.lower(3, (2.0, 0.1, 0.3), kept)
    # All at half of the least factor, 0.225 / 2, at most: no ratio is known of three groups.
    assert cap.after == pytest.approx([0.5 * 0.1125 * rate for rate in (2.0, 0.1, 0.3)], rel=1e-9)
    assert governor.caps == pytest.approx((0.1125, 1.0, 1.0), rel=1e-9)


class Scaled(Quadratic):
    """The same in ``"16-mixed"``: the update comes after the closure, where a scaler allows it."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx).float()


@pytest.mark.parametrize("scale", [2.0**4, 2.0**127], ids=["all-steps", "some-skipped"])
def test_a_cap_holds_under_a_gradient_scaler(scale: float, tmp_path: Path) -> None:
    module = Scaled(at=20, factor=120.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    settings = {"what": "cap-lr", "dry_run": False, "edge_target": 0.8}
    _, acting, _ = fit(tmp_path, module, trainer={"plugins": [precision]}, **settings)
    [row] = [row for row in acting.done if row["action"] == "cap-lr"]
    capped = module.used[-1]
    # lr · 4 / 2 ≤ the edge, at the rate that the update itself shows; 12 would multiply x by −47 a step
    assert max(module.used) * SHARP / 2 <= 1.0
    assert row["to"][0] * SHARP / 2 <= 1.0
    assert capped == pytest.approx(12.0 * acting.factors[0], rel=1e-6)
    assert float(module.x.detach().abs().max()) < 1.0
    assert acting.guard.off == {}


def test_a_cap_outlives_a_group_that_is_added(tmp_path: Path) -> None:
    class Grows(Quadratic):
        """One more trained parameter, ten steps after the jump."""

        def __init__(self) -> None:
            super().__init__(at=20, factor=120.0)
            self.y = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + 1e-3 * self.y.square().sum()

        def configure_optimizers(self) -> Any:
            found = super().configure_optimizers()
            found["optimizer"].param_groups[0]["params"] = [self.x]
            return found

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step == 30:
                self.y.requires_grad_(True)
                optimizer = self.optimizers().optimizer
                optimizer.add_param_group({"params": [self.y], "lr": 0.01, "initial_lr": 0.01})
                self.lr_schedulers().base_lrs.append(0.01 / 120.0)
                self.lr_schedulers().lr_lambdas.append(self.lr_schedulers().lr_lambdas[0])

    module = Grows()
    _, acting, _ = fit(tmp_path, module, steps=45, what="cap-lr", dry_run=False, edge_target=0.8)
    assert len(acting.factors) == 2
    assert acting.guard.off == {}
    assert acting.factors[0] < 0.2
    assert max(module.used) * SHARP / 2 <= 1.0
    assert float(module.x.detach().abs().max()) < 1.0


def test_a_step_that_was_not_announced_is_seen() -> None:
    rates = RateFactors()
    optimizer = torch.optim.SGD(mlp().parameters(), lr=0.1)
    rates.attach([optimizer])
    rates.factors = (0.5,)
    rates.now(optimizer)
    optimizer.step()
    assert not rates.missed
    optimizer.step()
    assert rates.missed


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"what": ()}, "actions"),
        ({"what": ("lower",)}, "actions"),
        ({"edge_target": 0.0}, "edge ratio"),
        ({"lr_floor": 0.0}, "smallest factor"),
        ({"cooldown": 0}, "cooldown"),
        ({"snapshot_every": 0}, "snapshots"),
    ],
)
def test_arguments_out_of_range_are_named(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        StabilityActions(**{"what": "stop", **settings})


# ---------------------------------------------------------------- factors and snapshots


@pytest.mark.parametrize("scaler", [False, True], ids=["inside-the-step", "before-the-step"])
def test_factors_act_inside_the_step_only(scaler: bool) -> None:
    """Against an optimizer with the product as its rate; a chained scheduler sees the plain one."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    one, other = torch.optim.Adam([p], lr=0.1), torch.optim.Adam([q], lr=0.025)
    decay = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (one, other)]
    factors = RateFactors()
    factors.attach([one])
    factors.factors = (0.25,)

    def closure() -> torch.Tensor:
        one.zero_grad()
        loss = (p**4).sum()
        loss.backward()
        if not scaler:
            assert one.param_groups[0]["lr"] == pytest.approx(rate)
            factors.now(one)
        return loss

    for _ in range(5):
        rate = one.param_groups[0]["lr"]
        if scaler:  # the backward pass, and what follows on it, is over when the step begins
            closure()
            factors.now(one)
            assert one.param_groups[0]["lr"] == rate
            one.step()
        else:
            one.step(closure)
        other.zero_grad()
        (q**4).sum().backward()
        other.step()
        for scheduler in decay:
            scheduler.step()
    # lr · factor and its decay are rounded in another order.
    assert torch.allclose(p, q, rtol=1e-6, atol=0)
    assert one.param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**5, rel=1e-12)
    with factors.applied():
        assert one.param_groups[0]["lr"] == pytest.approx(0.025 * 0.9**5, rel=1e-12)
    factors.detach()
    assert not one._optimizer_step_pre_hooks
    assert not one._optimizer_step_post_hooks


@pytest.mark.parametrize(
    "build",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.AdamW(ps, lr=0.1),
        lambda ps: torch.optim.Adam(ps, lr=0.1, amsgrad=True),
    ],
    ids=["momentum", "adamw", "amsgrad"],
)
def test_restored_run_repeats_itself_bit_by_bit(build: Any) -> None:
    torch.manual_seed(0)
    net = mlp(norm=True)
    optimizer = build(net.parameters())
    x = torch.randn(16, 8)

    def steps(n: int) -> list[torch.Tensor]:
        for _ in range(n):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        return [t.detach().clone() for t in [*net.parameters(), *net.buffers()]]

    start = Snapshot.of(0, net, [optimizer], None)
    fresh = steps(3)
    snapshot = Snapshot.of(3, net, [optimizer], None)
    once = steps(3)
    groups = optimizer.param_groups
    optimizer.param_groups[0]["lr"] = 0.1 + 0.0
    snapshot.restore(net, [optimizer])
    assert optimizer.param_groups is groups
    assert differences(once, steps(3)) == []
    start.restore(net, [optimizer])  # from before there was any state
    assert differences(fresh, steps(3)) == []


def test_the_state_from_before_is_the_one_that_is_clear_of_the_failure() -> None:
    kept = Snapshots(every=10)
    for step in range(100):
        if kept.due(step):
            kept.keep(Snapshot(step, [], [], None))
    assert [s.step for s in kept._kept] == [60, 70, 80, 90]
    found = kept.before(93)
    assert found is not None
    assert found.step == 70  # 16 steps and more before
    assert kept.before(65) is not None
    assert kept.before(5) is None


# ---------------------------------------------------------------- dry runs and sinks leave no trace


def blow_up(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 6 else 1e4)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_dry_run_is_bit_identical_and_says_what_it_would_do(namespace: str, tmp_path: Path) -> None:
    case = Case(scheduler=blow_up, trainer={"max_epochs": 6})
    without = run(namespace, case, tmp_path / "without", lambda pl: None)
    dry = run(
        namespace,
        case,
        tmp_path / "with",
        lambda pl: [EdgeOfStabilityMonitor(2, probe=Probe(samples=16), alerts=()), StabilityActions(ALL)],
    )
    assert differences(without["compared"], dry["compared"]) == []
    done = dry["callback"][1].done
    assert {row["action"] for row in done} >= {"cap-lr", "checkpoint"}
    assert all(row["dry_run"] and "would have" in row["message"] for row in done)
    assert not list((tmp_path / "with").rglob("*.ckpt"))


class _Hang(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.server.over.wait(60)  # type: ignore[attr-defined]


class _Broken(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(60)
        self.request.recv(65536)
        self.request.sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.fixture
def servers() -> Iterator[Any]:
    opened = []

    def open_server(handler: Any) -> str:
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        server.over = threading.Event()  # type: ignore[attr-defined]
        server.daemon_threads = False  # closing it waits for them
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        opened.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/hook"

    def close() -> None:
        for server in opened:
            server.over.set()
            server.shutdown()
            server.server_close()
        opened.clear()

    yield SimpleNamespace(open=open_server, close=close)
    close()


@pytest.mark.parametrize("fault", ["raises", "hangs", "status-500", "full-disk"])
def test_sinks_that_fail_leave_the_run_identical(fault: str, tmp_path: Path, servers: Any) -> None:
    def refuse(alert: Any) -> None:
        raise RuntimeError("on purpose")

    sinks: dict[str, Any] = {
        "raises": lambda: refuse,
        "hangs": lambda: WebhookSink(servers.open(_Hang), timeout=60.0, retries=0),
        "status-500": lambda: WebhookSink(servers.open(_Broken), retries=1),
        "full-disk": lambda: JSONLinesSink(Path("/dev/full")),
    }
    if fault == "full-disk" and not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    sink = sinks[fault]()
    told: list[Any] = []
    case = Case(scheduler=blow_up, trainer={"max_epochs": 4})
    without = run(NAMESPACES[1], case, tmp_path / "without", lambda pl: None)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda message, *args, **kwargs: told.append(str(message)))
        dry = run(
            NAMESPACES[1],
            case,
            tmp_path / "with",
            lambda pl: [
                EdgeOfStabilityMonitor(2, probe=Probe(samples=16), alerts=(sink,), alert_cooldown=0.0),
                StabilityActions(ALL),
            ],
        )
    assert differences(without["compared"], dry["compared"]) == []
    assert time.monotonic() - began < 30  # less than the receiver hangs
    assert dry["callback"][1].done
    failed = [message for message in told if "an output (sink) failed" in message]
    assert len(failed) == (1 if fault in ("raises", "full-disk") else 0)  # told once; the others are another thread's
    if fault == "status-500":
        assert sink.flush(20)
        assert sink.last_error == "HTTP 500"
    servers.close()  # whoever hangs is let go
    if isinstance(sink, WebhookSink):
        assert sink.flush(20)


# ---------------------------------------------------------------- after a failure


def test_restore_goes_back_and_on_at_a_lower_rate(tmp_path: Path) -> None:
    """An unstable rate from the start: found by its losses, after a time; without readings in between."""
    module = Quadratic(factor=1.0, lr=0.6)  # r = 1.2: grows by 1.4 a step
    monitor, acting, _ = fit(tmp_path, module, 120, what=("restore", "checkpoint"), dry_run=False)
    restored = [row for row in acting.done if row["action"] == "restore"]
    assert len(restored) == 1
    assert restored[0]["to_step"] == 0
    # The edge is at 0.5: half of 0.6 is enough.
    assert restored[0]["to"] == pytest.approx([0.3], rel=1e-9)
    at = restored[0]["step"]
    assert module.used[at:] == pytest.approx([0.3] * (120 - at), rel=1e-6)
    # x = 1 at step 0 of the state that it went back to, and contracts by 1 − 0.3 · 4 and 1 − 0.3 from there.
    n = 120 - at
    assert module.x.detach().abs().tolist() == pytest.approx([0.2**n, 0.7**n], rel=1e-6)
    assert monitor.verdict is not Verdict.DIVERGING
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == [f"eos_diverging_step{at}.ckpt"]
    state = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)
    assert state["global_step"] == at


def test_stop_ends_a_run_that_diverges(tmp_path: Path) -> None:
    monitor, acting, trainer = fit(tmp_path, Quadratic(factor=1.0, lr=0.6), 500, what=("stop",), dry_run=False)
    assert monitor.verdict is Verdict.DIVERGING
    assert acting.done[-1]["action"] == "stop"
    assert trainer.global_step == acting.done[-1]["step"] + 1


def test_restore_stops_at_its_floor(tmp_path: Path) -> None:
    settings = {"what": ("restore", "stop"), "dry_run": False, "lr_floor": 0.9}
    monitor, acting, trainer = fit(tmp_path, Quadratic(factor=1.0, lr=0.6), 500, **settings)
    assert [row["action"] for row in acting.done] == ["restore", "restore", "stop"]
    assert "at their floor" in acting.done[1]["message"]
    assert trainer.global_step < 500


def test_rows_hold_plain_values_only(tmp_path: Path) -> None:
    monitor, acting, _ = fit(tmp_path, Quadratic(factor=20.0), what=ALL)
    for row in acting.done:
        append_jsonl(tmp_path / "again.jsonl", row)
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").read_text().splitlines()] == acting.done


# ---------------------------------------------------------------- a callback of its own


def test_without_a_monitor_it_brings_one_that_writes_nothing(tmp_path: Path) -> None:
    module = Quadratic(factor=20.0)
    acting = StabilityActions("cap-lr", dry_run=False, edge_target=0.8)
    acting._own_host._engine.schedule.every_n_steps = 5  # the runs here are too short for a budget of time
    trainer = pl.Trainer(
        max_steps=40,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        callbacks=[acting],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(1, 1)))
    assert [row["action"] for row in acting.done] == ["cap-lr"]
    assert module.used == pytest.approx([0.1] * 20 + [0.4] * 20, rel=0.02)
    assert rows_of(tmp_path) == acting.done
    assert {path.name for path in logs_of(tmp_path).iterdir()} == {"eos_actions.jsonl"}


def test_a_monitor_alone_has_no_means_of_changing_a_run() -> None:
    """Nothing that a monitor holds puts factors on learning rates, keeps states to go back to, or stops a run."""
    monitor = EdgeOfStabilityMonitor()
    assert not {"actions", "release"} & set(dir(monitor))
    seen, queue = set(), [monitor]
    while queue:
        value = queue.pop()
        if id(value) not in seen and hasattr(value, "__dict__"):
            seen.add(id(value))
            assert not isinstance(value, (RateFactors, Snapshots, LrGovernor))
            queue += [item for item in vars(value).values() if "eos_monitor" in type(item).__module__]
    assert len(seen) > 8
