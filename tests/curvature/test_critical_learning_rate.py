"""The critical learning rate, against closed forms, dense scans along the step, and steps of the real optimizers."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eos_monitor.curvature.critical_learning_rate import critical_learning_rate
from eos_monitor.curvature.directional import directional_ratio
from eos_monitor.isolation.fingerprint import fingerprint
from tests.nets import Problem, make, mean_loss

Build = Callable[[Any], torch.optim.Optimizer]
SCALES = [1e-3, 1e-2, 0.1, 0.5, 0.99, 1.0, 1.3, 10.0, 1e2, 1e3]


def groups(cls: Any, **settings: Any) -> Build:
    """Two groups, the second at a third of the learning rate."""

    def build(params: Any) -> torch.optim.Optimizer:
        first, second = params
        lr = settings["lr"]
        return cls([{"params": [first]}, {"params": [second], "lr": lr / 3}], **settings)

    return build


def single(cls: Any, **settings: Any) -> Build:
    return lambda params: cls(list(params), **settings)


BUILDERS: dict[str, Build] = {
    "sgd": single(torch.optim.SGD, lr=1.0),
    "heavy-ball-decay": single(torch.optim.SGD, lr=1.0, momentum=0.9, weight_decay=0.1),
    "nesterov-groups": groups(torch.optim.SGD, lr=1.0, momentum=0.9, nesterov=True),
    "adam-groups": groups(torch.optim.Adam, lr=1.0),
    "rmsprop": single(torch.optim.RMSprop, lr=1.0),
    "muon": single(torch.optim.Muon, lr=1.0, weight_decay=0.0),
}


class Regression(nn.Module):
    """Two factors apart, each linear: ½ mean ‖X A + Z B − Y‖², a quadratic of (A, B)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(2, 3))

    def forward(self, batch: Any) -> Tensor:
        x, z, y = batch
        return 0.5 * (x @ self.a + z @ self.b - y).square().mean()


def loss_of(module: Any, batch: Any) -> Tensor:
    return module(batch)


def stepped_regression(build: Build, dtype: torch.dtype, seed: int) -> tuple[Any, list[Any], torch.optim.Optimizer]:
    g = torch.Generator().manual_seed(seed)
    module = Regression().to(dtype)
    x = torch.randn(20, 4, generator=g) * torch.tensor([5.0, 2.0, 1.0, 0.3])
    batch = tuple(t.to(dtype) for t in (x, torch.randn(20, 2, generator=g), torch.randn(20, 3, generator=g)))
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    optimizer = build(module.parameters())
    for p in module.parameters():  # a state to start from, whose momentum does not point uphill
        p.grad = torch.autograd.grad(module(batch), p)[0]
    kept = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    with torch.no_grad():
        for p, before in zip(module.parameters(), kept, strict=True):
            p.copy_(before)
            p.grad = None
    return module, [batch], optimizer


def real_step(module: Any, batches: list[Any], optimizer: Any, factor: float) -> tuple[Tensor, Tensor, Any]:
    """Gradient and update of a step of a copy, all learning rates times ``factor``, and the copy after it."""
    module, optimizer = copy.deepcopy((module, optimizer))
    for group in optimizer.param_groups:
        group["lr"] *= factor
    before = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    optimizer.zero_grad()
    loss_of(module, batches[0]).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in module.parameters()])
    optimizer.step()
    return gradient, torch.cat([p.detach().reshape(-1) for p in module.parameters()]) - before, module


def closed_form(module: Any, batches: list[Any], optimizer: Any) -> float:
    """−2 (g + Wθ)ᵀu / uᵀ(H + W)u in double precision, u as computed by the optimizer."""
    _, update, _ = real_step(module, batches, optimizer, 1.0)
    wide = copy.deepcopy(module).double()
    batch = tuple(t.double() for t in batches[0])
    decay = optimizer.param_groups[0].get("weight_decay", 0.0)
    theta, shapes = [p.detach() for p in wide.parameters()], [p.shape for p in wide.parameters()]

    def loss(flat: Tensor) -> Tensor:
        a, b = (part.view(s) for part, s in zip(flat.split([12, 6]), shapes, strict=True))
        return 0.5 * (batch[0] @ a + batch[1] @ b - batch[2]).square().mean() + 0.5 * decay * flat @ flat

    point, u = torch.cat([t.reshape(-1) for t in theta]), update.double()
    slope = torch.autograd.functional.jacobian(loss, point) @ u
    return float(-2 * slope / (u @ torch.autograd.functional.hessian(loss, point) @ u))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", BUILDERS)
