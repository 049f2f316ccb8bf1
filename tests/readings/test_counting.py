"""What a sample is, and a loss that is no mean over them: the right number, or said."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.optim import SGD

from eos_monitor import measure_stability
from eos_monitor.isolation.batches import batch_size, in_doubt, split_batch
from eos_monitor.readings.samples import ProbeSamples
from eos_monitor.readings.settings import Probe

N = 10
IMAGES = [torch.rand(3, 8 + i, 8) for i in range(N)]
TARGETS = [{"boxes": torch.rand(1 + i % 3, 4), "labels": torch.zeros(1 + i % 3)} for i in range(N)]

# batch of 10 samples -> whether its parts disagree
BATCHES: dict[str, tuple[Any, bool]] = {
    "images": (IMAGES, False),
    "images-of-one-size": ([torch.rand(3, 8, 8) for _ in range(N)], False),
    "detection": ((IMAGES, TARGETS), False),
    "images-and-labels": ([IMAGES, torch.zeros(N)], False),
    "counter-first": ({"step": torch.tensor([7]), "x": torch.rand(N, 2), "y": torch.rand(N)}, True),
    "counter-and-one": ({"step": torch.tensor([7]), "x": torch.rand(N, 2)}, True),
    "scalar-counter": ({"step": torch.tensor(7), "x": torch.rand(N, 2)}, False),
    "pair": ([torch.rand(N, 2), torch.rand(N)], False),
    "views": ([[torch.rand(N, 3, 4, 4), torch.rand(N, 3, 4, 4)], torch.rand(N)], False),
    "packed": (pack_sequence([torch.rand(4, 2) for _ in range(N)]), False),
}


@pytest.mark.parametrize("name", BATCHES)
def test_samples_are_counted_and_doubt_is_seen(name: str) -> None:
    batch, doubt = BATCHES[name]
    assert batch_size(batch) == N
    assert in_doubt(batch) == doubt


def test_a_probe_of_lists_of_images_fills_up() -> None:
    samples = ProbeSamples(Probe(samples=20))
    samples.observe((IMAGES, TARGETS))
    assert not samples.full
    samples.observe((IMAGES, TARGETS))
    assert samples.full
    assert samples.samples == 20


def test_lists_of_images_are_not_cut_into_channels() -> None:
    assert split_batch(IMAGES, 2) is None


def linear_loss(net: Any, batch: Any) -> Tensor:
    return (net(batch["x"]).squeeze(1) - batch["y"]).square().mean()


def test_batches_with_a_counter_first_are_weighted_by_their_samples() -> None:
    """λ_max(2/N XᵀX) over all rows, by hand."""
    torch.manual_seed(0)
    net = nn.Linear(3, 1, bias=False)
    sizes, scales = (4, 60), (3.0, 1.0)
    batches = [
        {"step": torch.tensor([i]), "x": scale * torch.randn(n, 3), "y": torch.randn(n)}
        for i, (n, scale) in enumerate(zip(sizes, scales, strict=True))
    ]
    reading = measure_stability(net, linear_loss, batches, SGD(net.parameters(), lr=0.1))
    x = torch.cat([batch["x"] for batch in batches]).double()
    assert reading.samples == sum(sizes)
    assert reading.sharpness == pytest.approx(float(torch.linalg.eigvalsh(2 / len(x) * x.T @ x)[-1]), rel=1e-4)
    assert any("batch_size_fn" in note for note in reading.notes)


def squares(reduction: str) -> Any:
    def loss_fn(net: Any, batch: Any) -> Tensor:
        errors = (net(batch["x"]).squeeze(1) - batch["y"]).square()
        return {"sum": errors.sum(), "mean": errors.mean()}[reduction]

    return loss_fn


@pytest.mark.parametrize(("reduction", "known"), [("sum", False), ("mean", True)])
@pytest.mark.parametrize("batches", [1, 3])
def test_slices_that_do_not_add_up_to_the_whole_give_no_error(reduction: str, known: bool, batches: int) -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 1, bias=False)
    given = [{"x": torch.randn(96, 3), "y": torch.randn(96)} for _ in range(batches)]
    optimizer = SGD(net.parameters(), lr=0.001, weight_decay=0.1)
    reading = measure_stability(net, squares(reduction), given, optimizer)
    assert (reading.sampling_error is not None) == known
    assert any("no mean over samples" in note for note in reading.notes) != known


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, batch_first=batch_first)
        self.last = nn.Linear(4, 1)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(x)[0])


def sequence_loss(net: Any, x: Tensor) -> Tensor:
    return (net(x) - x.sum(-1, keepdim=True)).square().mean()


@pytest.mark.parametrize(
    ("batch_first", "batch_size_fn", "said", "known"),
    [
        (True, None, False, True),
        (False, None, True, False),
        (False, lambda x: x.shape[1], False, False),  # slices of time would count each sample eight times
        (False, len, False, True),  # whoever says so has sequences the other way round inside
    ],
)
def test_time_first_is_said_and_not_cut(batch_first: bool, batch_size_fn: Any, said: bool, known: bool) -> None:
    torch.manual_seed(0)
    net = Recurrent(batch_first)
    reading = measure_stability(
        net, sequence_loss, [torch.randn(40, 48, 3)], SGD(net.parameters(), lr=0.01), batch_size_fn=batch_size_fn
    )
    assert any("batch_first=False" in note and "batch_size_fn" in note for note in reading.notes) == said
    assert (reading.sampling_error is not None) == known
