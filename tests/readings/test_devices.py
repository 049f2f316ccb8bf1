"""What a user has set for their own tensors, and probes without an end."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from eos_monitor import Probe, StabilityProbe, measure_stability


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A default device on which no number can be read."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def make(kind: Any) -> tuple[nn.Module, Any, tuple[Tensor, Tensor]]:
    with torch.device("cpu"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        return net, kind(net.parameters(), lr=0.01), (torch.randn(32, 4), torch.randint(0, 2, (32,)))


def cross_entropy(net: Any, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def trained_reading(kind: Any, request: pytest.FixtureRequest | None) -> Any:
    """A reading after 40 steps; the default device is set between, because optimizers make their state on it."""
    net, optimizer, batch = make(kind)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy(net, batch).backward()
        optimizer.step()
    if request is not None:
        request.getfixturevalue("elsewhere")
    return measure_stability(net, cross_entropy, [batch], optimizer)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_readings_are_the_same_whatever_the_default_device(kind: Any, request: pytest.FixtureRequest) -> None:
    expected = trained_reading(kind, None)
    found = trained_reading(kind, request)
    assert found.edge_ratio == expected.edge_ratio is not None
    assert found.error == expected.error
    assert found.sampling_error == expected.sampling_error


def test_one_reading_with_finite_differences_and_several_eigenvalues(elsewhere: None) -> None:
    net, optimizer, batch = make(SGD)
    for settings in ({"k": 3}, {"method": "fd"}, {"k": "edge", "raw_sharpness": True}):
        assert measure_stability(net, cross_entropy, [batch], optimizer, **settings).edge_ratio is not None


@pytest.mark.parametrize("samples", [64, 100])
def test_a_probe_without_an_end_is_read_up_to_its_samples(samples: int) -> None:
    net, optimizer, batch = make(SGD)
    taken = []

    def endless() -> Iterator[Any]:
        for i in itertools.count():
            taken.append(i)
            yield batch

    probe = StabilityProbe(net, optimizer, cross_entropy, every_n_steps=1, probe=Probe(endless(), samples=samples))
    reading = probe.step(batch)
    assert reading is not None
    assert len(taken) == -(-samples // 32)
    assert reading.samples == 32 * len(taken)


def test_a_probe_of_some_length_is_read_whole() -> None:
    net, optimizer, batch = make(SGD)
    probe = StabilityProbe(net, optimizer, cross_entropy, every_n_steps=1, probe=Probe([batch] * 5, samples=64))
    reading = probe.step(batch)
    assert reading is not None
    assert reading.samples == 160
