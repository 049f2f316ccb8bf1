"""The exact tier against dense blocks."""

import pytest
import torch
from torch import Tensor, nn

from eos_monitor.cfl.blocks import HessianBlocks
from eos_monitor.cfl.objective import Objective
from eos_monitor.cfl.tiers import CFLGauge, estimate_cfl
from eos_monitor.isolation.sandbox import Sandbox
from tests.cfl.layer_nets import NETS, dense_block, layer_weights, make, top_eigenvalue, train


@pytest.mark.parametrize("name", ["bn-silu-convs", "gated", "recurrent", "mixed-mlp"])
def test_converged_blocks_equal_dense_ones(name: str) -> None:
    net = make(name)
    spec = NETS[name]
    train(name, net, 40)
    weights = layer_weights(net)
    estimates = estimate_cfl(net, spec.loss, [spec.data()], exact=True)
    assert {e.layer for e in estimates} == set(weights)
    for e in estimates:
        truth = top_eigenvalue(dense_block(net, spec.loss, spec.data(), weights[e.layer]))
        # A relative residual of 1e-4 leaves (1e-4)² over the relative gap, which is at least 1 % here.
        assert e.curvature == pytest.approx(truth, rel=1e-6)
        assert e.method == "exact"
        assert e.residual <= 1e-4


@pytest.mark.parametrize("parts", [1, 3, 6], ids=["one", "kept", "rebuilt"])
def test_products_are_means_over_batches_by_their_samples(parts: int) -> None:
    net = make("tanh-mlp")
    spec = NETS["tanh-mlp"]
    x, y = spec.data()
    at = [5 * i for i in range(1, parts)]
    batches = list(zip(x.tensor_split(at), y.tensor_split(at), strict=True))
    weights = [net[2].weight, net[6].weight]
    with Sandbox(net) as sandbox:
        blocks = HessianBlocks(Objective(sandbox, net, spec.loss, batches, [len(b[0]) for b in batches]), weights)
        for i, weight in enumerate(weights):
            expected = dense_block(net, spec.loss, (x, y), weight)
            v = torch.randn(len(expected), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            torch.testing.assert_close(blocks.matvec(i, v), expected @ v, atol=1e-12, rtol=1e-10)
    assert blocks.products == 2


def test_an_unused_weight_has_no_curvature() -> None:
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)}).double()

    def loss(module: nn.ModuleDict, batch: Tensor) -> Tensor:
        return module["used"](batch).square().mean()

    with Sandbox(net) as sandbox:
        objective = Objective(sandbox, net, loss, [torch.randn(4, 3).double()], [4])
        blocks = HessianBlocks(objective, [net["idle"].weight])
        assert not blocks.matvec(0, torch.ones(6).double()).any()


@pytest.mark.slow
def test_three_products_from_the_previous_and_the_cheap_vector() -> None:
    """Along training, ten steps between measurements: k = 3 is within 5 % in at least nine of ten."""
    ratios = []
    for name in ("silu-convs", "transformer", "conv1d", "autoencoder", "bn-silu-convs", "bn-relu-convs", "gated"):
        net = make(name)
        spec = NETS[name]
        gauge = CFLGauge()
        weights = layer_weights(net)
        for state in range(10):
            train(name, net, 10)
            estimates = gauge.measure(net, spec.loss, [spec.data()])
            if state not in (2, 5, 9):
                continue
            for e in estimates:
                if e.method == "exact" and e.products <= 3:  # fewer where the residual was small before; six when cold
                    ratios.append(
                        e.curvature / top_eigenvalue(dense_block(net, spec.loss, spec.data(), weights[e.layer]))
                    )
    found = torch.tensor(ratios)
    assert len(found) > 40
    assert float(found.max()) < 1 + 1e-6  # Ritz values are lower bounds
    assert float(((found - 1).abs() < 0.05).double().mean()) >= 0.9
