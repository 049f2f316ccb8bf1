"""Elastic-SGD: rounds in one process and over gloo processes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eos_monitor.optim import ElasticSGD
from tests.launching import run_script
from tests.optim import elastic_run
from tests.optim.relaxed import Step, make_net, same, stream, weights


def launch(world: int, workers: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    run_script(elastic_run.__file__, world, workers, rounds, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize(
    ("world", "workers"),
    [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)],
)
def test_processes_are_workers(world: int, workers: int, tmp_path: Path) -> None:
    """The same bits on all ranks, in a second launch, and with all workers in one process."""
    ranks = launch(world, workers, 4, tmp_path)
    net = make_net(seed=1)
    optimizer = ElasticSGD(net.parameters(), workers=world * workers, **elastic_run.SETTINGS)
    together = elastic_run.train(optimizer, net, 0, 4)
    for rank in ranks:
        for here, there in zip(together, rank["history"], strict=True):
            assert same(here, there)
        for resumed, straight in zip(rank["resumed"], rank["straight"], strict=True):
            assert same(resumed, straight)
    assert not same(together[0], together[1])


def test_rounds_repeat_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        net = make_net()
        runs.append(elastic_run.train(ElasticSGD(net.parameters(), workers=3, **elastic_run.SETTINGS), net, 0, 4))
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("evaluations", [1, 3])
@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_uncoupled_worker_is_sgd(evaluations: int, momentum: dict[str, Any]) -> None:
    nets = make_net(), make_net()
    settings = {"lr": 0.3, "weight_decay": 0.01, **momentum}
    elastic = ElasticSGD(nets[0].parameters(), workers=1, gamma=math.inf, evaluations=evaluations, **settings)
    ours = Step(nets[0], elastic, stream())
    sgd = Step(nets[1], SGD(nets[1].parameters(), **settings), stream())
    for _ in range(4):
        ours(), sgd(evaluations)
        assert same(weights(nets[0]), weights(nets[1]))


def test_uncoupled_workers_are_runs_of_sgd_and_the_reference_their_mean() -> None:
    net = make_net()
    settings = {**elastic_run.SETTINGS, "gamma": math.inf, "moving_rate": 1.0}
    elastic = ElasticSGD(net.parameters(), workers=3, **settings)
    elastic_run.train(elastic, net, 0, 4)
    alone = []
    for a in range(3):
        single = make_net()
        Step(single, SGD(single.parameters(), lr=0.3, momentum=0.9), stream(100 + a))(8)
        alone.append(weights(single))
        replicas = [elastic.state[p]["replicas"][a] for p in net.parameters()]
        assert same(replicas, alone[-1])
    for p, *copies in zip(net.parameters(), *alone, strict=True):
        # means of three numbers of order one
        torch.testing.assert_close(p.detach(), torch.stack(copies).mean(0), rtol=0, atol=1e-15)


def test_stiff_springs_keep_workers_together() -> None:
    def spread(gamma: float) -> float:
        net = make_net()
        elastic = ElasticSGD(net.parameters(), lr=0.1, workers=3, gamma=gamma, evaluations=5)
        elastic_run.train(elastic, net, 0, 6, evaluations=5)
        return sum(float(elastic.state[p]["replicas"].var(0).sum()) for p in net.parameters())

    assert spread(0.2) < 0.5 * spread(2.0) < 0.5 * spread(math.inf)


def test_equal_workers_have_exactly_their_mean() -> None:
    x = nn.Parameter(torch.rand(1000, generator=torch.Generator().manual_seed(0)))
    before = x.detach().clone()
    optimizer = ElasticSGD([x], workers=7)

    def closure() -> Tensor:
        optimizer.zero_grad()
        (0.0 * x.sum()).backward()
        return x.sum()

    optimizer.step(closure)
    assert torch.equal(x.detach(), before)


def test_workers_are_the_same_in_all_groups() -> None:
    optimizer = ElasticSGD([nn.Parameter(torch.ones(1))], workers=2)
    with pytest.raises(ValueError, match="Expected workers to be the same in all groups, got 3"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "workers": 3})
