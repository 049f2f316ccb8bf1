"""A loss off the scale of a plain loop's steps is told with the factor; nothing else is."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from eos_monitor import Probe, Solver, StabilityProbe

STEPS = 24
PARTS = 5


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 6, generator=generator), torch.randn(40, 1, generator=generator)


def net(**settings: Any) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 8), nn.Tanh()]
    layers += [nn.BatchNorm1d(8)] if settings.get("norm") else []
    layers += [nn.Dropout(settings["dropout"])] if "dropout" in settings else []
    return nn.Sequential(*layers, nn.Linear(8, 1))


def mean_loss(module: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return (module(x) - y).square().mean()


def part_of_mean(module: nn.Module, batch: Any) -> torch.Tensor:
    """The user's: what one chunk adds to the mean over all samples."""
    x, y = batch
    return (module(x) - y).square().sum() / 40


def chunks() -> list[Any]:
    x, y = data()
    return list(zip(x.chunk(PARTS), y.chunk(PARTS), strict=True))


def dense_edge_ratio(module: nn.Module, lr: float) -> float:
    """η λ_max / 2 of the mean loss over all the data, by autograd's dense Hessian."""
    names = [name for name, _ in module.named_parameters()]
    sizes = [p.numel() for p in module.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).double()
    x, y = (t.double() for t in data())

    def loss(theta: torch.Tensor) -> torch.Tensor:
        pieces = zip(names, theta.split(sizes), module.parameters(), strict=True)
        named = {name: piece.view(p.shape) for name, piece, p in pieces}
        return (torch.func.functional_call(module, named, (x,)) - y).square().mean()

    return lr * float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1]) / 2


def told(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    return result, [str(w.message) for w in caught if "eos_monitor" in str(w.message)]


def chunked_run(order: str) -> tuple[StabilityProbe, float, nn.Module]:
    module = net()
    sgd = torch.optim.SGD(module.parameters(), lr=0.05)
    probe = StabilityProbe(
        module, sgd, part_of_mean, every_n_steps=4, probe=Probe(chunks(), full_batch=True), alerts=()
    )
    for step in range(STEPS):
        if order == "before":
            probe.step(data())
        sgd.zero_grad()
        for chunk in chunks():
            part_of_mean(module, chunk).backward()
        if order == "after":
            probe.step(data())
        if step == STEPS - 4:
            true = dense_edge_ratio(module, 0.05)  # of the last reading, which precedes this step's update
        sgd.step()
    return probe, true, module


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_share_of_the_mean_is_told_with_the_factor(order: str) -> None:
    (probe, true, _), messages = told(lambda: chunked_run(order))
    assert len(messages) == 1
    assert "a gradient 5 times its own" in messages[0]
    assert "5 times too low" in messages[0]
    last = probe.readings[-1]
    assert any("gradient 5 times" in note for note in last.notes)
    assert last.edge_ratio is not None
    # The factor that was told leads from what is read to what is true.
    assert 5 * last.edge_ratio == pytest.approx(true, rel=1e-2)


def clip(module: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1e-3)


def clip_values(module: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_value_(module.parameters(), 1e-3)


def scale(module: nn.Module, loss: torch.Tensor) -> None:
    (2.0**16 * loss).backward()  # a gradient scaler's, which is taken out in its step
    for p in module.parameters():
        p.grad /= 2.0**16


def plain(module: nn.Module, loss: torch.Tensor) -> None:
    loss.backward()


def loop(
    module: nn.Module,
    loss_fn: Any,
    backward: Callable[[nn.Module, torch.Tensor], None],
    *,
    before: bool = True,
    clear_last: bool = False,
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.05),
    full: bool = True,
    steps: int = STEPS,
) -> StabilityProbe:
    opt = optimizer(module.parameters())
    probe = StabilityProbe(module, opt, loss_fn, every_n_steps=2, probe=Probe(full_batch=full), alerts=())
    x, y = data()
    for step in range(steps):
        batch = (x, y) if full else (x[step % 4 :: 4], y[step % 4 :: 4])
        if before:
            probe.step(batch)
        if not clear_last:
            opt.zero_grad()
        backward(module, loss_fn(module, batch))
        if not before:
            probe.step(batch)
        opt.step(*closures(opt, module, loss_fn, batch))
        if clear_last:
            opt.zero_grad()
    return probe


def closures(opt: torch.optim.Optimizer, module: nn.Module, loss_fn: Any, batch: Any) -> list[Callable[[], Any]]:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_fn(module, batch)
        loss.backward()
        return loss

    return [closure] if isinstance(opt, torch.optim.LBFGS) else []


ADAM = {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-3)}
MOMENTUM = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2)}
TINY = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05 / 2.0**16)}
LBFGS = {"optimizer": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)}
HARMLESS = {
    "before backward": ({}, plain, {}),
    "after backward": ({}, plain, {"before": False}),
    "cleared last": ({}, plain, {"clear_last": True}),
    "minibatches": ({}, plain, {"full": False}),
    "minibatches, after": ({}, plain, {"full": False, "before": False}),
    "dropout": ({"dropout": 0.5}, plain, {}),
    "a little dropout": ({"dropout": 0.02}, plain, {"before": False}),
    "batch norm": ({"norm": True}, plain, {}),
    "clipping by norm": ({}, clip, {"before": False}),
    "clipping by norm, seen later": ({}, clip, {}),
    "clipping by value": ({}, clip_values, {"before": False}),
    "a scaler": ({}, scale, {}),
    "a scaler's gradients": ({}, lambda m, loss: (2.0**16 * loss).backward(), {"before": False, **TINY}),
    "adam": ({}, plain, ADAM),
    "momentum and decay": ({}, plain, MOMENTUM),
    "lbfgs": ({}, plain, LBFGS),
    "a small rate": ({}, plain, {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-4)}),
}


