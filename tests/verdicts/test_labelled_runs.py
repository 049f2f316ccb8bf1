"""The labelled runs: their batched optimizers against torch's, their edge ratios against dense Hessians, their labels;
and a slice of the suite itself, and runs that hover at the edge, under the detector."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from eos_monitor import Verdict
from tests.benchmarks.detector_nets import NETS
from tests.benchmarks.detector_scores import JUMPS, STATISTICS, detect
from tests.benchmarks.detector_simulation import OPTIMIZERS, Plan, Simulation, top_eigenpair
from tests.benchmarks.labelled_runs import SCENARIOS, Run, base_lr, failure, load, plan, record, shards

# torch.func warns of torch's own use of torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")

TORCH: dict[str, Any] = {
    "GD": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "heavy ball": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "Nesterov": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr, betas=(0.9, 0.99)),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.999), weight_decay=0.01),
    "SGD, batches": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "heavy ball, batches": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_batched_optimizer_is_torchs_for_every_run(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    lrs = torch.tensor([[0.01], [0.1], [0.3]], dtype=torch.float64)
    gradients = torch.randn(12, 3, 7, generator=generator, dtype=torch.float64)
    weights = start.clone()
    optimizer = OPTIMIZERS[name]
    state = optimizer.start(weights)
    for step, g in enumerate(gradients):
        weights = optimizer.update(weights, g, lrs, state, step)
    for run in range(3):
        p = torch.nn.Parameter(start[run].clone())
        theirs = TORCH[name]([p], float(lrs[run]))
        for g in gradients:
            p.grad = g[run].clone()
            theirs.step()
        # the same operations in another order: rounding of a dozen steps
        torch.testing.assert_close(weights[run], p.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_batched_critical_curvature_is_the_packages(name: str) -> None:
    """Written out twice, from theory; Adam's v here corrected for the steps it has seen, there for one more."""
    from eos_monitor import critical_curvature

    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1, 5, generator=generator, dtype=torch.float64)
    weights, optimizer, lr = start.clone(), OPTIMIZERS[name], torch.full((1, 1), 0.05, dtype=torch.float64)
    state = optimizer.start(weights)
    p = torch.nn.Parameter(start[0].clone())
    theirs = TORCH[name]([p], 0.05)
    for step in range(40):
        g = torch.randn(1, 5, generator=generator, dtype=torch.float64)
        weights = optimizer.update(weights, g, lr, state, step)
        p.grad = g[0].clone()
        theirs.step()
    expected = critical_curvature(theirs).c
    assert expected is not None
    beta2 = optimizer.betas[1] if optimizer.betas else 0.0
    found = optimizer.critical_curvature(lr, state, 40).expand(1, 5)[0] * ((1 - beta2**40) / (1 - beta2**41)) ** 0.5
    # eps stands beside the corrected root
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_batched_lanczos_finds_the_top_of_each_operator() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 9, 9, generator=generator, dtype=torch.float64)
    a = a + a.transpose(1, 2)
    start = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    value, vector, residual = top_eigenpair(lambda v: (a @ v[..., None])[..., 0], start, 9)
    values, vectors = torch.linalg.eigh(a)
    torch.testing.assert_close(value, values[:, -1])
    torch.testing.assert_close((vector * vectors[:, :, -1]).sum(1).abs(), torch.ones(4, dtype=torch.float64))
    assert residual.max() < 1e-6


@pytest.mark.parametrize("name", [name for name in NETS if NETS[name].size < 5000])
def test_recorded_edge_ratio_is_that_of_the_dense_hessian(name: str) -> None:
    net = NETS[name]
    simulation = Simulation(net, OPTIMIZERS["GD"], [Plan(3, np.full(35, 1e-6), np.ones(35))])
    weights = simulation.weights[0].clone()
    simulation.run()
    _, row = simulation.readings[-1]  # the weights have hardly moved, and the start vector is warm
    x, y = simulation.x[0], simulation.y[0]

    def product(v: np.ndarray) -> np.ndarray:
        vector = torch.as_tensor(v, dtype=torch.float32).flatten()
        return torch.autograd.functional.hvp(lambda w: net.loss(w, x, y), weights, vector)[1].numpy()

    operator = LinearOperator((net.size, net.size), matvec=product, dtype=np.float32)
    top = float(eigsh(operator, k=1, which="LA", tol=1e-4, v0=np.ones(net.size), return_eigenvectors=False)[0])
    # the residual after four readings is a percent or so, and the error of the value far less
    assert row[0, 0] == pytest.approx(1e-6 * top / 2, rel=0.01)


