"""Parameters that a loss depends on where autograd cannot see it: refused, or seen after all."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from eos_monitor import HessianOperator, Probe, StabilityProbe, estimate_cfl, measure_stability
from eos_monitor.readings.gauge import Gauge
from eos_monitor.readings.settings import Solver


class Checkpointed(nn.Module):
    """Everything but the head in an activation checkpoint: reentrant, not, or (None) in none."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Linear(12, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.body(x))
        # As transformers' enable_input_require_grads does it; nothing would train without.
        x = x.requires_grad_() if self.reentrant else x
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def loss_fn(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def data(n: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def net_of(reentrant: bool | None) -> Checkpointed:
    torch.manual_seed(0)
    return Checkpointed(reentrant)


def true_sharpness(net: nn.Module, batch: Any, loss: Callable[[Any, Any], Tensor] = loss_fn) -> float:
    """Of the dense Hessian in double precision, without a checkpoint."""
    plain: Any = copy.deepcopy(net).double()
    plain.reentrant = None
    names = [name for name, _ in plain.named_parameters()]

    def value(*params: Tensor) -> Tensor:
        with_params = lambda *args: torch.func.functional_call(plain, dict(zip(names, params, strict=True)), args)  # noqa: E731
        return loss(with_params, (batch[0].double(), batch[1]))

    blocks = torch.autograd.functional.hessian(value, tuple(p.detach() for p in plain.parameters()))
    sizes = [p.numel() for p in plain.parameters()]
    rows = [[b.reshape(m, n) for b, n in zip(row, sizes, strict=True)] for row, m in zip(blocks, sizes, strict=True)]
    return float(torch.linalg.eigvalsh(torch.cat([torch.cat(row, 1) for row in rows]))[-1])


@pytest.mark.parametrize("method", ["auto", "fd"])
def test_reentrant_checkpointing_of_all_but_the_head_is_refused(method: Any) -> None:
    """The head's block alone would be a converged reading whose check has passed, and too low."""
    net = net_of(True)
    with pytest.raises(RuntimeError, match=r"none to 4 of 6 \(body.0.weight.*CheckpointFunction.*use_reentrant=False"):
        measure_stability(net, loss_fn, [data()], SGD(net.parameters(), lr=0.1), method=method)


class Hidden(torch.autograd.Function):
    """Closes over a layer and differentiates it by itself, as reentrant checkpoints of other libraries do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            ctx.layer(x).backward(gradient)
        return gradient, None


class Detached(Checkpointed):
    """A loss_fn of the user's may call this where training calls ``body`` and ``head``."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.body(x)
        return self.head(features)


def test_any_function_that_closes_over_parameters_is_refused() -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 3)})

    def hidden(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module["head"](Hidden.apply(batch[0].requires_grad_(), module["body"])), batch[1])

    with pytest.raises(RuntimeError, match=r"body.weight, body.bias\): the path to them ends in HiddenBackward"):
        measure_stability(net, hidden, [data()], SGD(net.parameters(), lr=0.1))


@pytest.mark.parametrize("batches", [1, 3])
def test_parameters_that_training_gives_a_gradient_have_to_be_reached(batches: int) -> None:
    torch.manual_seed(0)
    net = Detached(None)
    optimizer = SGD(net.parameters(), lr=0.1)
    before = measure_stability(net, loss_fn, [data()] * batches, optimizer)
    assert any("not used by the loss" in note for note in before.notes)  # nothing is known yet of how it is trained
    F.cross_entropy(net.head(net.body(data()[0])), data()[1]).backward()
    with pytest.raises(RuntimeError, match=r"none to 4 of 6 \(body.0.weight.*training gives them a gradient"):
        measure_stability(net, loss_fn, [data()] * batches, optimizer)


def test_a_zero_gradient_is_no_training() -> None:
    torch.manual_seed(0)
    net = Detached(None)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    assert measure_stability(net, loss_fn, [data()], SGD(net.parameters(), lr=0.1)).edge_ratio is not None


class Expert(nn.Module):
    """Two heads: which one is used is in the batch, or drawn."""

    def __init__(self, drawn: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.drawn = drawn

    def forward(self, x: Tensor) -> Tensor:
        which = int(torch.rand(()) < 0.5) if self.drawn else int(x[0, 0] > 0)
        return self.heads[which](x)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_layer_that_some_batch_or_some_draw_reaches_is_no_error(drawn: bool) -> None:
    net = Expert(drawn)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    x, y = data()
    x[0, 0] = 1.0
    batches = [(x, y)] if drawn else [(x, y), (-x, y)]
    assert measure_stability(net, loss_fn, batches, SGD(net.parameters(), lr=0.1)).converged


def test_a_probe_says_the_cause_once_and_stops() -> None:
    net = net_of(True)
    optimizer = SGD(net.parameters(), lr=0.1)
    probe = StabilityProbe(net, optimizer, loss_fn, every_n_steps=1, probe=Probe(samples=48))
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        probe.step(data())
    probe.step(data())
    with pytest.warns(UserWarning, match="stops measuring"):
        probe.step(data())
    assert "measuring" in probe.off
    assert not probe.readings


@pytest.mark.parametrize("method", ["auto", "fd"])
def test_checkpointing_without_reentry_gives_the_true_sharpness(method: Any) -> None:
    """In single precision, on one batch that keeps its graph: the check in double precision comes in between."""
    net = net_of(False)
    groups = [{"params": net.body.parameters(), "lr": 0.1}, {"params": net.head.parameters(), "lr": 0.2}]
    reading = measure_stability(
        net, loss_fn, [data()], SGD(groups, lr=0.1), raw_sharpness=True, full_batch=True, method=method
    )
    assert reading.sharpness == pytest.approx(true_sharpness(net, data()), rel=1e-3)  # 1e-4 and float32
    assert reading.converged


def test_a_kept_graph_recomputes_with_the_module_that_it_was_recorded_with() -> None:
    net = net_of(False)
    v = torch.ones(sum(p.numel() for p in net.parameters()))
    with HessianOperator(net, loss_fn, [data()]) as hessian:
        first = hessian.matvec(v)
        hessian.evaluate(0.1 * v)
        hessian.gradient(dtype=torch.float64)
        again = hessian.matvec(v)
    assert torch.equal(first, again)


@pytest.mark.parametrize("exact", [False, True])
def test_layers_in_a_checkpoint_have_the_limits_that_they_have_without(exact: bool) -> None:
    found, plain = (
        {e.layer: e.curvature for e in estimate_cfl(net, loss_fn, [data()], SGD(net.parameters(), lr=0.1), exact=exact)}
        for net in (net_of(False), net_of(None))
    )
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_next_readings_of_a_checkpointed_net_go_on(optimizer: Any) -> None:
    net = net_of(False)
    steps = optimizer(net.parameters(), lr=0.01)
    gauge = Gauge(Solver(raw_sharpness=True))
    for step in range(16):
        if step in (0, 13, 15):
            reading = gauge.measure(net, loss_fn, [data()], [steps], step=step, full_batch=True).reading
            assert reading.sharpness == pytest.approx(true_sharpness(net, data()), rel=1e-2)
        steps.zero_grad()
        loss_fn(net, data()).backward()
        steps.step()
