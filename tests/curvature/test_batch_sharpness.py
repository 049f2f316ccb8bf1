"""Batch sharpness, against exact expectations over all batches of small data sets."""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor.curvature.batch_sharpness import batch_sharpness
from eos_monitor.isolation.fingerprint import fingerprint
from eos_monitor.limits.plateau import batch_sharpness_limits
from tests.nets import Problem, dense_hessian, make, mean_loss, squared_error

Pair = tuple[Tensor, Tensor]


def regression(samples: int = 14, features: int = 4, seed: int = 0) -> tuple[nn.Linear, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=g, dtype=torch.float64)
    net = nn.Linear(features, 1, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(1, features, generator=g))
    return net, x, torch.randn(samples, 1, generator=g, dtype=torch.float64)


def ratios(net: nn.Linear, x: Tensor, y: Tensor, rows: Any) -> Any:
    """gᵀHg/‖g‖² of each batch of the rows (m, B), by the formulas of linear regression, in NumPy."""
    w, xs, ys = net.weight.detach().numpy()[0], x.numpy()[rows], y.numpy()[rows][..., 0]
    size = rows.shape[1]
    g = 2 / size * np.einsum("mbd,mb->md", xs, xs @ w - ys)
    hg = 2 / size * np.einsum("mbd,mb->md", xs, np.einsum("mbd,md->mb", xs, g))
    return (g * hg).sum(1) / (g * g).sum(1)


def drawn(x: Tensor, y: Tensor, size: int, seed: int) -> Iterator[Pair]:
    g = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(len(x), generator=g)[:size]
        yield x[rows], y[rows]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_interval_covers_the_exact_expectation(size: int) -> None:
    net, x, y = regression()
    exact = ratios(net, x, y, np.array(list(itertools.combinations(range(len(x)), size)))).mean()
    results = [batch_sharpness(net, squared_error, drawn(x, y, size, seed)) for seed in range(50)]
    assert all(found.converged for found in results)
    # Nominally 95 %; a simulation of the stopping rule alone (2,000 runs a case) gave 93 to 95 %.
    assert sum(found.low <= exact <= found.high for found in results) >= 45
    # The mean over 50 runs of 5 % each.
    assert np.mean([found.value for found in results]) == pytest.approx(exact, rel=4 * 0.05 / math.sqrt(50))


def test_value_error_and_interval_are_those_of_the_ratios() -> None:
    net, x, y = regression()
    rows = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    each = ratios(net, x, y, rows)
    found = batch_sharpness(net, squared_error, [(x[r], y[r]) for r in rows], rtol=0.0, confidence=0.9)
    assert found.value == pytest.approx(each.mean(), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(each), rel=1e-12)
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.9, 3, each.mean(), stats.sem(each)), rel=1e-12)
    assert (found.batches, found.without_gradient, found.converged) == (4, 0, False)


def test_batches_count_equally_whatever_their_size() -> None:
    net, x, y = regression()
    each = [ratios(net, x, y, np.array([rows]))[0] for rows in ([0], [1, 2, 3, 4, 5, 6])]
    found = batch_sharpness(net, squared_error, [(x[:1], y[:1]), (x[1:7], y[1:7])])
    assert found.value == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("name", ["tied", "batch-norm", "dropout", "lstm", "partly-used", "sparse-embedding"])
def test_nets_agree_with_a_dense_hessian(name: str) -> None:
    problem, twin = make(name), make(name.removeprefix("sparse-"))
    expected = []
    for batch in twin.batches:
        single = Problem(twin.module, twin.loss_fn, [batch])
        with torch.random.fork_rng():
            h = dense_hessian(single)
            grads = torch.autograd.grad(
                mean_loss(single, single.trained()), list(single.trained().values()), allow_unused=True
            )
        parts = zip(grads, single.trained().values(), strict=True)
        g = torch.cat([(torch.zeros_like(p) if q is None else q).reshape(-1) for q, p in parts])
        expected.append(float(g @ h @ g / (g @ g)))
    found = batch_sharpness(problem.module, problem.loss_fn, problem.batches)
    assert found.value == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.batches == len(expected)


def test_finite_differences_agree() -> None:
    net, x, y = regression()
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 12, 3)]
    exact = batch_sharpness(net, squared_error, batches)
    found = batch_sharpness(net, squared_error, batches, method="fd")
    assert found.value == pytest.approx(exact.value, rel=1e-7)  # rounding u/h at h = 1e-5


def test_accumulated_windows_are_one_batch_of_equal_means() -> None:
    """Micro-batches of 1 and 3 samples: each mean counts half, as the optimizer sees it."""
    net, x, y = regression()
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 1), (1, 4), (4, 5), (5, 8), (8, 9))]

    def ratio(first: Pair, second: Pair) -> float:
        w = net.weight.detach()[0]
        h = sum(xs.T @ xs / len(xs) for xs, _ in (first, second))
        g = sum(xs.T @ (xs @ w - ys[:, 0]) / len(xs) for xs, ys in (first, second))
        return float(g @ h @ g / (g @ g))

    found = batch_sharpness(net, squared_error, parts, accumulate=2)
    assert found.value == pytest.approx((ratio(*parts[:2]) + ratio(*parts[2:4])) / 2, rel=1e-12)
    assert found.batches == 2  # the fifth is no window