@pytest.mark.parametrize(
    ("loss", "onset"),
    [
        ([1.0] * 300, None),
        ([1.0] * 100 + [50.0] * 30 + [1.0] * 170, None),
        ([1.0] * 100 + [50.0] * 200, 100),
        ([10.0] * 5 + [1.0] * 95 + [9.0] * 200, None),  # below its start
        ([1.0] * 100 + [4.0, 40.0, 400.0, math.nan], 100),
        ([1.0] * 100 + [4.0] + [1.0] * 50 + [40.0, math.inf], 151),
    ],
    ids=["calm", "comes-back", "stays", "below-start", "blows-up", "last-excursion-counts"],
)
def test_failures_by_their_outcome(loss: list[float], onset: int | None) -> None:
    assert failure(np.array(loss)) == onset


def test_suite_is_as_large_and_as_varied_as_it_says() -> None:
    whole = shards()
    assert len({shard.net for shard in whole}) >= 6
    assert len({shard.optimizer for shard in whole}) >= 7
    assert len(SCENARIOS) >= 12
    assert sum(len(shard.scenarios) for shard in whole) >= 400
    assert min(net.size for net in NETS.values()) >= 1000
    assert max(net.size for net in NETS.values()) == pytest.approx(1e6, rel=0.01)


@pytest.mark.slow
def test_slice_of_the_suite_meets_the_targets(tmp_path: Path) -> None:
    """Seeds of its own. 84 runs cannot prove a rate; they show that the rules still do what docs/detector.md says."""
    for shard in shards(reduced=True):
        record(shard, 99, tmp_path)
    said = [detect(run) for run in load(tmp_path, [99])]
    found = {name: statistic(said) for name, statistic in {**STATISTICS, **JUMPS}.items()}
    assert len(said) >= 80
    assert sum(s.run.label.kind == "edge" for s in said) >= 20
    assert found["failures called"] >= 0.8
    assert found["false per 10⁴"] <= 2.0
    assert found["edge runs called"] <= 0.08
    assert found["failing jumps flagged"] >= 0.75


def hovering(net_name: str, factors: tuple[float, ...], steps: int) -> list[Run]:
    net, optimizer = NETS[net_name], OPTIMIZERS["GD"]
    base = base_lr(net, optimizer)
    warm = np.minimum(1.0, (np.arange(steps) + 1) / 60)
    done = Simulation(net, optimizer, [Plan(900 + i, base * f * warm, np.ones(steps)) for i, f in enumerate(factors)])
    done.run()
    read, check = (np.stack([row for _, row in rows], 1) for rows in (done.readings, done.checks))
    return [
        Run(
            net=net_name,
            optimizer=optimizer,
            scenario="hover",
            seed=p.seed,
            lr=p.lr,
            **{key: series[i] for key, series in done.series.items()},
            read_at=np.array([step for step, _ in done.readings]),
            read=read[i],
            check_at=np.array([step for step, _ in done.checks]),
            check=check[i],
            jump_at=None,
            shift_at=None,
            fault_at=None,
        )
        for i, p in enumerate(done.plans)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["ReLU MLP, digits, squared", "GELU MLP, tumours, squared", "tanh MLP, sines, squared"])
def test_thousand_steps_at_the_edge_are_edge_or_restrained_and_small_rates_are_calm(net: str) -> None:
    *high, low = hovering(net, (4.5, 5.5, 7.0, 0.2), 1500)
    at_edge = 0
    for run in high:
        late = run.check[run.check_at >= 500]
        if run.label.onset is not None or np.nanmedian(late) < 0.9:
            continue  # it did not hover
        at_edge += 1
        verdicts = detect(run).verdicts
        assert verdicts is not None
        assert Verdict.DIVERGING not in verdicts
        assert np.isin(verdicts[500:], (Verdict.EDGE, Verdict.RESTRAINED)).mean() >= 0.6
    assert at_edge >= 2
    calm = detect(low).verdicts
    assert calm is not None
    assert np.isin(calm[100:], (Verdict.STABLE, Verdict.SHARPENING)).mean() >= 0.95


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_plans_are_reproducible_and_positive(scenario: str) -> None:
    first, second = (plan(scenario, 0.1, 300, 5) for _ in range(2))
    assert np.array_equal(first.lr, second.lr)
    assert np.array_equal(first.inputs, second.inputs)
    assert (first.lr > 0).all()
    assert len(first.lr) == len(first.inputs) == 300


def test_counts_of_the_advisory_are_those_of_the_page() -> None:
    """The page is written from the runs; the numbers that the advisory quotes must not fall behind it."""
    from eos_monitor.verdicts.jump_risk import _FAILED

    page = (Path(__file__).parents[2] / "docs" / "detector.md").read_text(encoding="utf-8")
    table = page.partition("<!-- bench:risks -->\n")[2].partition("<!-- end -->")[0].splitlines()[2:]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in table]
    found = {name: tuple(tuple(int(n) for n in part.split(" of ")) for part in parts) for name, *parts in rows}
    assert found == _FAILED
