"""The error of a reading on a sample, against the value on the whole data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eos_monitor import Solver, measure_stability
from eos_monitor.readings.gauge import Gauge

SAMPLES = 1500


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x[:SAMPLES], dtype=torch.float32)
    return (x - x.mean()) / x.std(), torch.tensor(y[:SAMPLES])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def squared_error(net: Any, batch: Any) -> torch.Tensor:
    return 0.5 * (net(batch[0]) - F.one_hot(batch[1], 10)).square().sum(1).mean()


def cross_entropy(net: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def true_sharpness(net: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor], data: Any) -> float:
    """By ARPACK on a product written here."""
    params = list(net.parameters())
    gradients = torch.autograd.grad(loss_fn(net, data), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradients])

    def product(v: Any) -> Any:
        hv = torch.autograd.grad(flat, params, torch.as_tensor(v.ravel(), dtype=torch.float32), retain_graph=True)
        return torch.cat([h.flatten() for h in hv]).double().numpy()

    n = flat.numel()
    operator = LinearOperator((n, n), matvec=product, dtype=np.float64)
    v0 = np.random.default_rng(0).standard_normal(n)
    return float(eigsh(operator, k=1, which="LA", tol=1e-4, v0=v0, return_eigenvectors=False)[0])


# (net, loss, lr, steps): early, and at the edge (full-batch gradient descent reaches lr·λ = 2 there)
STATES = {
    "mlp-early": (mlp, squared_error, 0.1, 20),
    "mlp-edge": (mlp, squared_error, 0.1, 900),
    "cnn-early": (cnn, cross_entropy, 0.3, 10),
    "cnn-edge": (cnn, cross_entropy, 0.3, 680),
}


@pytest.mark.slow
def test_error_covers_the_value_on_the_whole_data() -> None:
    """200 readings on random probes of 128 to 256 samples: r ± 2·error holds the truth in at least 90 %."""
    torch.set_num_threads(1)
    x, y = digits()
    covered, relative, edge_ratios = [], [], []
    for state, (make, loss_fn, lr, steps) in STATES.items():
        torch.manual_seed(0)
        net = make()
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss_fn(net, (x, y)).backward()
            optimizer.step()
        truth = lr * true_sharpness(net, loss_fn, (x, y)) / 2
        edge_ratios.append((state, truth))
        g = torch.Generator().manual_seed(1)
        for _ in range(50):
            n = int(torch.randint(128, 257, (), generator=g))
            chosen = torch.randperm(SAMPLES, generator=g)[:n]
            reading = measure_stability(net, loss_fn, [(x[chosen], y[chosen])], optimizer)
            assert reading.edge_ratio is not None
            assert reading.error is not None
            assert reading.sampling_error is not None
            assert reading.error >= reading.sampling_error > 0
            covered.append(abs(reading.edge_ratio - truth) <= 2 * reading.error)
            relative.append(reading.error / reading.edge_ratio)
    assert all(r > 0.9 for state, r in edge_ratios if state.endswith("edge")), edge_ratios
    assert len(covered) == 200
    assert np.mean(covered) >= 0.90
    # Wide enough to be true, narrow enough to be of use.
    assert np.median(relative) <= 0.15


def test_whole_probe_has_no_sampling_error() -> None:
    x, y = digits()
    torch.manual_seed(0)
    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reading = measure_stability(net, squared_error, [(x, y)], optimizer, full_batch=True)
    assert reading.sampling_error == 0.0
    # and the sample's error is numerical plus sampling, as root mean square
    part = measure_stability(net, squared_error, [(x[:128], y[:128])], optimizer)
    assert part.error == pytest.approx(np.hypot(part.sampling_error, part.residual * part.edge_ratio))


@pytest.mark.parametrize(("samples", "coupled"), [(7, False), (16, True), (31, True)])
def test_too_few_samples_for_eight_slices_leave_it_unknown(samples: int, coupled: bool) -> None:
    x, y = digits()
    net = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16) if coupled else nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reading = measure_stability(net, squared_error, [(x[:samples], y[:samples])], optimizer)
    assert reading.sampling_error is None
    assert reading.error == pytest.approx(reading.residual * reading.edge_ratio)


class Characters(nn.Module):
    """A small character model."""

    def __init__(self, vocabulary: int, length: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, 32)
        self.place = nn.Parameter(0.02 * torch.randn(length, 32))
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.block = layer
        self.head = nn.Linear(32, vocabulary)
        self.register_buffer("ahead", torch.full((length, length), -torch.inf).triu(1))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.token(ids) + self.place, src_mask=self.ahead))


def next_character(net: Any, ids: Any) -> torch.Tensor:
    return F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.slow
def test_error_of_eight_sequences_covers_the_value_on_512() -> None:
    """A loss that averages over positions: slices of one sequence are parts enough."""
    torch.set_num_threads(1)
    text = Path(nn.modules.module.__file__).read_text(encoding="utf-8")
    letters = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([letters[c] for c in text])
    g = torch.Generator().manual_seed(1)

    def sequences(count: int) -> torch.Tensor:
        starts = torch.randint(len(ids) - 33, (count,), generator=g).tolist()
        return torch.stack([ids[start : start + 33] for start in starts])

    torch.manual_seed(0)
    net = Characters(len(letters), 32)
    adamw = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(150):
        adamw.zero_grad()
        next_character(net, sequences(8)).backward()
        adamw.step()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        truth = 0.05 * true_sharpness(net, next_character, sequences(512))
    readings = [measure_stability(net, next_character, [sequences(8)], sgd) for _ in range(40)]
    covered = [abs((r.edge_ratio or 0.0) - truth) <= 2 * (r.error or 0.0) for r in readings]
    assert np.mean(covered) >= 0.90
    assert np.median([(r.error or 0.0) / (r.edge_ratio or 1.0) for r in readings]) <= 0.3


def test_a_loss_that_needs_whole_batches_still_gives_a_reading() -> None:
    x, y = digits()

    def picky(net: Any, batch: Any) -> torch.Tensor:
        if len(batch[0]) < 64:
            raise ValueError("needs 64 samples")
        return squared_error(net, batch)

    net = mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    reading = measure_stability(net, picky, [(x[:64], y[:64])], optimizer)
    assert reading.edge_ratio is not None
    assert reading.sampling_error is None
    assert any("needs 64 samples" in note for note in reading.notes)


def test_all_modes_near_the_edge_come_with_a_sampling_error_that_is_renewed() -> None:
    """With k="edge" one reading takes several solves; by their number there was no error for five readings."""
    g = torch.Generator().manual_seed(0)
    even = torch.randn(64, 6, generator=g, dtype=torch.float64)
    uneven = even * torch.tensor([0.5, 1.5], dtype=torch.float64).repeat(32)[:, None]
    net = nn.Linear(6, 1, bias=False).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    gauge = Gauge(Solver(k="edge"))

    def half_square(module: Any, batch: Any) -> torch.Tensor:
        return module(batch).square().mean()

    relative = []
    for i in range(21):
        probe = even if i < 10 else uneven
        reading = gauge.measure(net, half_square, [probe], [optimizer], step=i, full_batch=False).reading
        assert len(reading.eigenvalues or ()) > 2
        assert reading.sampling_error is not None
        relative.append(reading.sampling_error / (reading.edge_ratio or 0.0))
    assert relative[:10] == pytest.approx([relative[0]] * 10, rel=1e-9)
    assert relative[10:20] == pytest.approx([relative[10]] * 10, rel=1e-9)
    assert relative[10] != pytest.approx(relative[0], rel=0.05)
