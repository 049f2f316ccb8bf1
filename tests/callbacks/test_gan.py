"""Two networks in a game: each optimizer's loss is measured over its own parameters."""

import importlib
import re
from typing import Any

import pytest
import torch
from torch import nn

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, PerturbationMonitor, Probe, StabilityProbe

pytestmark = pytest.mark.usefixtures("in_a_folder_without_figures")
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
LATENT = 3
RATES = (0.05, 0.02)


def data() -> torch.Tensor:
    return torch.randn(16, 2, generator=torch.Generator().manual_seed(0)) + 1.0


def latent() -> torch.Tensor:
    return torch.randn(16, LATENT, generator=torch.Generator().manual_seed(1))


def generator_loss(module: Any, real: torch.Tensor) -> torch.Tensor:
    fake = module.generator(latent().to(real))
    return nn.functional.softplus(-module.discriminator(fake)).mean()


def discriminator_loss(module: Any, real: torch.Tensor) -> torch.Tensor:
    fake = module.generator(latent().to(real)).detach()
    on_real = nn.functional.softplus(-module.discriminator(real)).mean()
    return on_real + nn.functional.softplus(module.discriminator(fake)).mean()


LOSSES = (generator_loss, discriminator_loss)


def parts(seed: int = 0) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    return {
        "generator": nn.Sequential(nn.Linear(LATENT, 4), nn.Tanh(), nn.Linear(4, 2)),
        "discriminator": nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)),
    }


def dense_ratio(module: nn.Module, which: int, lr: float) -> float:
    """η λ_max / 2 of one loss over the parameters of its own network alone, by autograd's dense Hessian."""
    own = ("generator", "discriminator")[which]
    names = [name for name, _ in module.named_parameters() if name.startswith(own)]
    named = dict(module.named_parameters())
    flat = torch.cat([named[name].detach().reshape(-1) for name in names]).double()
    fixed = {name: p.detach().double() for name, p in named.items()}

    class Functional:
        def __init__(self, theta: torch.Tensor) -> None:
            split = theta.split([named[name].numel() for name in names])
            self.values = fixed | {n: t.view(named[n].shape) for n, t in zip(names, split, strict=True)}

        def net(self, part: str, x: torch.Tensor) -> torch.Tensor:
            inside = {name.split(".", 1)[1]: v for name, v in self.values.items() if name.startswith(part)}
            return torch.func.functional_call(getattr(module, part), inside, (x,))

        def generator(self, x: torch.Tensor) -> torch.Tensor:
            return self.net("generator", x)

        def discriminator(self, x: torch.Tensor) -> torch.Tensor:
            return self.net("discriminator", x)

    hessian = torch.autograd.functional.hessian(lambda theta: LOSSES[which](Functional(theta), data().double()), flat)
    return lr * float(torch.linalg.eigvalsh(hessian)[-1]) / 2


