"""What `estimate_cfl` says of layers: limits under optimizers, tiers, reasons, and that it leaves no trace."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eos_monitor.cfl.tiers import CFLGauge, estimate_cfl
from tests.cfl.layer_nets import COUPLED, NETS, dense_block, layer_weights, make, states, top_eigenvalue, train

LR = 0.05
SGD_THRESHOLDS = {  # textbook limits of lr · (λ + weight decay)
    "gd": ({}, 2.0),
    "heavy-ball": ({"momentum": 0.9}, 2 * 1.9),
    "nesterov": ({"momentum": 0.9, "nesterov": True}, 2 * 1.9 / 2.8),
    "decay": ({"momentum": 0.5, "weight_decay": 0.03}, 2 * 1.5),
}


def cross_entropy(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def batch_for(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, classes, (shape[0],), generator=generator)


def truths(net: nn.Module, name: str) -> dict[str, float]:
    spec = NETS[name]
    return {k: top_eigenvalue(dense_block(net, spec.loss, spec.data(), w)) for k, w in layer_weights(net).items()}


@pytest.mark.slow
def test_reported_top_layer_of_coupled_nets() -> None:
    right = 0
    total = 0
    for name in COUPLED:
        spec = NETS[name]
        for _, net in states(name):
            truth = truths(net, name)
            top = estimate_cfl(net, spec.loss, [spec.data()])[0]
            assert top.method == "exact"
            right += top.curvature == pytest.approx(max(truth.values()), rel=0.05)
            total += 1
    assert right / total >= 0.9


@pytest.mark.parametrize("case", SGD_THRESHOLDS)
def test_limits_of_sgd(case: str) -> None:
    options, threshold = SGD_THRESHOLDS[case]
    net = make("mixed-mlp")
    spec = NETS["mixed-mlp"]
    train("mixed-mlp", net, 30)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, **options)
    truth = truths(net, "mixed-mlp")
    estimates = estimate_cfl(net, spec.loss, [spec.data()], optimizer, exact=True)
    for e in estimates:
        number = LR * (truth[e.layer] + options.get("weight_decay", 0.0)) / threshold
        assert e.curvature == pytest.approx(truth[e.layer], rel=1e-6)
        assert e.cfl_number == pytest.approx(number, rel=1e-6)
        assert e.lr_max == pytest.approx(LR / number, rel=1e-6)
    assert [e.layer for e in estimates] == sorted(truth, key=lambda k: -truth[k])


def test_without_an_optimizer_the_limit_is_that_of_gradient_descent() -> None:
    net = make("mixed-mlp")
    spec = NETS["mixed-mlp"]
    for e in estimate_cfl(net, spec.loss, [spec.data()]):
        assert e.cfl_number is None
        assert e.lr_max == pytest.approx(2 / e.curvature)


def adam_block(net: nn.Module, name: str, optimizer: torch.optim.Optimizer, weight: Tensor) -> tuple[Tensor, float]:
    """Return P^-½ H P^-½ and the limit of lr times its top, from Adam's update written down again."""
    (group,) = optimizer.param_groups
    state = optimizer.state[weight]
    beta1, beta2 = group["betas"]
    t = float(state["step"]) + 1
    p = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
    root = p.reshape(-1).rsqrt()
    block = dense_block(net, NETS[name].loss, NETS[name].data(), weight)
    return root[:, None] * block * root, 2 * (1 + beta1) / (1 - beta1) * (1 - beta1**t)


