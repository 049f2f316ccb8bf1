"""A loss off the scale of a Trainer's steps, or another loss than theirs, is told; what steps do beside it is not."""

import importlib
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eos_monitor import EdgeOfStabilityMonitor, Probe

pytestmark = pytest.mark.usefixtures("in_a_folder_without_figures")
NAMESPACE = "lightning.pytorch"
N = 40
CHUNKS = 5


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 6, generator=generator), torch.randn(N, 1, generator=generator)


def net(kind: str = "plain") -> nn.Module:
    torch.manual_seed(1)
    middle: list[nn.Module] = {
        "dropout": [nn.Dropout(0.5)],
        "slight dropout": [nn.Dropout(0.1)],
        "norm": [nn.BatchNorm1d(8)],
    }.get(kind, [])
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), *middle, nn.Linear(8, 1))


def mean_loss(module: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return F.mse_loss(module.net(x), y)


def fit(
    step: Callable[[Any, Any], Any],
    loss_fn: Any = mean_loss,
    *,
    manual: bool = False,
    kind: str = "plain",
    optimizer: Callable[[Any], Any] = lambda m: torch.optim.SGD(m.parameters(), lr=0.05),
    batch_size: int = N,
    shuffle: bool = False,
    probe: Any = "fixed",
    prepare: Callable[[Any], None] = lambda module: None,
    epochs: int = 10,
    monitored: bool = True,
    **trainer: Any,
) -> tuple[Any, list[str], Any]:
    pl = importlib.import_module(NAMESPACE)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net(kind)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return step(self, batch)

        def configure_optimizers(self) -> Any:
            return optimizer(self)

    module = Module()
    prepare(module)
    monitor = EdgeOfStabilityMonitor(every_n_steps=2, loss_fn=loss_fn, probe=probe, alerts=())
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size, shuffle=shuffle)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    torch.manual_seed(2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            enable_model_summary=False,
            callbacks=[monitor] if monitored else [],
            **settings,
            **trainer,
        ).fit(module, loader)
    return monitor, [str(w.message) for w in caught if "eos_monitor" in str(w.message)], module


def quarter(module: Any, batch: Any) -> torch.Tensor:
    return mean_loss(module, batch) / 4


def in_chunks(module: Any, batch: Any) -> None:
    """Manual optimization: each of the step's chunks adds its share to the gradient."""
    optimizer = module.optimizers()
    optimizer.zero_grad()
    for x, y in zip(*(part.chunk(4) for part in batch), strict=True):
        module.manual_backward(quarter(module, (x, y)))
    optimizer.step()


