"""Losses that compute in less precision than their parameters have, against the same loss in full precision."""

import contextlib
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor, HessianOperator, StabilityProbe, measure_stability
from eos_monitor.readings.products import check_products
from tests.curvature.test_hessian import OnceTanh

BF16 = torch.bfloat16
# At the rounding of bfloat16 no residual gets to 1e-4: such readings are marked.
pytestmark = pytest.mark.filterwarnings("ignore:The reading at step")
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(32, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)))


def next_token(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]).flatten(0, 1), batch[1].flatten())


def inside_autocast(net: Any, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=BF16):
        return next_token(net, batch)


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (16, 10), generator=generator), torch.randint(0, 20, (16, 10), generator=generator)


@pytest.mark.parametrize("seed", range(4))
def test_autocast_inside_a_transformer_s_loss_is_not_taken_for_wrong_products(seed: int) -> None:
    """Random directions: the rounding of a product is largest off the top mode."""
    torch.manual_seed(seed)
    net = Transformer(2)
    operator = HessianOperator(net, inside_autocast, [tokens(seed)])
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(seed))
    exact = HessianOperator(net.double(), next_token, [tokens(seed)]).matvec(v.double())
    net.float()
    check = operator.check(v)
    found = float((operator.matvec(v).double() - exact).norm() / exact.norm())
    assert check.passed
    assert check.mismatch == pytest.approx(found, rel=0.1)  # what is told is what the products are off by
    assert not check_products(operator, v).wrong


def test_rounding_of_more_than_a_percent_is_told() -> None:
    torch.manual_seed(0)
    net = Transformer(2)
    operator = HessianOperator(net, inside_autocast, [tokens(0)])
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    found = check_products(operator, v)
    assert operator.check(v).mismatch > 1e-2
    assert found.note is not None
    assert "computes in bfloat16: products carry" in found.note


def test_sharpness_of_a_loss_inside_autocast_is_that_of_the_same_in_double() -> None:
    torch.manual_seed(0)
    net = Transformer(2)
    optimizer = SGD(net.parameters(), lr=0.1)
    found = measure_stability(net, inside_autocast, [tokens(0)], optimizer, full_batch=True)
    net.double()
    exact = measure_stability(net, next_token, [tokens(0)], SGD(net.parameters(), lr=0.1), full_batch=True, rtol=1e-6)
    assert found.sharpness == pytest.approx(exact.sharpness, rel=1e-2)  # bfloat16: 2^-8


def test_wrong_products_are_refused_inside_autocast_too() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))

    def loss_fn(module: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=BF16):
            return F.cross_entropy(module[1](OnceTanh.apply(module[0](batch[0]).float())), batch[1])

    batch = (torch.randn(32, 6), torch.randint(0, 3, (32,)))
    operator = HessianOperator(net, loss_fn, [batch])
    assert not operator.check(torch.ones(operator.size)).passed


class Adapted(nn.Module):
    """A frozen base in bfloat16 with an adapter in float32; they meet by conversions, or under autocast only."""

    def __init__(self, converts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 16).to(BF16).requires_grad_(False)
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 16, bias=False)
        self.head = nn.Linear(16, 3)
        self.converts = converts

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x.to(BF16)).float() if self.converts else self.base(x)
        return self.head((base + self.up(self.down(x))).float().tanh())


def labels(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]).float(), batch[1])


def examples(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def exact_sharpness(net: nn.Module) -> float:
    """Of the dense Hessian over the trained parameters, the base widened as it is."""
    wide = Adapted(True)
    wide.load_state_dict(net.state_dict())
    wide.double()
    trained = {name: p.detach() for name, p in wide.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in wide.named_parameters() if not p.requires_grad}
    sizes = [p.numel() for p in trained.values()]
    x, y = examples()

    def value(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, sizes)
        given = {n: piece.view(p.shape) for (n, p), piece in zip(trained.items(), pieces, strict=True)} | fixed
        base = F.linear(x.double(), given["base.weight"], given["base.bias"])
        adapter = x.double() @ given["down.weight"].T @ given["up.weight"].T
        return F.cross_entropy(F.linear((base + adapter).tanh(), given["head.weight"], given["head.bias"]), y)

    start = torch.cat([p.reshape(-1) for p in trained.values()])
    return float(torch.linalg.eigvalsh(torch.autograd.functional.hessian(value, start))[-1])


@pytest.mark.parametrize("optimizer", [SGD, AdamW])
@pytest.mark.parametrize("converts", [True, False])
def test_adapters_on_a_base_in_bfloat16_are_read(converts: bool, optimizer: Any) -> None:
    net = Adapted(converts)
    steps = optimizer([p for p in net.parameters() if p.requires_grad], lr=0.01)
    with contextlib.nullcontext() if converts else torch.autocast("cpu", dtype=BF16):
        reading = measure_stability(net, labels, [examples()], steps, raw_sharpness=True)
    assert reading.sharpness == pytest.approx(exact_sharpness(net), rel=1e-2)  # inputs and base outputs in bfloat16


def test_a_loop_under_autocast_is_watched() -> None:
    net = Adapted(False)
    steps = SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    probe = StabilityProbe(net, steps, labels, every_n_steps=1, probe=[examples()])
    for _ in range(4):
        with torch.autocast("cpu", dtype=BF16):
            probe.step(examples())
            loss = labels(net, examples())
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert not probe.off
    assert all(reading.edge_ratio is not None for reading in probe.readings)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_trainer_s_autocast_is_there_where_the_types_meet_under_it_only(namespace: str, tmp_path: Any) -> None:
    pl = importlib.import_module(namespace)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Adapted(False)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return labels(self.net, batch)

        def configure_optimizers(self) -> Any:
            return SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    module = Module()
    expected = exact_sharpness(module.net)
    monitor = EdgeOfStabilityMonitor(every_n_steps=1, probe=[examples()])
    trainer = pl.Trainer(
        max_steps=4,
        precision="bf16-mixed",
        accelerator="cpu",
        callbacks=[monitor],
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(*examples()), batch_size=16))
    assert monitor.readings[0].sharpness == pytest.approx(expected, rel=1e-2)
    assert len(monitor.readings) >= 4
