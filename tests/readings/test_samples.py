"""The data that readings are taken on: whole batches, copied, on the CPU."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor.curvature.spread import couples_samples
from eos_monitor.isolation.batches import batch_tensors
from eos_monitor.readings import samples as samples_module
from eos_monitor.readings.samples import ProbeSamples
from eos_monitor.readings.settings import Probe

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    label: str


BATCHES: dict[str, Callable[[int], Any]] = {
    "tensor": lambda n: torch.ones(n, 2),
    "tuple": lambda n: (torch.ones(n, 2), torch.zeros(n)),
    "list": lambda n: [torch.ones(n, 2), "words"],
    "dict": lambda n: {"x": torch.ones(n, 2), "meta": {"ids": torch.zeros(n)}},
    "ordered-dict": lambda n: OrderedDict(x=torch.ones(n, 2), y=torch.zeros(n)),
    "namedtuple": lambda n: Pair(torch.ones(n, 2), torch.zeros(n)),
    "dataclass": lambda n: Sample(torch.ones(n, 2), "a"),
    "nested": lambda n: {"pairs": [Pair(torch.ones(n, 2), (torch.zeros(n), Sample(torch.ones(n), "b")))]},
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_any_structure_are_kept_whole(name: str) -> None:
    probe = ProbeSamples(Probe(samples=10))
    for n in (4, 5, 6, 7):
        probe.observe(BATCHES[name](n))
    assert probe.full
    assert probe.whole
    assert (probe.samples, probe.seen) == (15, 3)
    kept = probe.on(CPU, None)
    assert [type(batch) for batch in kept] == [type(BATCHES[name](1))] * 3
    assert [next(batch_tensors(batch)).shape[0] for batch in kept] == [4, 5, 6]


@pytest.mark.parametrize("name", BATCHES)
def test_batches_are_copied(name: str) -> None:
    batch = BATCHES[name](4)
    probe = ProbeSamples(Probe(samples=4))
    probe.observe(batch)
    for tensor in batch_tensors(batch):
        tensor.fill_(9.0)  # the training step edits it in place
    assert all(float(t.max()) <= 1.0 for t in batch_tensors(probe.on(CPU, None)[0]))


def test_what_is_kept_is_not_handed_out_to_be_edited_by_a_loss_twice() -> None:
    """The sandbox copies too; here only that the same objects come each time."""
    probe = ProbeSamples(Probe(samples=1))
    probe.observe(torch.ones(2))
    assert torch.equal(probe.on(CPU, None)[0], probe.on(CPU, None)[0])


def test_kept_on_the_cpu_and_moved_for_the_reading() -> None:
    probe = ProbeSamples(Probe(samples=1))
    probe.observe({"x": torch.ones(2, 3)})
    assert probe.batches[0]["x"].device == CPU
    assert probe.on(torch.device("meta"), None)[0]["x"].device.type == "meta"
    assert probe.batches[0]["x"].device == CPU


def test_inference_mode_batches_become_ordinary() -> None:
    probe = ProbeSamples(Probe(samples=1))
    with torch.inference_mode():
        batch = torch.ones(2)
    probe.observe(batch)
    assert not probe.batches[0].is_inference()


def test_batch_size_fn_counts_the_samples() -> None:
    probe = ProbeSamples(Probe(samples=6, batch_size_fn=lambda batch: batch.shape[1]))
    probe.observe(torch.ones(1, 4))
    assert not probe.full
    probe.observe(torch.ones(1, 4))
    assert probe.full
    assert probe.samples == 8


def test_nothing_is_taken_after_it_is_full() -> None:
    probe = ProbeSamples(Probe(samples=3))
    for _ in range(3):
        probe.observe(torch.ones(3))
    assert (len(probe.batches), probe.seen) == (1, 1)


def test_closing_makes_do_with_what_there_is() -> None:
    probe = ProbeSamples(Probe(samples=100))
    probe.close()  # nothing yet: an epoch without a batch
    assert not probe.full
    probe.observe(torch.ones(3))
    assert not probe.full
    probe.close()
    assert probe.full
    probe.observe(torch.ones(3))
    assert (probe.samples, probe.describe()) == (3, "the first 3 training samples")


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """A memory limit of 1 MB instead of 256: a sample of the tests is 100 kB."""
    monkeypatch.setattr(samples_module, "_MAX_BYTES", 2**20)
    return 2**20


def wide(n: int) -> Tensor:
    return torch.arange(n, dtype=torch.float32)[:, None].expand(n, 25_000).clone()


@pytest.mark.usefixtures("limit")
def test_memory_ends_the_collection() -> None:
    probe = ProbeSamples(Probe(samples=1000))
    for _ in range(10):
        probe.observe(wide(4))
    assert probe.full
    assert probe.whole
    assert (probe.samples, probe.seen) == (12, 3)  # 400 kB each: the third passes 1 MB


@pytest.mark.usefixtures("limit")
def test_batch_over_the_limit_is_cut_into_slices() -> None:
    probe = ProbeSamples(Probe(samples=1000))
    batch = {"x": wide(45), "y": torch.arange(45), "name": "a"}  # 4.5 MB
    probe.observe(batch)
    assert probe.full
    assert not probe.whole
    assert probe.seen == 1
    assert all(samples_module._bytes(piece) <= 2**20 for piece in probe.batches)
    # The first samples, in order, each tensor cut alike.
    kept = torch.cat([piece["y"] for piece in probe.batches])
    assert kept.tolist() == list(range(probe.samples))
    assert torch.equal(torch.cat([piece["x"] for piece in probe.batches]), batch["x"][: probe.samples])
    assert {piece["name"] for piece in probe.batches} == {"a"}
    assert probe.samples >= 10


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("wanted", [5, 1])
def test_slices_stop_at_the_samples_wanted(wanted: int) -> None:
    probe = ProbeSamples(Probe(samples=wanted))
    probe.observe(wide(45))
    assert len(probe.batches) == 1
    assert not probe.whole


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize(
    "batch",
    [
        lambda: (wide(20), torch.zeros(3)),
        lambda: (wide(20), torch.tensor(1.0)),
        lambda: {"x": wide(20), "mask": torch.ones(25_000, 1)},
    ],
    ids=["other-length", "scalar", "other-dimension"],
)
def test_batch_over_the_limit_that_cannot_be_cut_is_refused(batch: Callable[[], Any]) -> None:
    probe = ProbeSamples(Probe())
    with pytest.raises(ValueError, match=r"Expected a batch of at most 1 MB, or tensors that share .* Pass smaller"):
        probe.observe(batch())


def test_the_limit_is_256_megabytes() -> None:
    assert samples_module._MAX_BYTES == 256 * 2**20


def test_current_batch_as_probe() -> None:
    probe = ProbeSamples(Probe("batch"))
    assert probe.full
    current = torch.ones(3)
    probe.observe(current)
    assert probe.batches == []
    assert probe.on(CPU, current)[0] is current
    assert probe.on(CPU, None) == []
    assert probe.describe() == "the current batch"


def test_given_batches_are_read_once_without_moving_the_generator() -> None:
    reads = []

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            reads.append(torch.rand(1))
            return iter([torch.ones(2), torch.ones(3)])

    probe = ProbeSamples(Probe(Loader()))
    before = torch.get_rng_state()
    assert probe.full
    assert [len(batch) for batch in probe.on(CPU, None)] == [2, 3]
    assert [len(batch) for batch in probe.on(CPU, torch.ones(9))] == [2, 3]
    assert len(reads) == 1
    assert torch.equal(torch.get_rng_state(), before)
    assert probe.describe() == "the batches given"


def test_data_loader_as_probe() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10.0)), batch_size=4, shuffle=True)
    kept = ProbeSamples(Probe(loader)).on(CPU, None)
    assert sorted(torch.cat([batch[0] for batch in kept]).tolist()) == list(range(10))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "Expected `probe` to be one of .* got 'random'", {"batches": "random"}),
        (TypeError, "Expected `probe` to be one of .* got int", {"batches": 5}),
        (ValueError, "Expected `samples` >= 1 or None, got 0", {"samples": 0}),
    ],
    ids=["name", "type", "samples"],
)
def test_arguments_that_are_refused(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        Probe(**arguments)


def test_batch_without_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a batch with a tensor, got list"):
        ProbeSamples(Probe()).observe(["words"])


@pytest.mark.usefixtures("limit")
def test_a_batch_over_the_limit_of_which_all_slices_are_kept_is_whole() -> None:
    probe = ProbeSamples(Probe(samples=1000))
    probe.observe(wide(11))  # 1.1 MB in two slices, of which the second passes the limit
    assert (probe.samples, len(probe.batches), probe.whole, probe.full) == (11, 2, True, True)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize(("wanted", "whole"), [(5, False), (6, True), (11, True)])
def test_a_probe_is_whole_unless_a_slice_was_left(wanted: int, whole: bool) -> None:
    probe = ProbeSamples(Probe(samples=wanted))
    probe.observe(wide(11))
    assert probe.full
    assert probe.whole is whole
    assert probe.samples == (11 if whole else 5)


@pytest.mark.usefixtures("limit")
def test_a_batch_that_cannot_be_cut_is_refused_with_its_sizes() -> None:
    with pytest.raises(ValueError, match=r"got 1 MB and first dimensions \[0, 3, 20\]"):
        ProbeSamples(Probe()).observe((wide(20), torch.tensor(1.0), torch.zeros(3)))


@pytest.mark.usefixtures("limit")
def test_memory_counts_all_tensors_of_a_batch() -> None:
    probe = ProbeSamples(Probe(samples=1000))
    half = {"x": wide(2), "more": [wide(2)], "name": "a"}  # 400 kB together
    for _ in range(9):
        probe.observe(half)
    assert (probe.seen, probe.samples) == (3, 6)


def test_a_batch_of_exactly_what_is_wanted_fills_the_probe() -> None:
    probe = ProbeSamples(Probe(samples=6))
    probe.observe(torch.ones(5))
    assert not probe.full
    probe.observe(torch.ones(1))
    assert probe.full


@pytest.mark.parametrize(("wanted", "processes", "each"), [(8, 1, 8), (8, 2, 4), (9, 2, 5), (10, 4, 3), (1, 4, 1)])
def test_processes_share_the_samples(wanted: int, processes: int, each: int) -> None:
    probe = ProbeSamples(Probe(samples=wanted))
    probe.share(processes)
    while not probe.full:
        probe.observe(torch.ones(1))
    assert probe.samples == each
    assert each * processes >= wanted > (each - 1) * processes


def test_batches_are_halved_once() -> None:
    probe = ProbeSamples(Probe(samples=8))
    probe.observe(torch.arange(5.0))
    probe.observe({"x": torch.arange(4.0)})
    assert probe.whole
    assert not probe.halved
    assert probe.halve()
    assert (probe.halved, probe.whole) == (True, False)
    first, second, third, fourth = probe.on(CPU, None)
    assert torch.equal(torch.cat([first, second]), torch.arange(5.0))
    assert torch.equal(torch.cat([third["x"], fourth["x"]]), torch.arange(4.0))
    assert {len(first), len(second)} == {2, 3}
    assert not probe.halve()
    assert len(probe.on(CPU, None)) == 4


@pytest.mark.parametrize("last", [torch.ones(1), (torch.ones(4), torch.ones(3))], ids=["one-sample", "two-lengths"])
def test_batches_of_which_one_has_no_half_stay(last: Any) -> None:
    probe = ProbeSamples(Probe(samples=100))
    probe.observe(torch.ones(4))
    probe.observe(last)
    assert not probe.halve()
    assert (probe.halved, probe.whole, len(probe.batches)) == (False, True, 2)
    assert not ProbeSamples(Probe(samples=4)).halve()  # nothing was collected


def test_closing_twice_is_closing_once_and_other_kinds_are_always_full() -> None:
    probe = ProbeSamples(Probe(samples=100))
    probe.observe(torch.ones(3))
    probe.close()
    probe.close()
    assert probe.full
    given = ProbeSamples(Probe([torch.ones(2)]))
    given.observe(torch.ones(5))
    assert (given.full, given.batches, given.seen) == (True, [], 0)


@pytest.mark.parametrize(
    ("layer", "coupled"),
    [
        (nn.BatchNorm1d(3), True),
        (nn.BatchNorm1d(3).eval(), False),
        (nn.BatchNorm2d(3, track_running_stats=False).eval(), True),
        (nn.LayerNorm(3), False),
        (nn.Dropout(), False),
    ],
    ids=["training", "eval", "without-running-statistics", "layer-norm", "dropout"],
)
def test_batch_statistics_couple_samples(layer: nn.Module, coupled: bool) -> None:
    assert couples_samples(nn.Sequential(nn.Linear(3, 3), layer)) is coupled