def test_quadratics_reach_the_closed_form_from_any_start(name: str, dtype: torch.dtype) -> None:
    for seed in range(3):
        module, batches, optimizer = stepped_regression(BUILDERS[name], dtype, seed)
        exact = closed_form(module, batches, optimizer)
        ratio = directional_ratio(module, loss_of, batches, optimizer)
        assert ratio == pytest.approx(1 / exact, rel=1e-9 if dtype == torch.float64 else 1e-3)
        for scale in SCALES:
            found = critical_learning_rate(module, loss_of, batches, optimizer, start=scale * exact)
            assert found.scale == pytest.approx(exact, rel=0.02)
            assert found.forwards <= 10
            assert found.converged
            assert found.low <= exact * (1 + 1e-3)
            assert found.high >= exact * (1 - 1e-3)  # float32 rounding, in units of the change of the loss
            assert found.ratio == 1 / found.scale
            lrs = [group["lr"] for group in optimizer.param_groups]
            assert found.lr == pytest.approx([lr * found.scale for lr in lrs])


@pytest.mark.parametrize("factor", [0.7, 0.9, 1.1, 1.4])
def test_warm_start_is_cheap(factor: float) -> None:
    module, batches, optimizer = stepped_regression(BUILDERS["sgd"], torch.float32, 0)
    exact = closed_form(module, batches, optimizer)
    found = critical_learning_rate(module, loss_of, batches, optimizer, start=factor * exact, rtol=0.1)
    assert found.scale == pytest.approx(exact, rel=0.1)
    assert found.forwards <= 5


STOCK: dict[str, Build] = {
    **BUILDERS,
    "adamw": single(torch.optim.AdamW, lr=1.0, weight_decay=0.0),
    "amsgrad": single(torch.optim.Adam, lr=1.0, amsgrad=True),
    "adagrad": single(torch.optim.Adagrad, lr=1.0),
    "adadelta": single(torch.optim.Adadelta, lr=100.0),
    "adamax": single(torch.optim.Adamax, lr=1.0),
    "nadam": single(torch.optim.NAdam, lr=1.0),
    "radam": single(torch.optim.RAdam, lr=1.0),
    "rmsprop-centered": single(torch.optim.RMSprop, lr=1.0, centered=True, momentum=0.5),
}


@pytest.mark.parametrize("name", STOCK)
def test_the_real_step_lowers_the_loss_below_and_raises_it_above(name: str) -> None:
    module, batches, optimizer = stepped_regression(STOCK[name], torch.float64, 1)
    found = critical_learning_rate(module, loss_of, batches, optimizer)
    assert found.converged
    decay = optimizer.param_groups[0].get("weight_decay", 0.0)

    def seen(net: Any) -> float:
        return float(net(batches[0]) + 0.5 * decay * sum(p.square().sum() for p in net.parameters()))

    with torch.no_grad():
        start = seen(module)
    for factor, rises in ((0.97, False), (1.03, True)):
        with torch.enable_grad():
            after = real_step(module, batches, optimizer, factor * found.scale)[2].requires_grad_(False)
        assert (seen(after) > start) is rises


NETS = ["unequal-batches", "tied", "frozen", "batch-norm", "dropout", "lstm", "relu", "multi-head-attention"]