class OverBatches:
    """Manual optimization: four batches a step."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, module: Any, batch: Any) -> None:
        module.manual_backward(quarter(module, batch))
        self.seen += 1
        if self.seen % 4 == 0:
            module.optimizers().step()
            module.optimizers().zero_grad()


def one_fifth(module: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return (module.net(x) - y).square().sum() / N


class FiveChunks(OverBatches):
    def __call__(self, module: Any, batch: Any) -> None:
        module.manual_backward(one_fifth(module, batch))
        self.seen += 1
        if self.seen % CHUNKS == 0:
            module.optimizers().step()
            module.optimizers().zero_grad()


def cases(of: dict[str, Any], *slow: str) -> list[Any]:
    return [pytest.param(case, id=name, marks=pytest.mark.slow if name in slow else ()) for name, case in of.items()]


SCALED = {
    "automatic": (mean_loss, quarter, {}, 4.0),
    "too large": (lambda m, b: mean_loss(m, b) / 3, mean_loss, {}, 1 / 3),
    "the wrong sign": (mean_loss, lambda m, b: -mean_loss(m, b), {}, -1.0),
    "accumulated": (mean_loss, quarter, {"batch_size": 10, "accumulate_grad_batches": 4}, 4.0),
    "manual, chunks of a batch": (in_chunks, quarter, {"manual": True}, 4.0),
    "manual, over batches": (OverBatches(), quarter, {"manual": True, "batch_size": 10}, 4.0),
    "sums over five chunks": (FiveChunks(), one_fifth, {"manual": True, "batch_size": N // CHUNKS}, 5.0),
    "clipped by the Trainer": (mean_loss, quarter, {"gradient_clip_val": 1e-2}, 4.0),
    "adam": (mean_loss, quarter, {"optimizer": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2)}, 4.0),
}


@pytest.mark.parametrize("case", cases(SCALED, "too large", "accumulated", "manual, over batches", "adam"))
def test_a_loss_off_the_scale_of_the_steps_is_told_with_the_factor(case: Any) -> None:
    step, loss_fn, settings, factor = case
    monitor, messages, _ = fit(step, loss_fn, **settings)
    assert len(messages) == 1
    assert f"a gradient {factor:.3g} times its own" in messages[0]
    assert any(f"gradient {factor:.3g} times" in note for note in monitor.readings[-1].notes)


def test_a_factor_is_told_of_a_loss_with_dropout() -> None:
    """The masks differ, and no two gradients are alike in direction."""
    monitor, messages, _ = fit(mean_loss, lambda m, b: mean_loss(m, b) / 4, kind="slight dropout", epochs=24)
    assert len(messages) == 1
    factor = float(re.findall(r"a gradient (\S+) times its own", messages[0])[0])
    assert factor == pytest.approx(4.0, rel=0.25)
    assert "about" in messages[0]
    assert any("off the scale" in note for note in monitor.readings[-1].notes)


def test_the_factor_leads_to_the_edge_ratio_of_the_training() -> None:
    off, _, _ = fit(in_chunks, quarter, manual=True)
    true, messages, _ = fit(in_chunks, mean_loss, manual=True)
    assert messages == []
    assert 4 * off.readings[-1].edge_ratio == pytest.approx(true.readings[-1].edge_ratio, rel=1e-3)


def absolute(module: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return module.net(x - 2.0).square().mean() - 0.1 * y.mean() * module.net(x).mean()


def test_another_loss_than_the_trained_one_is_told() -> None:
    monitor, messages, _ = fit(mean_loss, absolute)
    assert len(messages) == 1
    assert "is not the one that is trained" in messages[0]
    assert any("is not the one that is trained" in note for note in monitor.readings[-1].notes)


OWN = np.random.default_rng(0)


def helper(x: torch.Tensor) -> torch.Tensor:
    return x + 3.0 * torch.as_tensor(OWN.normal(size=tuple(x.shape)), dtype=x.dtype)


def noisy(draw: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    return lambda module, batch: mean_loss(module, (draw(module, batch[0]), batch[1]))


class Holder:
    def __init__(self) -> None:
        self.inner = {"generator": torch.Generator().manual_seed(0)}


def by_an_object(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 3.0 * torch.randn(x.shape, generator=module.holder.inner["generator"])


def hold(module: Any) -> None:
    module.holder = Holder()


def clipping(algorithm: str) -> Callable[[Any, Any], None]:
    def step(module: Any, batch: Any) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(mean_loss(module, batch))
        module.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm)
        optimizer.step()

    return step


def two_optimizers(module: Any, batch: Any) -> None:
    for optimizer, sign in zip(module.optimizers(), (1, -3), strict=True):
        optimizer.zero_grad()
        module.manual_backward(sign * mean_loss(module, batch))
        optimizer.step()


def halves(module: Any) -> Any:
    return [torch.optim.SGD(module.net[i].parameters(), lr=1e-3) for i in (0, -1)]


def hook_gradients(module: Any) -> None:
    for p in module.parameters():
        p.register_hook(lambda g: -g.sign())


def freeze(module: Any) -> None:
    module.net[0].requires_grad_(False)


def add_unused(module: Any) -> None:
    module.unused = nn.Linear(3, 3)


def lbfgs(module: Any) -> Any:
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3)


HARMLESS = {
    "the training step": (mean_loss, None, {}),
    "the same loss": (mean_loss, mean_loss, {}),
    "dropout": (mean_loss, mean_loss, {"kind": "dropout"}),
    "dropout, longer": (mean_loss, mean_loss, {"kind": "slight dropout", "epochs": 24}),
    "noise in the step, dropout": (
        noisy(lambda m, x: x + 0.5 * torch.randn_like(x)),
        mean_loss,
        {"kind": "slight dropout", "epochs": 24},
    ),
    "dropout, the training step": (mean_loss, None, {"kind": "dropout"}),
    "batch norm": (mean_loss, mean_loss, {"kind": "norm"}),
    "minibatches": (mean_loss, mean_loss, {"batch_size": 10, "shuffle": True, "epochs": 5}),
    "accumulation": (mean_loss, mean_loss, {"batch_size": 10, "accumulate_grad_batches": 3, "epochs": 8}),
    "noise from torch": (noisy(lambda m, x: x + 3.0 * torch.randn_like(x)), mean_loss, {}),
    "noise from numpy": (noisy(lambda m, x: x + 3.0 * float(np.random.normal())), mean_loss, {}),  # noqa: NPY002
    "noise from a global": (noisy(lambda m, x: helper(x)), mean_loss, {}),
    "noise from an object": (noisy(by_an_object), mean_loss, {"prepare": hold}),
    "clipped by the Trainer": (mean_loss, mean_loss, {"gradient_clip_val": 1e-3}),
    "clipped by value": (mean_loss, mean_loss, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "manual, clipped": (clipping("norm"), mean_loss, {"manual": True}),
    "manual, clipped by value": (clipping("value"), mean_loss, {"manual": True}),
    "several optimizers": (two_optimizers, mean_loss, {"manual": True, "optimizer": halves}),
    "hooks on gradients": (mean_loss, mean_loss, {"prepare": hook_gradients, "epochs": 8}),
    "frozen": (mean_loss, mean_loss, {"prepare": freeze}),
    "unused": (mean_loss, mean_loss, {"prepare": add_unused}),
    "lbfgs": (mean_loss, mean_loss, {"optimizer": lbfgs, "epochs": 8}),
    "bf16": (mean_loss, mean_loss, {"precision": "bf16-mixed"}),
    "batches of its own": (mean_loss, absolute, {"probe": Probe([data()])}),
}
RARER = (
    *("dropout, the training step", "noise from numpy", "noise from an object", "clipped by the Trainer"),
    *("clipped by value", "unused", "frozen", "minibatches", "the same loss", "manual, clipped by value"),
)


@pytest.mark.parametrize("case", cases(HARMLESS, *RARER))
def test_nothing_is_told_of_what_steps_do_beside_the_loss(case: Any) -> None:
    step, loss_fn, settings = case
    if loss_fn is None:
        monitor, messages, _ = fit(step, None, **settings)
    else:
        monitor, messages, _ = fit(step, loss_fn, **settings)
    assert [m for m in messages if "did not converge" not in m] == []
    assert monitor.readings


def test_the_comparison_leaves_the_run_as_it_is() -> None:
    def state(monitored: bool) -> list[torch.Tensor]:
        _, _, module = fit(noisy(lambda m, x: x + torch.randn_like(x)), quarter, kind="norm", monitored=monitored)
        gradients = [p.grad for p in module.parameters()]
        return [*module.parameters(), *module.buffers(), *gradients, torch.rand(3)]

    assert all(torch.equal(a, b) for a, b in zip(state(False), state(True), strict=True))