@pytest.mark.parametrize("name", ["conv1d", "residual", "gated"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_preconditioned_blocks_of_adam(name: str, kind: type[torch.optim.Adam]) -> None:
    net = make(name)
    spec = NETS[name]
    decay = 0.0 if kind is torch.optim.Adam else 0.5
    optimizer = kind(net.parameters(), lr=1e-2, weight_decay=decay)
    train(name, net, 60, optimizer)
    weights = layer_weights(net)
    cheap = {e.layer: e for e in CFLGauge().measure(net, spec.loss, [spec.data()], optimizer, refine=False)}
    for e in estimate_cfl(net, spec.loss, [spec.data()], optimizer, exact=True):
        block, threshold = adam_block(net, name, optimizer, weights[e.layer])
        top = top_eigenvalue(block)
        # Decoupled decay d = lr·wd: the limit is at lr·λ = threshold · (1 − d/2), so lr_max = 1/(λ/threshold + wd/2).
        assert e.lr_max == pytest.approx(1 / (top / threshold + decay / 2), rel=1e-5)
        assert e.cfl_number == pytest.approx(1e-2 / e.lr_max)
        assert e.curvature == pytest.approx(top, rel=1e-5)
        ratio = cheap[e.layer].curvature / e.curvature
        if cheap[e.layer].form != "weak":
            assert 0.6 <= ratio <= 1.4  # measured on nets like these: .66–1.08


def test_coupled_decay_adds_to_the_preconditioned_block() -> None:
    net = make("mixed-mlp")
    spec = NETS["mixed-mlp"]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, weight_decay=0.1)
    train("mixed-mlp", net, 60, optimizer)
    weights = layer_weights(net)
    for e in estimate_cfl(net, spec.loss, [spec.data()], optimizer, exact=True):
        weight = weights[e.layer]
        state = optimizer.state[weight]
        p = (state["exp_avg_sq"] / (1 - 0.999 ** (float(state["step"]) + 1))).sqrt() + 1e-8
        root = p.reshape(-1).rsqrt()
        block = dense_block(net, spec.loss, spec.data(), weight)
        block = root[:, None] * (block + 0.1 * torch.eye(len(block), dtype=torch.float64)) * root
        threshold = 2 * 1.9 / 0.1 * (1 - 0.9 ** (float(state["step"]) + 1))
        assert e.cfl_number == pytest.approx(1e-2 * top_eigenvalue(block) / threshold, rel=1e-6)


def test_each_layer_has_the_learning_rate_of_its_group() -> None:
    net = make("mixed-mlp")
    spec = NETS["mixed-mlp"]
    truth = truths(net, "mixed-mlp")
    groups = [{"params": net[0].parameters(), "lr": 1.0}, {"params": net[2].parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    estimates = {e.layer: e for e in estimate_cfl(net, spec.loss, [spec.data()], optimizer, exact=True)}
    assert estimates["0"].cfl_number == pytest.approx(truth["0"] / 2, rel=1e-6)
    assert estimates["2"].cfl_number == pytest.approx(0.1 * truth["2"] / 2, rel=1e-6)
    # Not trained: not measured.
    assert all(estimates[name].method == "none" for name in ("4", "6") if name in estimates)


def test_an_optimizer_without_a_limit_has_curvature_only() -> None:
    net = make("mixed-mlp")
    spec = NETS["mixed-mlp"]
    for e in estimate_cfl(net, spec.loss, [spec.data()], torch.optim.Rprop(net.parameters())):
        assert e.cfl_number is None
        assert e.lr_max is None
        assert e.curvature > 0.0


def test_tiers_of_a_long_net() -> None:
    """The first three and the weak ones get the exact tier."""
    net = make("gated")
    spec = NETS["gated"]
    estimates = estimate_cfl(net, spec.loss, [spec.data()])
    cheap = CFLGauge().measure(net, spec.loss, [spec.data()], refine=False)
    first = {e.layer for e in cheap[:3]}
    weak = {e.layer for e in cheap if e.form == "weak"}
    assert {e.layer for e in cheap if e.method != "cheap"} == set()
    assert {e.layer for e in estimates if e.method == "exact"} == first | weak
    assert {e.layer for e in estimates if e.method == "cheap"} == set(layer_weights(net)) - first - weak


def test_layers_by_pattern() -> None:
    net = make("gated")
    spec = NETS["gated"]
    chosen = estimate_cfl(net, spec.loss, [spec.data()], layers=["g?", "inlet"])
    assert {e.layer for e in chosen} == {"g1", "g2", "inlet"}
    whole = {e.layer: e for e in CFLGauge(layers="d*").measure(net, spec.loss, [spec.data()], refine=False)}
    assert set(whole) == {"d1", "d2"}


class Odd(nn.Module):
    """Every way in which a layer can be out of reach."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.idle = nn.Linear(4, 4)
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(torch.tanh(self.inlet(x)))
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.normed(x)) @ self.matrix
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        return self.head(x.mean(1))


def odd_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Odd().double()


def test_layers_out_of_reach_say_why() -> None:
    net = odd_net()
    batch = batch_for(12, 5, 4)
    estimates = estimate_cfl(net, cross_entropy, [batch])
    by_name = {e.layer: e for e in estimates}
    unknown = {e.layer for e in estimates if e.form == "not attributed"}
    assert {"inlet", "twice", "head"}.isdisjoint(unknown)
    for name, word in (("matrix", "matmul"), ("idle", "not used"), ("normed", ""), ("attend.out_proj", "Attention")):
        (match,) = [e for e in estimates if e.layer.startswith(name)][:1]
        assert word in match.reason
        assert match.form == "not attributed"
        assert math.isnan(match.curvature)
        assert (match.cfl_number, match.lr_max) == (None, None)
    assert by_name["twice"].form == "weak"
    assert "2 times" in by_name["twice"].reason
    assert [e.form == "not attributed" for e in estimates] == sorted(e.form == "not attributed" for e in estimates)


def test_exact_reaches_layers_that_the_cheap_tier_does_not() -> None:
    net = odd_net()
    batch = batch_for(12, 5, 4)
    by_name = {e.layer: e for e in estimate_cfl(net, cross_entropy, [batch], exact=True)}
    for name, weight in {"matrix": net.matrix, "twice": net.twice.weight, "inlet": net.inlet.weight}.items():
        truth = top_eigenvalue(dense_block(net, cross_entropy, batch, weight))
        assert by_name[name].curvature == pytest.approx(truth, rel=1e-6)
    assert by_name["idle"].curvature == pytest.approx(0.0, abs=1e-12)
    assert all(e.method == "exact" for e in by_name.values() if "frozen" not in e.reason)


def contrastive(module: nn.Module, batch: Any) -> Tensor:
    z = module(batch[0])
    return F.cross_entropy(z @ z.T, torch.arange(len(z)).roll(1))


def centered(module: nn.Module, batch: Any) -> Tensor:
    out = module(batch[0])
    return F.cross_entropy(out - out.mean(0), batch[1])


def in_one_piece(module: nn.Module, batch: Any) -> Tensor:
    z = F.normalize(module(batch[0]))
    return (z @ z.T).exp().mean()


@pytest.mark.parametrize("loss", [contrastive, centered, in_one_piece])
def test_losses_that_couple_samples_are_left_to_the_exact_tier(loss: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    batch = batch_for(16, 4)
    forms = {e.form for e in estimate_cfl(net, loss, [batch])}
    assert forms == ({"not attributed"} if loss is in_one_piece else {"weak"})
    for e in estimate_cfl(net, loss, [batch], exact=True):
        truth = top_eigenvalue(dense_block(net, loss, batch, net[int(e.layer)].weight))
        assert e.curvature == pytest.approx(truth, rel=1e-6)
        assert "couple" in e.reason or (e.layer == "0" and "product of two computed tensors" in e.reason)


def test_shares_of_a_mode() -> None:
    net = make("mixed-mlp")
    spec = NETS["mixed-mlp"]
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    mode = torch.cat([torch.full((p.numel(),), float(p.ndim)) for p in net.parameters()])
    total = sum(p.numel() * p.ndim**2 for p in net.parameters())
    for e in estimate_cfl(net, spec.loss, [spec.data()], optimizer, mode=mode):
        assert e.top_mode_share == pytest.approx(4 * net[int(e.layer)].weight.numel() / total)
    with pytest.raises(ValueError, match="Expected `mode` of shape"):
        estimate_cfl(net, spec.loss, [spec.data()], optimizer, mode=mode[1:])


def test_regimes_are_those_of_the_activations() -> None:
    net = make("silu-convs")
    spec = NETS["silu-convs"]
    by_name = {e.layer: e for e in estimate_cfl(net, spec.loss, [spec.data()])}
    z = net[0](spec.data()[0])
    border = 1.170685945929424  # |r″| is half of its maximum there
    assert by_name["0"].activated == pytest.approx(float((z >= border).double().mean()))
    assert by_name["0"].transitioning == pytest.approx(float((z.abs() < border).double().mean()))
    assert sum((by_name["0"].activated, by_name["0"].transitioning, by_name["0"].not_activated)) == pytest.approx(1.0)
    assert (by_name["8"].activated, by_name["8"].transitioning, by_name["8"].not_activated) == (0.0, 0.0, 0.0)


def test_transition_share_is_that_of_the_bend_at_the_top_vector() -> None:
    """One layer, half of whose curvature is the bend's by construction: ½ a r″ against b r′² at z = 0."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.SiLU()).double()
    nn.init.zeros_(net[0].weight)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        h = module(batch[0])
        return 0.5 * (h + 1.0).square().mean()  # ∂L/∂h = 1 and H_out = 1 at h = 0

    (e,) = estimate_cfl(net, loss, [(torch.ones(4, 1).double(),)])
    # T = r″(0) · 1 = ½, GN = r′(0)² · 1 = ¼
    assert e.curvature == pytest.approx(0.75)
    assert e.transition_share == pytest.approx(2 / 3)


def test_estimates_leave_no_trace_and_repeat() -> None:
    net = make("bn-silu-convs")
    spec = NETS["bn-silu-convs"]
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9)
    train("bn-silu-convs", net, 3, optimizer)
    before = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()
    first = estimate_cfl(net, spec.loss, [spec.data()], optimizer, paper_bound=True, seed=3)
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert estimate_cfl(net, spec.loss, [spec.data()], optimizer, paper_bound=True, seed=3) == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batches": []}, "at least one batch"), ({"probes": 0}, "`probes` >= 1")],
    ids=["no-batch", "no-probe"],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    net = make("mixed-mlp")
    spec = NETS["mixed-mlp"]
    with pytest.raises(ValueError, match=message):
        estimate_cfl(net, spec.loss, **({"batches": [spec.data()]} | arguments))


def test_a_net_without_layers_gets_one_message() -> None:
    net = nn.Embedding(5, 3)
    batch = (torch.arange(5), torch.arange(5) % 3)
    with pytest.raises(ValueError, match="Linear or convolution layer"):
        estimate_cfl(net, cross_entropy, [batch])


def test_single_precision_agrees_with_double() -> None:
    net = make("silu-convs")
    spec = NETS["silu-convs"]
    train("silu-convs", net, 100)
    x, y = spec.data()
    double = {e.layer: e.curvature for e in estimate_cfl(net, spec.loss, [(x, y)])}
    single = {e.layer: e.curvature for e in estimate_cfl(copy.deepcopy(net).float(), spec.loss, [(x.float(), y)])}
    # The start vectors are drawn in each precision anew: what Lanczos leaves open differs.
    assert single == pytest.approx(double, rel=0.05)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.a = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda z: torch.tanh(self.a(z)), x, use_reentrant=self.reentrant))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_layer_that_checkpointing_hides_is_not_flat() -> None:
    """The exact tier gave 0 for it."""

    def numbers(*, reentrant: bool) -> dict[str, tuple[float, str]]:
        torch.manual_seed(0)
        net = Checkpointed(reentrant=reentrant)
        found = estimate_cfl(net, lambda m, x: m(x).square().mean(), [torch.randn(16, 4)], exact=True)
        return {e.layer: (e.curvature, e.reason or "") for e in found}

    seen = numbers(reentrant=False)
    hidden = numbers(reentrant=True)
    assert seen["a"][0] > 0.0
    assert hidden["head"][0] == pytest.approx(seen["head"][0], rel=1e-4)
    assert math.isnan(hidden["a"][0])
    assert "reentrant" in hidden["a"][1]


def test_layers_of_a_module_that_fabric_wraps_keep_their_names() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    wrapped, sgd = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.randn(16, 4)

    def numbers(module: nn.Module, optimizer: Any) -> dict[str, float | None]:
        return {e.layer: e.cfl_number for e in estimate_cfl(module, lambda m, b: m(b).square().mean(), [x], optimizer)}

    assert numbers(wrapped, sgd) == numbers(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert set(numbers(wrapped, sgd)) == {"0", "2"}
