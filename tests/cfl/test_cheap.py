"""T + GN against dense blocks of the Hessian that share no code with it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from eos_monitor.cfl.capture import capture
from eos_monitor.cfl.curvature_terms import CurvatureTerms, curvature_terms
from eos_monitor.cfl.layer_curvature import LayerCurvature
from eos_monitor.cfl.linear_maps import WeightMap
from eos_monitor.cfl.objective import Objective
from eos_monitor.cfl.tiers import CFLGauge
from eos_monitor.curvature.lanczos import lanczos
from eos_monitor.isolation.sandbox import Sandbox
from tests.cfl.layer_nets import (
    COUPLED,
    NETS,
    UNCOUPLED,
    dense_block,
    layer_weights,
    make,
    states,
    top_eigenvalue,
    train,
)

EXACT = 16  # probes; more than any net here has outputs, the autoencoder (64) apart


def terms_of(net: nn.Module, loss: Callable[..., Tensor], batches: list[Any], probes: int = EXACT) -> CurvatureTerms:
    samples = [len(batch[0]) for batch in batches]
    generator = torch.Generator().manual_seed(0)
    with Sandbox(net) as sandbox:
        return curvature_terms(
            Objective(sandbox, net, loss, batches, samples),
            list(net.parameters()),
            wanted=lambda name: True,
            probes=probes,
            generator=generator,
        )


def matrix(layer: LayerCurvature) -> Tensor:
    return torch.stack([layer.matvec(row) for row in torch.eye(layer.parameter.numel(), dtype=torch.float64)])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", [n for n in NETS if n != "autoencoder"])
def test_layers_in_exact_form_are_exact(name: str) -> None:
    """Nothing is left out behind the last layers, whatever lies between them and the loss: the whole block is right."""
    net = make(name)
    spec = NETS[name]
    train(name, net, 20)
    batch = spec.data()
    exact = {k: v for k, v in terms_of(net, spec.loss, [batch]).layers.items() if v.surroundings.form == "exact-form"}
    assert len(exact) >= 1
    for layer in exact.values():
        if layer.parameter.numel() <= 330:
            # Rounding of sums over some 1e4 entries.
            assert relative(matrix(layer), dense_block(net, spec.loss, batch, layer.parameter)) < 1e-9


@pytest.mark.parametrize("step", [0, 100])
def test_relu_nets_with_exact_gauss_newton(step: int) -> None:
    net = make("strange-convs")
    spec = NETS["strange-convs"]
    train("strange-convs", net, step)
    for layer in terms_of(net, spec.loss, [spec.data()]).layers.values():
        truth = top_eigenvalue(dense_block(net, spec.loss, spec.data(), layer.parameter))
        found = lanczos(layer.matvec, size=layer.parameter.numel(), dtype=torch.float64, rtol=1e-3)
        assert layer.surroundings.form == "exact-form"
        assert float(found.eigenvalues[0]) == pytest.approx(truth, rel=1e-3)
    for estimate in CFLGauge().measure(net, spec.loss, [spec.data()], refine=False):
        assert estimate.transition_share == pytest.approx(0.0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", UNCOUPLED)
def test_quality_without_coupling(name: str) -> None:
    spec = NETS[name]
    found = []
    expected = []
    first = 0
    among = 0
    for _, net in states(name):
        truth = {k: top_eigenvalue(dense_block(net, spec.loss, spec.data(), w)) for k, w in layer_weights(net).items()}
        estimates = CFLGauge().measure(net, spec.loss, [spec.data()], refine=False)
        order = [e.layer for e in estimates if e.method == "cheap"]
        by_name = {e.layer: e.curvature for e in estimates}
        found += [by_name[k] for k in truth]
        expected += list(truth.values())
        place = order.index(max(truth, key=lambda k: truth[k]))
        first = first + (place == 0)
        among = among + (place < 3)
    ratios = torch.tensor(found) / torch.tensor(expected)
    assert float(ratios.min()) >= 0.5
    assert float(ratios.max()) <= 1.6
    assert spearmanr(found, expected)[0] >= 0.97
    assert among == 4
    # One state in four is what the 85 % over all nets allow a net; the transformer needs it.
    assert first >= 3
    if name != "tanh-mlp":  # a deep smooth net: 0.90 here, because first layers lack the curvature of all later ones
        assert 0.95 <= float(ratios.median()) <= 1.05


@pytest.mark.parametrize("name", [n for n in COUPLED if n != "last-norm"])
def test_coupled_layers_are_called_weak(name: str) -> None:
    net = make(name)
    spec = NETS[name]
    weak = {e.layer for e in CFLGauge().measure(net, spec.loss, [spec.data()], refine=False) if e.form == "weak"}
    expected = {
        "bn-relu-convs": {"0", "3"},
        "bn-silu-convs": {"0", "3"},
        "squeeze-excite": {"c1", "c2", "c3"},
        "gated": {"inlet", "g1", "v1", "d1"},
        "recurrent": {"inlet", "again"},
    }
    assert weak == expected[name]


def test_a_norm_that_nothing_bypasses_makes_layers_weak() -> None:
    forms = {}
    for name in ("transformer", "last-norm"):
        spec = NETS[name]
        estimates = CFLGauge().measure(make(name), spec.loss, [spec.data()], refine=False)
        forms[name] = {e.layer for e in estimates if e.form == "weak"}
    assert forms == {"transformer": set(), "last-norm": {"qkv", "up"}}


def test_batches_are_added_by_their_samples() -> None:
    """The operator of several batches is the mean of theirs: no averaging of eigenvalues, none of batch statistics."""
    spec = NETS["bn-silu-convs"]
    net = make("bn-silu-convs")
    x, y = spec.data()
    batches = [(x[:60], y[:60]), (x[60:], y[60:])]
    both = terms_of(net, spec.loss, batches).layers["6"]
    parts = [matrix(terms_of(net, spec.loss, [batch]).layers["6"]) for batch in batches]
    expected = (60 * parts[0] + 36 * parts[1]) / 96
    assert relative(matrix(both), expected) < 1e-10
    assert top_eigenvalue(expected) < (60 * top_eigenvalue(parts[0]) + 36 * top_eigenvalue(parts[1])) / 96


@pytest.mark.parametrize("name", ["silu-convs", "conv1d", "mixed-mlp"])
def test_cut_graph_agrees_with_the_closed_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make(name)
    spec = NETS[name]
    train(name, net, 30)
    closed = terms_of(net, spec.loss, [spec.data()], 4).layers
    assert not any(layer.cut for layer in closed.values())
    monkeypatch.setattr("eos_monitor.cfl.curvature_terms.activation_terms", lambda *_: {})
    cut = terms_of(net, spec.loss, [spec.data()], 4).layers
    assert any(layer.cut for layer in cut.values())
    for key, layer in closed.items():
        v = torch.randn(layer.parameter.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(cut[key].matvec(v), layer.matvec(v), atol=1e-13, rtol=1e-9)


def test_dropout_masks_are_the_same_in_both_passes() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3)]
    net = nn.Sequential(*layers).double()
    batch = (torch.randn(20, 6, dtype=torch.float64), torch.randint(0, 3, (20,)))

    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    weight = net[0].weight
    layer = terms_of(net, loss, [batch]).layers["0"]
    with Sandbox(net) as sandbox:
        alias = weight.detach().requires_grad_()
        value = sandbox.evaluate(loss, batch, {weight: alias})
        (g,) = torch.autograd.grad(value, alias, create_graph=True)
        rows = [torch.autograd.grad(entry, alias, retain_graph=True)[0].reshape(-1) for entry in g.reshape(-1)]
    assert layer.cut
    assert relative(matrix(layer), torch.stack(rows)) < 1e-10


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # an even kernel is padded on one side only
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 4), padding="same", dilation=(2, 1)),
        nn.Conv2d(4, 4, 3, padding="valid", groups=4),
        nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="circular"),
        nn.Conv3d(4, 6, (2, 3, 1), padding=1),
        nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
        nn.ConvTranspose2d(4, 6, 3, stride=(2, 1), padding=1, groups=2, dilation=2),
        nn.Linear(4, 6),
    ],
    ids=lambda layer: str(layer),
)
def test_weight_gradient_is_the_transpose_of_the_layer(layer: nn.Module) -> None:
    torch.manual_seed(0)
    dims = layer.weight.ndim - 2
    net = layer.double()
    x = torch.randn(3, 5, 4) if dims == 0 else torch.randn(3, 4, *(7, 8, 6)[:dims])

    def loss(module: Any, batch: Tensor) -> Tensor:
        return module(batch).square().mean()

    with Sandbox(net) as sandbox:
        stand_ins = {p: p.detach().requires_grad_() for p in net.parameters()}
        (call,) = capture(sandbox, net, loss, x.double(), parameters=stand_ins).layers
    weight_map = WeightMap(call)
    v = torch.randn_like(net.weight)
    y = weight_map.apply(v)
    plain = copy.deepcopy(net)
    plain.weight.data = v
    plain.bias.data = torch.zeros_like(plain.bias)
    torch.testing.assert_close(y, plain(x.double()).detach())
    c = torch.randn_like(y)
    torch.testing.assert_close((weight_map.transpose(c) * v).sum(), (c * y).sum())


def test_products_are_counted_and_few() -> None:
    """Five a layer at most when cold, four when warm, each of one application of the layer and one weight gradient."""
    spec = NETS["silu-convs"]
    net = make("silu-convs")
    gauge = CFLGauge()
    calls: list[str] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    for most in (5, 4):
        train("silu-convs", net, 5)
        calls.clear()
        with Count():
            estimates = gauge.measure(net, spec.loss, [spec.data()], refine=False)
        products = [e.products for e in estimates if e.layer != "8"]
        assert 1 <= min(products) <= max(products) <= most
        convolutions = calls.count("aten::convolution")
        backwards = calls.count("aten::convolution_backward")
        # Forward: the net and each product.
        assert convolutions == 3 + sum(products)
        # Backward: each product; the loss and the probes through two inputs; when cold, also the start of each layer.
        cold = most == 5
        assert backwards == sum(products) + 2 * (1 + 4) + 3 * cold
