"""The optimizers on a smoothed loss: contract, reductions to SGD, formulas, noise, edges."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from eos_monitor.optim import (
    BurgersSGD,
    ElasticSGD,
    EntropySGD,
    HamiltonJacobi,
    HeatSmoothing,
)
from tests.optim.relaxed import Step, make_net, same, stream, weights


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# name -> class, settings (`generator` is made anew), closure calls in a step
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "entropy": (EntropySGD, {"evaluations": 4}, 4),
    "entropy-noise-momentum": (
        EntropySGD,
        {"evaluations": 3, "temperature": 1e-4, "inner_momentum": 0.5, "weight_decay": 1e-2, "generator": seeded},
        3,
    ),
    "hamilton-jacobi": (HamiltonJacobi, {}, 5),
    "hamilton-jacobi-momentum": (
        HamiltonJacobi,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
        5,
    ),
    "heat": (HeatSmoothing, {"generator": seeded}, 5),
    "heat-momentum": (HeatSmoothing, {"lr": 0.1, "momentum": 0.9, "gamma": 1e-3, "generator": seeded}, 5),
    "burgers": (BurgersSGD, {"evaluations": 3}, 3),
    "burgers-noise-momentum": (
        BurgersSGD,
        {"evaluations": 2, "viscosity": 1e-4, "inner_momentum": 0.5, "scoping": 1e-2, "generator": seeded},
        2,
    ),
    "elastic": (ElasticSGD, {"workers": 3, "evaluations": 2}, 6),
    "elastic-momentum": (ElasticSGD, {"workers": 2, "momentum": 0.9, "moving_rate": 0.5, "weight_decay": 1e-2}, 2),
}
every = pytest.mark.parametrize("name", CASES)


def build(name: str, params: Any, **changes: Any) -> Any:
    cls, settings, _ = CASES[name]
    settings = {key: value() if callable(value) else value for key, value in settings.items()}
    return cls(params, **{**settings, **changes})


def run(name: str, **changes: Any) -> Step:
    net = make_net()
    return Step(net, build(name, net.parameters(), **changes), stream())


# ---- contract


@every
def test_closure_is_called_the_stated_number_of_times(name: str) -> None:
    step = run(name)
    numbers = []
    step.before = lambda: numbers.append(step.optimizer.evaluation)
    step(2)
    assert step.optimizer.closure_calls == CASES[name][2]
    assert numbers == 2 * list(range(CASES[name][2]))
    assert step.optimizer.evaluation is None


@every
def test_no_learning_rate_no_step(name: str) -> None:
    step = run(name, lr=0.0)
    before = weights(step.net)
    step(2)
    assert same(weights(step.net), before)


@every
def test_quadratic_decreases(name: str) -> None:
    x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    scale = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    optimizer = build(name, [x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (scale * x * x).sum()
        loss.backward()
        return loss

    start = closure().item()
    for _ in range(60):
        optimizer.step(closure)
    assert closure().item() < 0.1 * start


@every
def test_step_returns_the_first_loss(name: str) -> None:
    step = run(name)
    losses: list[Tensor] = []
    closure = step.closure
    step.closure = lambda: (losses.append(closure()), losses[-1])[1]  # type: ignore[method-assign]
    assert torch.equal(step(), losses[0])


@every
def test_run_continues_bit_for_bit_from_a_state_dict(name: str) -> None:
    straight = run(name)
    straight(6)
    first = run(name)
    first(3)
    file = io.BytesIO()
    torch.save([first.net.state_dict(), first.optimizer.state_dict()], file)
    file.seek(0)
    net_state, optimizer_state = torch.load(file, weights_only=True)
    second = run(name, lr=0.05)  # the checkpoint has to bring the settings back
    second.net.load_state_dict(net_state)
    if second.optimizer.generator is not None:
        second.optimizer.generator.manual_seed(99)  # the checkpoint has to bring it back
    second.optimizer.load_state_dict(optimizer_state)
    second.batches = first.batches
    second(3)
    assert same(weights(second.net), weights(straight.net))
    assert second.optimizer.param_groups[0]["gamma"] == straight.optimizer.param_groups[0]["gamma"]


@every
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copy_goes_the_same_way(name: str, duplicate: Callable[[Any], Any]) -> None:
    original = run(name)
    original(3)
    net, optimizer = duplicate((original.net, original.optimizer))
    assert net[0].weight is not original.net[0].weight
    twin = Step(net, optimizer, stream(7))
    original.batches = stream(7)
    twin(3), original(3)
    assert same(weights(twin.net), weights(original.net))


@every
def test_groups_keep_their_own_settings(name: str) -> None:
    net = make_net()
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}]
    step = Step(net, build(name, groups), stream())
    before = weights(net)
    step(2)
    after = weights(net)
    assert not torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert same(after[2:], before[2:])


@every
def test_groups_with_equal_settings_are_one(name: str) -> None:
    # The noise is drawn in the order of the parameters either way.
    whole = run(name)
    net = make_net()
    split = Step(net, build(name, [{"params": net[0].parameters()}, {"params": net[2].parameters()}]), stream())
    whole(3), split(3)
    assert same(weights(whole.net), weights(split.net))


@every
def test_scheduler(name: str) -> None:
    # A reference that is on its way to its workers goes on while they stand still.
    step = run(name, **({"moving_rate": 1.0} if "elastic" in name else {}))
    start = step.optimizer.param_groups[0]["lr"]
    scheduler = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda epoch: 0.0 if epoch == 2 else 1.0)
    step()
    scheduler.step()
    step()
    scheduler.step()
    before = weights(step.net)
    step()
    assert same(weights(step.net), before)
    scheduler.step()
    assert step.optimizer.param_groups[0]["lr"] == start
    step()
    assert not same(weights(step.net), before)


@every
def test_tensor_learning_rate_is_its_value(name: str) -> None:
    # 2^-3 is the same number in single precision.
    number = run(name, lr=0.125)
    tensor = run(name, lr=torch.tensor(0.125))
    number(3), tensor(3)
    assert same(weights(number.net), weights(tensor.net))


@every
def test_every_gradient_can_be_clipped(name: str) -> None:
    step = run(name)
    norms: list[float] = []

    def clip() -> None:
        nn.utils.clip_grad_norm_(step.net.parameters(), 1e-3)
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in step.net.parameters())))

    step.after = clip
    step()
    assert len(norms) == CASES[name][2]
    assert max(norms) <= 1e-3 * (1 + 1e-9)
    # The gradient is not used in place: what the last evaluation left is still there.
    left = math.sqrt(sum(float(p.grad.square().sum()) for p in step.net.parameters()))
    assert left == norms[-1]


@every
def test_gradients_set_to_none_or_zero(name: str) -> None:
    to_none = run(name)
    to_zero = run(name)
    to_zero.set_to_none = False
    to_none(3), to_zero(3)
    assert same(weights(to_none.net), weights(to_zero.net))


@every
@pytest.mark.parametrize("foreach", [True, False])
def test_kernels_agree(name: str, foreach: bool) -> None:
    default = run(name)
    chosen = run(name, foreach=foreach)
    default(3), chosen(3)
    assert same(weights(default.net), weights(chosen.net))


@every
def test_frozen_and_unused_parameters_stay(name: str) -> None:
    net = make_net()
    net[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64))
    step = Step(net, build(name, [*net.parameters(), unused]), stream())
    before = net[0].bias.clone()
    weight = net[0].weight.detach().clone()
    step(3)
    assert torch.equal(net[0].bias, before)
    assert torch.equal(unused.detach(), torch.full((3,), 0.1, dtype=torch.float64))
    assert not torch.equal(net[0].weight, weight)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_precision_is_the_parameters(name: str, dtype: torch.dtype) -> None:
    net = make_net(dtype=dtype)
    step = Step(net, build(name, net.parameters()), stream(dtype=dtype))
    before = weights(net)
    twin = make_net()
    twin.load_state_dict(net.state_dict())
    exact = Step(twin, build(name, twin.parameters()), ((x.double(), y) for x, y in stream(dtype=dtype)))
    step(3), exact(3)
    assert not same(weights(net), before)
    for p in net.parameters():
        assert p.dtype == dtype
        for value in step.optimizer.state[p].values():
            assert value.dtype == dtype
    if dtype != torch.float64 and "generator" in CASES[name][1]:
        return  # noise of another precision is other noise
    # Each evaluation and each move of x rounds weights of about 1 by half an eps; gradients are rounded likewise.
    roundings = 3 * (CASES[name][2] + 2)
    for low, high in zip(weights(net), weights(twin), strict=True):
        assert torch.allclose(low.double(), high, atol=roundings * torch.finfo(dtype).eps, rtol=0)


@every
def test_complex_parameters_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Expected real parameters, got complex"):
        build(name, [nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(3, 2, sparse=True)
    optimizer = HamiltonJacobi(table.parameters())
    with pytest.raises(RuntimeError, match="Expected dense gradients, got sparse"):
        optimizer.step(lambda: table(torch.tensor([1])).sum().backward())


@every
def test_step_without_closure_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"Expected a closure, got None: .* {CASES[name][2]} times"):
        run(name).optimizer.step()


@every
def test_closure_that_raises_leaves_the_weights(name: str) -> None:
    step = run(name)
    step()
    before = weights(step.net)

    def interrupt() -> None:
        if step.optimizer.evaluation == step.optimizer.closure_calls - 1:
            raise KeyboardInterrupt

    step.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        step()
    assert same(weights(step.net), before)
    assert step.optimizer.evaluation is None


INVALID = {
    **dict.fromkeys(("lr", "inner_lr", "gamma", "temperature", "viscosity", "weight_decay"), (-0.1, math.nan)),
    **dict.fromkeys(("averaging", "momentum", "inner_momentum", "scoping"), (-0.1, 1.0)),
    "moving_rate": (-0.1, 1.5),
    **dict.fromkeys(("evaluations", "workers"), (0, 2.5)),
}
CLASSES = (EntropySGD, HamiltonJacobi, HeatSmoothing, BurgersSGD, ElasticSGD)


@pytest.mark.parametrize(
    ("cls", "setting", "value"),
    [(c, name, v) for c in CLASSES for name, bad in INVALID.items() if name in signature(c).parameters for v in bad],
)
def test_invalid_setting_is_named(cls: Any, setting: str, value: Any) -> None:
    message = f"^Expected {setting} to be a .*, got {value}"
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(1))], **{setting: value})
    optimizer = cls([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], setting: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("cls", [HamiltonJacobi, HeatSmoothing, ElasticSGD])
def test_nesterov_without_momentum_is_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match="Expected momentum > 0 with nesterov=True, got 0"):
        cls([nn.Parameter(torch.ones(1))], nesterov=True)


@pytest.mark.parametrize("cls", [EntropySGD, HamiltonJacobi, BurgersSGD, ElasticSGD])
def test_width_zero_is_refused(cls: Any) -> None:
    with pytest.raises(ValueError, match="Expected gamma to be a number > 0, got 0"):
        cls([nn.Parameter(torch.ones(1))], gamma=0.0)


def test_groups_evaluate_together() -> None:
    optimizer = EntropySGD([nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match="Expected evaluations to be the same in all groups, got 3"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "evaluations": 3})
    assert len(optimizer.param_groups) == 1


# ---- reductions to torch's SGD, bit for bit


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    "momentum",
    [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}],
    ids=["plain", "momentum", "nesterov"],
)
@pytest.mark.parametrize(
    "reduced",
    [
        lambda params, **kw: HeatSmoothing(params, gamma=0.0, evaluations=1, **kw),
        lambda params, **kw: HamiltonJacobi(params, averaging=0.0, evaluations=1, **kw),
        lambda params, **kw: ElasticSGD(params, workers=1, **kw),
        lambda params, **kw: ElasticSGD(params, workers=1, gamma=math.inf, evaluations=1, **kw),
    ],
    ids=["heat", "hamilton-jacobi", "elastic", "elastic-uncoupled"],
)
def test_one_evaluation_is_sgd(reduced: Any, momentum: dict[str, Any], foreach: bool | None) -> None:
    nets = make_net(), make_net()
    settings = {"lr": 0.3, "weight_decay": 0.01, "foreach": foreach, **momentum}
    ours = Step(nets[0], reduced(nets[0].parameters(), **settings), stream())
    sgd = Step(nets[1], SGD(nets[1].parameters(), **settings), stream())
    for _ in range(8):
        assert torch.equal(ours(), sgd())
        assert same(weights(nets[0]), weights(nets[1]))


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    "reduced",
    [
        lambda params, lr, **kw: EntropySGD(
            params, lr=2.0, gamma=2.0, inner_lr=lr, evaluations=1, averaging=0.0, scoping=0.0, **kw
        ),
        lambda params, lr, **kw: BurgersSGD(params, lr=lr, gamma=lr, evaluations=1, **kw),
    ],
    ids=["entropy", "burgers"],
)
def test_one_inner_step_is_sgd(reduced: Any, foreach: bool | None) -> None:
    nets = make_net(), make_net()
    settings = {"lr": 0.3, "weight_decay": 0.01, "foreach": foreach}
    ours = Step(nets[0], reduced(nets[0].parameters(), **settings), stream())
    sgd = Step(nets[1], SGD(nets[1].parameters(), **settings), stream())
    for _ in range(8):
        assert torch.equal(ours(), sgd())
        assert same(weights(nets[0]), weights(nets[1]))


# ---- the formulas, written out again in numpy for one quadratic per mini-batch: f_k(x) = ½ h_k x² − b_k x

H = np.array([0.5, 2.0, 1.0, 3.0, 0.2, 1.5] * 10)
B = np.linspace(-1, 1, 60)
ETA = 0.7
INNER = 0.1
GAMMA = 0.8
ALPHA = 0.6
L = 3
DECAY = 0.05
SCOPING = 0.1
ROUNDS = 4


class Noisy:
    """Gradients of the mini-batches in order."""

    def __init__(self) -> None:
        self.k = 0

    def __call__(self, x: Any) -> Any:
        self.k += 1
        return H[self.k - 1] * x - B[self.k - 1]


def entropy(g: Noisy, x: float, gamma: float) -> float:
    for _ in range(ROUNDS):
        y = z = x
        for _ in range(L):
            y = y - INNER * (g(y) + DECAY * y + (y - x) / gamma)
            z = ALPHA * z + (1 - ALPHA) * y
        x = x - ETA / gamma * (x - z)
        gamma *= 1 - SCOPING
    return x


def entropy_with_momentum(g: Noisy, x: float, gamma: float) -> float:
    for _ in range(ROUNDS):
        y = x
        z = x
        v = 0.0
        for _ in range(L):
            v = 0.5 * v + g(y) + DECAY * y + (y - x) / gamma
            y = y - INNER * v
            z = ALPHA * z + (1 - ALPHA) * y
        x = x - ETA / gamma * (x - z)
        gamma *= 1 - SCOPING
    return x


def hamilton_jacobi(g: Noisy, x: float, gamma: float) -> float:
    for _ in range(ROUNDS):
        p = 0.0
        for _ in range(L):
            at = x - gamma * p
            p = ALPHA * p + (1 - ALPHA) * (g(at) + DECAY * at)
        x = x - ETA * p
        gamma *= 1 - SCOPING
    return x


def heat(g: Noisy, x: float, gamma: float) -> float:
    for _ in range(ROUNDS):
        x = x - ETA * (sum(g(x) for _ in range(L)) / L + DECAY * x)
    return x


def burgers(g: Noisy, x: float, gamma: float) -> float:
    y = x
    for _ in range(ROUNDS):
        for _ in range(L):
            y = y - INNER * (g(y) + DECAY * y + (y - x) / gamma)
        x = x - INNER / gamma * (x - y)
        gamma *= 1 - SCOPING
    return x


def elastic(g: Noisy, x: float, gamma: float) -> float:
    workers = [x, x, x]
    for _ in range(ROUNDS):
        for a in range(3):
            for _ in range(L):
                workers[a] -= INNER * (g(workers[a]) + DECAY * workers[a] + (workers[a] - x) / gamma)
        x = x - 0.4 * (x - sum(workers) / 3)
        gamma *= 1 - SCOPING
    return x


COMMON = {"gamma": GAMMA, "evaluations": L, "weight_decay": DECAY, "scoping": SCOPING}
FORMULAS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "entropy": (EntropySGD, {"lr": ETA, "inner_lr": INNER, "averaging": ALPHA}, entropy),
    "entropy-momentum": (
        EntropySGD,
        {"lr": ETA, "inner_lr": INNER, "averaging": ALPHA, "inner_momentum": 0.5},
        entropy_with_momentum,
    ),
    "hamilton-jacobi": (HamiltonJacobi, {"lr": ETA, "averaging": ALPHA}, hamilton_jacobi),
    "heat": (HeatSmoothing, {"lr": ETA, "gamma": 0.0}, heat),
    "burgers": (BurgersSGD, {"lr": INNER}, burgers),
    "elastic": (ElasticSGD, {"lr": INNER, "workers": 3, "moving_rate": 0.4}, elastic),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name: str) -> None:
    cls, settings, formula = FORMULAS[name]
    x = nn.Parameter(torch.tensor([1.7], dtype=torch.float64))
    optimizer = cls([x], **{**COMMON, **settings})
    g = Noisy()

    def closure() -> Tensor:
        h = H[g.k]
        b = B[g.k]
        g.k += 1
        optimizer.zero_grad()
        loss = (0.5 * h * x * x - b * x).sum()
        loss.backward()
        return loss

    for _ in range(ROUNDS):
        optimizer.step(closure)
    # about a hundred roundings of numbers of order one
    assert x.item() == pytest.approx(formula(Noisy(), 1.7, GAMMA), rel=1e-13)


# ---- noise


def quadratic_closure(x: nn.Parameter, curvature: float) -> Callable[[], Any]:
    def closure() -> float:
        x.grad = curvature * x.detach()
        return 0.0

    return closure


MANY = 40_000
# The relative standard error of a sample variance is √(2/n).
FIVE_SIGMA = 5 * math.sqrt(2 / MANY)


def test_inner_loop_samples_the_gibbs_density() -> None:
    """An Ornstein–Uhlenbeck process by Euler steps: variance T/(h(1 − η′h/2)), h = λ + 1/γ."""
    x = nn.Parameter(torch.zeros(MANY, dtype=torch.float64))
    # η = γ and no averaging: x becomes the last y, 60 relaxation times later
    optimizer = EntropySGD([x], lr=0.5, gamma=0.5, averaging=0.0, temperature=0.3, evaluations=200, generator=seeded())
    optimizer.step(quadratic_closure(x, 1.0))
    assert float(x.detach().var()) == pytest.approx(0.3 / (3 * (1 - 0.1 * 3 / 2)), rel=FIVE_SIGMA)


def test_traffic_samples_the_gibbs_density_of_its_viscosity() -> None:
    x = nn.Parameter(torch.zeros(MANY, dtype=torch.float64))
    optimizer = BurgersSGD([x], lr=0.1, gamma=0.5, viscosity=0.3, evaluations=200, generator=seeded())
    optimizer.step(quadratic_closure(x, 1.0))
    y = optimizer.state[x]["y"]
    assert float(y.var()) == pytest.approx(0.3 / (3 * (1 - 0.1 * 3 / 2)), rel=FIVE_SIGMA)
    assert torch.allclose(x.detach(), 0.2 * y)  # x pulled from 0 by δ/γ


def test_heat_perturbs_with_variance_gamma() -> None:
    x = nn.Parameter(torch.zeros(MANY, dtype=torch.float64))
    optimizer = HeatSmoothing([x], lr=1.0, gamma=0.04, evaluations=5, generator=seeded())
    optimizer.step(quadratic_closure(x, 1.0))
    assert float(x.detach().var()) == pytest.approx(0.04 / 5, rel=FIVE_SIGMA)


def test_heat_descends_the_smoothed_loss() -> None:
    """The heat equation takes x⁴/4 to x⁴/4 + 3γx²/2 + …, whose slope at 1 is 1 + 3γ."""
    x = nn.Parameter(torch.ones(MANY, dtype=torch.float64))
    optimizer = HeatSmoothing([x], lr=1.0, gamma=0.25, evaluations=4, generator=seeded())

    def closure() -> float:
        x.grad = x.detach() ** 3
        return 0.0

    optimizer.step(closure)
    slope = 1 - x.detach()
    assert float(slope.mean()) == pytest.approx(1.75, abs=5 * float(slope.std()) / math.sqrt(MANY))


@pytest.mark.parametrize("name", ["entropy-noise-momentum", "heat", "burgers-noise-momentum"])
def test_noise_is_the_generators(name: str) -> None:
    torch.manual_seed(0)
    first = run(name)
    again = run(name)
    other = run(name, generator=seeded(6))
    first()
    assert torch.initial_seed() == 0
    state = torch.get_rng_state()
    again(), other()
    assert torch.equal(torch.get_rng_state(), state)
    assert same(weights(first.net), weights(again.net))
    assert not same(weights(first.net), weights(other.net))


@pytest.mark.parametrize("name", ["entropy-noise-momentum", "heat"])
def test_noise_spares_buffers(name: str) -> None:
    net = nn.Sequential(make_net(), nn.BatchNorm1d(3, momentum=0.0, dtype=torch.float64))
    Step(net, build(name, net.parameters()), stream())(2)
    assert torch.equal(net[1].running_mean, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(net[1].running_var, torch.ones(3, dtype=torch.float64))


# ---- scoping, and the stability of the inner loop


@every
def test_scoping_shrinks_gamma_each_step(name: str) -> None:
    step = run(name, scoping=0.25, gamma=8.0)
    step(3)
    assert step.optimizer.param_groups[0]["gamma"] == 8 * 0.75**3  # powers of two: exact


# settings whose inner loop diverges whatever the loss, and ones just inside
UNSTABLE: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "entropy": (EntropySGD, {"inner_lr": 0.1, "gamma": 0.049}, {"inner_lr": 0.1, "gamma": 0.051}),
    "entropy-momentum": (
        EntropySGD,
        {"inner_lr": 0.1, "inner_momentum": 0.9, "gamma": 0.026},
        {"inner_lr": 0.1, "inner_momentum": 0.9, "gamma": 0.027},
    ),
    "burgers": (BurgersSGD, {"lr": 0.1, "gamma": 0.049}, {"lr": 0.1, "gamma": 0.051}),
    "elastic": (ElasticSGD, {"lr": 0.1, "gamma": 0.049}, {"lr": 0.1, "gamma": 0.051}),
}


@pytest.mark.parametrize("name", UNSTABLE)
def test_inner_loop_that_cannot_be_stable_is_warned_about_once(name: str) -> None:
    cls, bad, good = UNSTABLE[name]
    net = make_net()
    Step(net, cls(net.parameters(), **good), stream())()  # a warning would be an error
    step = Step(net, cls(net.parameters(), **bad), stream())
    with pytest.warns(UserWarning, match=r"expected a curvature below -.* inner loop of group 0 .*Lower"):
        step()
    step(2)


def test_scoping_into_instability_is_noticed() -> None:
    step = run("entropy", gamma=0.06, lr=0.06, scoping=0.1)
    step()
    with pytest.warns(UserWarning, match="gamma=0.0486"):
        step(2)


@pytest.mark.parametrize(
    ("optimizer", "limit"),
    [
        # η′(1/γ + λ) < 2
        (lambda p: EntropySGD(p, inner_lr=0.1, gamma=0.5), 18.0),
        # γλ < (1 + α)/(1 − α)
        (lambda p: HamiltonJacobi(p, gamma=0.5, averaging=0.75), 14.0),
        (lambda p: BurgersSGD(p, lr=0.1, gamma=0.5), 18.0),
        (lambda p: ElasticSGD(p, lr=0.1, gamma=0.5), 18.0),
    ],
    ids=["entropy", "hamilton-jacobi", "burgers", "elastic"],
)
def test_check_at_a_known_sharpness(optimizer: Any, limit: float) -> None:
    checked = optimizer([nn.Parameter(torch.ones(1))])
    assert checked.check_inner_stability(limit - 1e-6)
    with pytest.warns(UserWarning, match=rf"expected a curvature below {limit:g}"):
        assert not checked.check_inner_stability(limit + 1e-6)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_inner_limit_of_hamilton_jacobi_is_where_p_diverges(factor: float) -> None:
    x = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = HamiltonJacobi([x], lr=1e-12, gamma=0.5, averaging=0.75, evaluations=2000)
    sharpness = factor * optimizer.inner_limit(optimizer.param_groups[0])
    at: list[float] = []

    def closure() -> float:
        at.append(x.item())
        x.grad = sharpness * x.detach()
        return 0.0

    optimizer.step(closure)
    # p oscillates around its fixed point by ρᵏ, ρ = −(0.25·7·factor − 0.75)
    assert (abs(at[-1] - at[-2]) > abs(at[1] - at[0])) == (factor > 1)


def test_check_by_hand_leaves_the_check_of_steps() -> None:
    step = run("burgers", lr=0.1, gamma=0.049)
    for _ in range(2):
        with pytest.warns(UserWarning, match="BurgersSGD: expected a curvature below"):
            step.optimizer.check_inner_stability(1.0)
    with pytest.warns(UserWarning, match="got 0"):
        step()