@pytest.mark.parametrize("build", [BUILDERS["sgd"], single(torch.optim.Adam, lr=0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize("name", NETS)
def test_first_crossing_of_a_dense_scan(name: str, build: Build) -> None:
    """On losses that are no parabolas; with dropout, every point of the scan has the same masks."""
    problem = make(name)
    trained = problem.trained()
    optimizer = build(trained.values())
    found = critical_learning_rate(problem.module, problem.loss_fn, problem.batches, optimizer)
    assert found.converged
    assert found.scale is not None
    for s, rises in ((found.low, False), (found.high, True)):
        assert (scanned(problem, optimizer, s) > 0.0) is rises
    # Nothing crosses before: every point of a scan below the bracket is lower than the start.
    assert all(scanned(problem, optimizer, found.low * i / 60) < 0.0 for i in range(1, 60))
    assert found.high / found.low <= 1 / (1 - 0.02) + 1e-9


def scanned(problem: Problem, optimizer: torch.optim.Optimizer, scale: float) -> float:
    """Rise of the mean loss at ``scale`` times a first step, which is plain: −lr g, or −lr sign(g) for Adam."""
    trained = problem.trained()
    lr = optimizer.param_groups[0]["lr"]
    with torch.random.fork_rng():
        start = mean_loss(problem, trained)
        grads = torch.autograd.grad(start, list(trained.values()))
        adam = isinstance(optimizer, torch.optim.Adam)
        steps = [-lr * (g / (g.abs() + 1e-8) if adam else g) for g in grads]
        end = {k: p.detach() + scale * u for (k, p), u in zip(trained.items(), steps, strict=True)}
        return float((mean_loss(problem, end) - start).detach())


class Barrier(nn.Module):
    """A parabola that ends at a wall: beyond it the loss is not a number, or infinite."""

    def __init__(self, wall: float, beyond: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        self.wall, self.beyond = wall, beyond

    def forward(self, batch: Any) -> Tensor:
        inside = self.x.square().mean()
        return inside if float(self.x.detach()) > self.wall else inside * self.beyond


@pytest.mark.parametrize("beyond", [math.nan, math.inf])
@pytest.mark.parametrize("start", [1e-2, 1.0, 1e3])
def test_a_loss_that_is_no_number_is_an_increase(beyond: float, start: float) -> None:
    # A step of −0.1 · 2x from 1 meets the wall at 0.4 with factor 3, before the parabola's own 10.
    net = Barrier(0.4, beyond)
    found = critical_learning_rate(
        net, loss_of, [torch.zeros(1)], torch.optim.SGD(net.parameters(), lr=0.1), start=start
    )
    assert found.converged
    assert found.low < 3.0 <= found.high
    assert found.scale == pytest.approx(3.0, rel=0.02)


def test_wall_beyond_the_crossing_does_not_matter() -> None:
    net = Barrier(-2.0, math.nan)
    found = critical_learning_rate(net, loss_of, [torch.zeros(1)], torch.optim.SGD(net.parameters(), lr=100.0))
    assert found.converged
    assert found.scale == pytest.approx(0.01, rel=0.02)


def test_unbounded_descent_has_no_critical_learning_rate() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    loss = lambda m, x: m(x).mean()  # noqa: E731
    sgd = torch.optim.SGD(net.parameters(), lr=1.0)
    found = critical_learning_rate(net, loss, [torch.ones(2, 1).double()], sgd, max_forwards=8)
    assert (found.scale, found.lr, found.ratio, found.error, found.converged) == (None, None, None, None, False)
    assert (found.high, found.forwards) == (math.inf, 8)
    assert found.low == 4.0**6  # one forward is the start's, the first factor is 1


@pytest.mark.parametrize("start", [1e-2, 1.0, 1e2])
def test_change_below_rounding_is_not_converged(start: float) -> None:
    """Lowest at 1e-3 below a loss of 1e5: float32 has steps of 8e-3 there."""
    net = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.03)
    loss = lambda m, x: 1e5 + m(x).square().mean()  # noqa: E731
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    found = critical_learning_rate(net, loss, [torch.ones(1, 1)], sgd, start=start)
    assert not found.converged
    assert found.scale is None


def test_uphill_step_has_none() -> None:
    module, batches, optimizer = stepped_regression(BUILDERS["sgd"], torch.float64, 0)
    gradient, _, _ = real_step(module, batches, optimizer, 1.0)
    found = critical_learning_rate(module, loss_of, batches, optimizer, update=gradient)
    assert (found.scale, found.low, found.forwards, found.gradients) == (None, 0.0, 0, 1)


@pytest.mark.parametrize("name", ["batch-norm", "dropout"])
def test_nothing_changes(name: str) -> None:
    problem = make(name)
    optimizer = torch.optim.Adam(problem.module.parameters(), lr=0.01)
    for p in problem.module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = fingerprint(problem.module, [optimizer], also={"batches": problem.batches})
    critical_learning_rate(problem.module, problem.loss_fn, problem.batches, optimizer)
    assert before.changes(fingerprint(problem.module, [optimizer], also={"batches": problem.batches})) == []


def test_losses_are_counted() -> None:
    calls = []
    module, batches, optimizer = stepped_regression(BUILDERS["sgd"], torch.float64, 0)

    def loss(m: Any, batch: Any) -> Tensor:
        value = m(batch)
        calls.append(value.requires_grad)
        return value

    found = critical_learning_rate(module, loss, batches, optimizer, start=0.01)
    assert calls == [True] + [False] * found.forwards  # only the gradient has a graph


def test_wrong_arguments_are_errors() -> None:
    module, batches, optimizer = stepped_regression(BUILDERS["sgd"], torch.float64, 0)

    def call(loss: Any = loss_of, given: Any = batches, **arguments: Any) -> Any:
        return critical_learning_rate(module, loss, given, optimizer, **arguments)

    for start in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`start` > 0"):
            call(start=start)
    with pytest.raises(ValueError, match="`rtol` < 1"):
        call(rtol=0.0)
    with pytest.raises(ValueError, match="`max_forwards` >= 3"):
        call(max_forwards=2)
    with pytest.raises(ValueError, match="at least one batch"):
        call(given=[])
    with pytest.raises(RuntimeError, match="finite loss, got nan"):
        call(loss=lambda m, b: m(b) * math.nan)
    with pytest.raises(RuntimeError, match="scalar tensor"):
        call(loss=lambda m, b: m.a)