def fit(pl: Any, callbacks: Any, *, epochs: int = 4, rates: Any = None, steps: Any = None) -> tuple[Any, Any]:
    class Gan(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts().items():
                setattr(self, name, part)
            self.automatic_optimization = False
            self.true: list[tuple[float, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.true.append(tuple(dense_ratio(self, i, RATES[i]) for i in range(2)))
            for i, optimizer in enumerate(self.optimizers()):
                if rates is not None:
                    optimizer.param_groups[0]["lr"] = rates(i, self.current_epoch)
                loss = LOSSES[i](self, batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(part.parameters(), lr=lr)
                for part, lr in zip((self.generator, self.discriminator), RATES, strict=True)
            ]

    module = Gan()
    loader = torch.utils.data.DataLoader(data(), 16)
    pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)
    return module, callbacks[0]


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("namespace", NAMESPACES)
def test_one_loss_is_measured_over_the_parameters_of_its_optimizer(namespace: str, which: int, caplog: Any) -> None:
    caplog.set_level("INFO")
    pl = importlib.import_module(namespace)
    module, monitor = fit(pl, [EdgeOfStabilityMonitor(every_n_steps=1, loss_fn={which: LOSSES[which]}, alerts=())])
    for reading in monitor.readings[:-1]:
        assert reading.edge_ratio == pytest.approx(module.true[reading.step][which], rel=1e-3)
        assert reading.lr == (RATES[which],)
        assert not reading.stale
    assert monitor.eigenvectors.shape[0] == sum(
        p.numel() for p in (module.generator, module.discriminator)[which].parameters()
    )
    assert f"optimizer {which} (SGD); not measured: {1 - which} (SGD)" in caplog.text


def test_of_several_losses_the_nearest_to_its_edge_is_read_and_the_others_told() -> None:
    pl = importlib.import_module(NAMESPACES[0])
    module, monitor = fit(pl, [EdgeOfStabilityMonitor(every_n_steps=1, loss_fn=dict(enumerate(LOSSES)), alerts=())])
    assert len(monitor.readings) == 5
    for reading in monitor.readings[:-1]:
        true = module.true[reading.step]
        nearest = true.index(max(true))
        assert reading.edge_ratio == pytest.approx(max(true), rel=1e-3)
        note = next(note for note in reading.notes if note.startswith("the edge ratio of"))
        assert f"of optimizer {nearest} (SGD)" in note
        other = float(re.search(rf"optimizer {1 - nearest} \(SGD\): ([-\d.e]+)", note)[1])  # type: ignore[index]
        assert other == pytest.approx(min(true), rel=1e-2)
        assert not reading.stale


def test_the_discriminators_loss_does_not_curve_the_generator() -> None:
    module = nn.ModuleDict(parts())
    optimizers = [torch.optim.SGD(module[n].parameters(), lr=lr) for n, lr in zip(module, RATES, strict=True)]
    net = Both(module)
    probe = StabilityProbe(
        net, optimizers, dict(enumerate(LOSSES)), every_n_steps=1, probe=Probe(full_batch=True), alerts=()
    )
    reading = probe.step(data())
    assert reading is not None
    true = [dense_ratio(net, i, RATES[i]) for i in range(2)]
    assert reading.edge_ratio == pytest.approx(max(true), rel=1e-3)
    # Over the parameters of both the generator's loss has another curvature.
    together = StabilityProbe(
        net, optimizers, generator_loss, every_n_steps=1, probe=Probe(full_batch=True), alerts=()
    ).step(data())
    assert together is not None
    assert together.edge_ratio != pytest.approx(true[0], rel=1e-2)


class Both(nn.Module):
    def __init__(self, nets: Any) -> None:
        super().__init__()
        self.generator = nets["generator"]
        self.discriminator = nets["discriminator"]


@pytest.mark.parametrize("key", [2, -1])
def test_a_loss_for_an_optimizer_that_is_not_there_is_refused(key: int) -> None:
    pl = importlib.import_module(NAMESPACES[0])
    with pytest.raises(Exception, match="positions of the 2 optimizers") as caught:
        fit(pl, [EdgeOfStabilityMonitor(loss_fn={key: generator_loss})])
    assert type(caught.value).__name__ == "MisconfigurationException"


def test_one_loss_of_several_optimizers_names_the_other_way(caplog: Any) -> None:
    caplog.set_level("INFO")
    pl = importlib.import_module(NAMESPACES[0])
    fit(pl, [EdgeOfStabilityMonitor(every_n_steps=1, loss_fn=generator_loss, alerts=())])
    assert caplog.text.count("pass loss_fn={0: ..., 1: ...}") == caplog.text.count("eos_monitor [eos]: one loss is") > 0


def test_rates_that_one_optimizer_sets_alone_leave_the_others_reading_fresh() -> None:
    def rates(i: int, epoch: int) -> float:
        return RATES[i] / (1 + epoch) if i == 1 else RATES[i]

    pl = importlib.import_module(NAMESPACES[0])
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn={0: generator_loss}, alerts=())
    module, _ = fit(pl, [monitor], rates=rates)
    assert [reading.stale for reading in monitor.readings] == [False] * 5
    for reading in monitor.readings[:-1]:
        assert reading.edge_ratio == pytest.approx(module.true[reading.step][0], rel=1e-3)


def test_a_share_of_an_optimizers_own_loss_is_told_with_the_factor() -> None:
    pl = importlib.import_module(NAMESPACES[0])

    def share(module: Any, real: torch.Tensor) -> torch.Tensor:
        return generator_loss(module, real) / 4

    def rates(i: int, epoch: int) -> float:
        return 20 * RATES[i]  # so that gradients change

    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn={0: share}, alerts=())
    with pytest.warns(UserWarning, match="a gradient 4 times its own"):
        fit(pl, [monitor], epochs=10, rates=rates)


def test_layers_of_one_loss_are_those_of_its_optimizer() -> None:
    pl = importlib.import_module(NAMESPACES[0])
    layers = CFLMonitor(name="cfl")
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn={0: generator_loss}, alerts=())
    fit(pl, [monitor, layers])
    found = {e["layer"] for row in layers._history for e in row["layers"] if e["cfl_number"]}
    assert found
    assert found <= {"generator.0", "generator.2"}


@pytest.mark.parametrize("observer", [CFLMonitor, PerturbationMonitor])
def test_what_needs_one_loss_says_so_where_there_are_several(observer: Any) -> None:
    pl = importlib.import_module(NAMESPACES[0])
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, loss_fn=dict(enumerate(LOSSES)), alerts=())
    extra = {"at_steps": (1,)} if observer is PerturbationMonitor else {}
    with pytest.warns(UserWarning, match="one loss"):
        fit(pl, [monitor, observer(**extra)])
    assert len(monitor.readings) == 5