def test_ranks_hold_one_batch_together() -> None:
    """This process with a second one that always holds the same other batch, and ends at the third window."""
    net, x, y = regression()
    calls: list[Tensor] = []

    def sum_over_ranks(local: Tensor) -> Tensor:
        calls.append(local)
        if local.numel() == 1:  # whether a process has run out
            windows = sum(call.numel() == 1 for call in calls)
            return local + float(windows == 3)
        # The other's share of whatever is summed: its gradient, then its product with the mean gradient.
        return local + theirs(local)

    w = net.weight.detach()[0]
    other_x, other_y = x[10:], y[10:]
    h = 2 / 4 * other_x.T @ other_x
    g = 2 / 4 * other_x.T @ (other_x @ w - other_y[:, 0])
    state: dict[str, Tensor] = {}

    def theirs(local: Tensor) -> Tensor:
        share = torch.zeros_like(local)
        share[4] = 1.0  # its weight
        if "direction" not in state:
            mean = (local[:4] + g) / 2
            state["direction"] = mean / mean.norm()
            share[:4] = g
        else:
            share[:4] = h @ state.pop("direction")
        return share

    batches = [(x[i : i + 2], y[i : i + 2]) for i in range(0, 10, 2)]
    found = batch_sharpness(net, squared_error, batches, sum_over_ranks=sum_over_ranks)
    expected = []
    for xs, ys in batches[:2]:
        hh = (2 / 2 * xs.T @ xs + h) / 2
        gg = (2 / 2 * xs.T @ (xs @ w - ys[:, 0]) + g) / 2
        expected.append(float(gg @ hh @ gg / (gg @ gg)))
    assert found.batches == 2
    assert found.value == pytest.approx(np.mean(expected), rel=1e-12)


def test_a_failing_source_does_not_leave_the_other_ranks_waiting() -> None:
    net, x, y = regression()
    told = []

    def source() -> Iterator[Pair]:
        raise OSError("disk")
        yield x, y

    with pytest.raises(OSError, match="disk"):
        batch_sharpness(net, squared_error, source(), sum_over_ranks=lambda t: told.append(float(t)) or t)
    assert told == [1.0]


def test_stops_when_the_error_is_met_and_not_before() -> None:
    net, x, y = regression()
    source = drawn(x, y, 4, 0)
    found = batch_sharpness(net, squared_error, source, rtol=0.1)
    each = ratios(net, x, y, np.array([draw_rows(i) for i in range(found.batches)]))
    errors = [stats.sem(each[:n]) / each[:n].mean() for n in range(10, found.batches + 1)]
    assert errors[-1] <= 0.1
    assert all(error > 0.1 for error in errors[:-1])
    assert next(source)[0].equal(x[draw_rows(found.batches)])  # no batch too many was drawn
    assert batch_sharpness(net, squared_error, drawn(x, y, 4, 0), rtol=0.0, max_batches=12).batches == 12
    assert batch_sharpness(net, squared_error, drawn(x, y, 4, 0), rtol=9.0, min_batches=7).batches == 7


def draw_rows(index: int) -> list[int]:
    g = torch.Generator().manual_seed(0)
    return [torch.randperm(14, generator=g)[:4].tolist() for _ in range(index + 1)][-1]


def test_single_batch_has_no_error() -> None:
    net, x, y = regression()
    found = batch_sharpness(net, squared_error, [(x, y)])
    assert found.value == pytest.approx(ratios(net, x, y, np.arange(14)[None])[0], rel=1e-12)
    assert (found.error, found.low, found.high, found.batches, found.converged) == (None, None, None, 1, False)


def test_batches_without_gradient_are_left_out_and_counted() -> None:
    net, x, y = regression()
    fitted = (x[:3], net(x[:3]).detach())
    found = batch_sharpness(net, squared_error, [(x[:4], y[:4]), fitted, (x[4:8], y[4:8])])
    exact = ratios(net, x, y, np.array([range(4), range(4, 8)])).mean()
    assert found.value == pytest.approx(exact, rel=1e-12)
    assert (found.batches, found.without_gradient) == (2, 1)
    nothing = batch_sharpness(net, squared_error, itertools.repeat(fitted), max_batches=20)
    assert (nothing.value, nothing.error, nothing.batches, nothing.without_gradient) == (None, None, 0, 20)


def test_tiny_gradients_keep_their_direction() -> None:
    """In float32 their squares would underflow."""
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1e-25, 0.0]]))
    found = batch_sharpness(net, squared_error, [(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 1))])
    assert found.value == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["batch-norm", "dropout"])