@pytest.mark.parametrize("case", HARMLESS.values(), ids=HARMLESS)
def test_nothing_is_told_of_a_loss_that_is_trained(case: Any) -> None:
    settings, backward, options = case
    probe, messages = told(lambda: loop(net(**settings), mean_loss, backward, **options))
    assert messages == []
    assert not any("scale of the steps" in note for reading in probe.readings for note in reading.notes)


def test_late_in_a_run_the_gradient_before_is_not_taken_for_the_steps() -> None:
    # Along one slow mode each gradient is 0.9 times the one before: as straight as the step's own.
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1e-3]]))
    x = torch.eye(2) * torch.tensor([1.0, 1.3]) * 2**0.5

    def loss_fn(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return 0.5 * module(batch).square().sum() / 2

    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = StabilityProbe(model, sgd, loss_fn, every_n_steps=1, probe=Probe(full_batch=True), alerts=())

    def run() -> None:
        for _ in range(60):
            probe.step(x)
            sgd.zero_grad()
            loss_fn(model, x).backward()
            sgd.step()

    _, messages = told(run)
    assert messages == []


def test_the_comparison_leaves_the_run_as_it_is() -> None:
    def weights(watched: bool) -> list[torch.Tensor]:
        module = net(dropout=0.1, norm=True)
        sgd = torch.optim.SGD(module.parameters(), lr=0.05)
        probe = StabilityProbe(
            module, sgd, part_of_mean, every_n_steps=4, probe=Probe(full_batch=True), alerts=(), verify="always"
        )
        torch.manual_seed(3)
        for _ in range(STEPS):
            if watched:
                probe.step(data())
            sgd.zero_grad()
            mean_loss(module, data()).backward()
            sgd.step()
        return [*module.parameters(), *module.buffers(), torch.rand(3)]

    assert all(torch.equal(a, b) for a, b in zip(weights(False), weights(True), strict=True))


@pytest.mark.parametrize("factor", [1, 3])
def test_sparse_gradients_are_compared_like_others(factor: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Flatten(), nn.Linear(6, 1))
    sgd = torch.optim.SGD(module.parameters(), lr=0.05)
    tokens = torch.randint(10, (8, 2), generator=torch.Generator().manual_seed(0))

    def loss_fn(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (module(batch) - 1.0).square().mean()

    # Sparse gradients cannot be differentiated twice.
    solver = Solver(method="fd")
    probe = StabilityProbe(
        module, sgd, loss_fn, every_n_steps=2, probe=Probe(full_batch=True), solver=solver, alerts=(), verify=False
    )

    def run() -> None:
        for _ in range(STEPS):
            probe.step(tokens)
            sgd.zero_grad()
            (factor * loss_fn(module, tokens)).backward()
            sgd.step()

    _, messages = told(run)
    assert probe.readings
    assert [("3 times its own" in m) for m in messages if "scale of the steps" in m] == [True] * (factor == 3)


def test_batches_of_unequal_size_weigh_what_they_have() -> None:
    module = net()
    sgd = torch.optim.SGD(module.parameters(), lr=0.05)
    x, y = data()
    batches = [(x[:30], y[:30]), (x[30:], y[30:])]
    probe = StabilityProbe(
        module,
        sgd,
        lambda m, b: mean_loss(m, b) / 2,
        every_n_steps=2,
        probe=Probe(batches, full_batch=True),
        alerts=(),
    )

    def run() -> None:
        for _ in range(STEPS):
            probe.step((x, y))
            sgd.zero_grad()
            mean_loss(module, (x, y)).backward()
            sgd.step()

    _, messages = told(run)
    assert len(messages) == 1
    assert "a gradient 2 times its own" in messages[0]