def test_nothing_changes(name: str) -> None:
    problem = make(name)
    for p in problem.module.parameters():
        p.grad = torch.ones_like(p)
    before = fingerprint(problem.module, also={"batches": problem.batches})
    batch_sharpness(problem.module, problem.loss_fn, problem.batches)
    assert before.changes(fingerprint(problem.module, also={"batches": problem.batches})) == []


def test_loader_that_shuffles_by_the_global_generator_gives_different_batches_and_leaves_it_alone() -> None:
    net, x, y = regression()
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    seen: list[Tensor] = []

    def endless() -> Iterator[Any]:
        while True:
            yield next(iter(loader))

    def loss(module: Any, batch: Any) -> Tensor:
        seen.append(batch[0])
        return squared_error(module, batch)

    state = torch.get_rng_state()
    batch_sharpness(net, loss, endless(), rtol=0.0, max_batches=10)
    assert torch.equal(state, torch.get_rng_state())
    assert len({tuple(batch.flatten().tolist()) for batch in seen}) == 10


def test_params_restrict_the_directions() -> None:
    net = nn.Linear(3, 1).double()
    x, y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.ones(5, 1).double()
    found = batch_sharpness(net, squared_error, [(x, y)], params=[net.bias])
    assert found.value == pytest.approx(2.0)  # of the mean of (b + …)²


def test_wrong_arguments_are_errors() -> None:
    net, x, y = regression()

    def call(batches: Any = ((x, y),), loss: Any = squared_error, **arguments: Any) -> Any:
        return batch_sharpness(net, loss, batches, **arguments)

    with pytest.raises(ValueError, match="at least 1 batch"):
        call([])
    with pytest.raises(ValueError, match="at least 3 batch"):
        call([(x, y)] * 2, accumulate=3)
    with pytest.raises(RuntimeError, match="finite loss, got nan"):
        call([(x[:0], y[:0])])
    with pytest.raises(RuntimeError, match="finite loss, got nan"):
        call(loss=lambda m, b: m(b[0]).mean() * math.nan)
    with pytest.raises(RuntimeError, match="scalar tensor"):
        call(loss=lambda m, b: m(b[0]))
    for arguments, message in (
        ({"rtol": -1.0}, "`rtol`"),
        ({"min_batches": 1}, "`min_batches`"),
        ({"min_batches": 5, "max_batches": 4}, "`max_batches`"),
        ({"confidence": 1.0}, "`confidence`"),
        ({"accumulate": 0}, "`accumulate`"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameter"):
        call()


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]


class Renamed(torch.optim.SGD):
    pass


class Other(torch.optim.SGD):
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("cls", "settings", "lines"),
    [
        (torch.optim.SGD, {}, (20.0, 20.0)),
        (torch.optim.SGD, {"momentum": 0.9}, (2.0, 38.0)),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.9}, (20.0, 380.0)),
        (torch.optim.SGD, {"dampening": 0.9}, (20.0, 20.0)),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 1.0}, None),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, None),
        (torch.optim.SGD, {"maximize": True}, None),
        (torch.optim.SGD, {"lr": 0.0}, None),
        (Renamed, {"momentum": 0.5}, (10.0, 30.0)),
        (Other, {}, None),
        (torch.optim.Adam, {}, None),
    ],
)
def test_limits(cls: Any, settings: dict[str, Any], lines: tuple[float, float] | None) -> None:
    found = batch_sharpness_limits(cls(params(), **{"lr": 0.1, **settings}))
    assert found == (None if lines is None else pytest.approx(lines))


def test_limits_of_groups_and_several_optimizers() -> None:
    a, b = params()
    sgd = torch.optim.SGD
    assert batch_sharpness_limits(sgd([{"params": [a]}, {"params": [b], "weight_decay": 0.1}], lr=0.1)) is not None
    assert batch_sharpness_limits(sgd([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1)) is None
    assert batch_sharpness_limits([sgd([a], lr=0.1), sgd([b], lr=0.1)]) == pytest.approx((20.0, 20.0))
    assert batch_sharpness_limits([sgd([a], lr=0.1), torch.optim.Adam([b])]) is None
    assert batch_sharpness_limits([]) is None


def test_dampening_is_heavy_ball_with_a_shorter_learning_rate() -> None:
    """The identity behind the line for dampening: the same trajectory, once the buffers agree."""
    runs = []
    for lr, dampening in ((0.1, 0.6), (0.04, 0.0)):
        x = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizer = torch.optim.SGD([x], lr=lr, momentum=0.8, dampening=dampening)
        optimizer.state[x]["momentum_buffer"] = torch.zeros_like(x)
        for _ in range(20):
            optimizer.zero_grad()
            (x.square() * torch.tensor([1.0, 3.0]).double()).sum().backward()
            optimizer.step()
        runs.append(copy.deepcopy(x.detach()))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=0.0)
