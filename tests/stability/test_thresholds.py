"""Critical curvature against the real optimizers of torch: bisection of the spectral radius of one step.

On a quadratic, one step with the second moments held fixed is a linear map of parameters and momentum buffers. Its
matrix is read off column by column from ``optimizer.step()`` itself; nothing of the optimizers is written down here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from eos_monitor import critical_curvature, measure_stability, register_critical_curvature
from eos_monitor.stability.thresholds import _RULES, learning_rates

Build = Callable[[list[nn.Parameter]], list[Optimizer]]
BUFFERS = ("momentum_buffer", "exp_avg")


class Quadratic(nn.Module):
    """½ xᵀ H x with x cut into parameters, and optimizers whose second moments are frozen at given values."""

    def __init__(self, hessian: Tensor, sizes: Sequence[int], build: Build, steps: int, seed: int = 0) -> None:
        super().__init__()
        self.hessian, self.steps = hessian, steps
        self.pieces = nn.ParameterList(nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes)
        self.optimizers = build(list(self.pieces))
        self.apply_gradient(torch.ones(len(hessian), dtype=torch.float64))
        for optimizer in self.optimizers:
            optimizer.step()  # creates the state
        g = torch.Generator().manual_seed(seed)
        # Second moments over four orders of magnitude, and a running maximum above them.
        self.frozen = {p: 10 ** (4 * torch.rand(p.shape, generator=g, dtype=torch.float64) - 4) for p in self.pieces}
        self.largest = {
            p: v * (1 + torch.rand(p.shape, generator=g, dtype=torch.float64)) for p, v in self.frozen.items()
        }
        self.momenta = [(self.state(p), key) for p in self.pieces for key in BUFFERS if key in self.state(p)]
        self.momenta = [(state, key) for state, key in self.momenta if state[key] is not None]
        self.settle()

    def forward(self, _: Any = None) -> Tensor:
        x = torch.cat(list(self.pieces))
        return 0.5 * x @ self.hessian @ x

    def state(self, p: Tensor) -> Any:
        return next((o.state[p] for o in self.optimizers if p in o.state), {})

    def group(self, p: Tensor) -> Any:
        return next(g for o in self.optimizers for g in o.param_groups if any(p is q for q in g["params"]))

    def apply_gradient(self, x: Tensor) -> None:
        gradient = self.hessian @ x
        for p, part in zip(self.pieces, gradient.split([p.numel() for p in self.pieces]), strict=True):
            p.grad = part.clone()

    def freeze(self, x: Tensor) -> None:
        """Set the adaptive state so that the step from ``x`` uses the frozen moments at the frozen time."""
        gradient = self.hessian @ x
        for p, g, at in zip(self.pieces, self.cut(gradient), self.cut(x), strict=True):
            state, group = self.state(p), self.group(p)
            if "exp_avg_sq" not in state:
                continue
            if group.get("maximize"):
                g = -g
            if not group.get("decoupled_weight_decay"):
                g = g + group["weight_decay"] * at
            beta2 = float(group["betas"][1])
            state["exp_avg_sq"].copy_((self.frozen[p] - (1 - beta2) * g * g) / beta2)
            state["step"].fill_(self.steps)
            if "max_exp_avg_sq" in state:
                state["max_exp_avg_sq"].copy_(self.largest[p])

    def settle(self) -> None:
        """Set the state to what is to be read: the frozen moments, before the step to come."""
        for p in self.pieces:
            p.data.zero_()
            if "exp_avg_sq" in self.state(p):
                self.state(p)["exp_avg_sq"].copy_(self.frozen[p])
                self.state(p)["step"].fill_(self.steps)
                if "max_exp_avg_sq" in self.state(p):
                    self.state(p)["max_exp_avg_sq"].copy_(self.largest[p])

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split([p.numel() for p in self.pieces])

    def jacobian(self) -> Tensor:
        n = len(self.hessian)
        total = n + sum(state[key].numel() for state, key in self.momenta)
        columns = []
        # Small, so that the squared gradients are small beside the frozen moments.
        for unit in 1e-4 * torch.eye(total, dtype=torch.float64):
            x, rest = unit[:n], unit[n:]
            with torch.no_grad():
                for p, part in zip(self.pieces, self.cut(x), strict=True):
                    p.copy_(part)
                for (state, key), part in zip(
                    self.momenta, rest.split([state[key].numel() for state, key in self.momenta]), strict=True
                ):
                    state[key].copy_(part)
            self.freeze(x)
            self.apply_gradient(x)
            for optimizer in self.optimizers:
                optimizer.step()
            columns.append(torch.cat([p.detach() for p in self.pieces] + [state[key] for state, key in self.momenta]))
        self.settle()
        return torch.stack(columns, dim=1) / 1e-4

    def multipliers(self) -> Tensor:
        return torch.linalg.eigvals(self.jacobian())

    def radius(self) -> float:
        return float(self.multipliers().abs().max())


def bisect(unstable: Callable[[float], bool], start: float = 1e-6) -> float:
    """Smallest factor at which ``unstable`` turns true, to 1e-9 of itself."""
    high = start
    while not unstable(high):
        high *= 16
        assert high < 1e12, "never unstable"
    low = high / 16
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if unstable(middle) else (middle, high)
    return (low + high) / 2


def edge_ratio(hessian: Tensor, optimizers: list[Optimizer]) -> float:
    """λ_max(C^-½ (±H + W) C^-½), dense."""
    curvature = critical_curvature(optimizers)
    assert curvature.c is not None
    scale = curvature.c.rsqrt()
    a = curvature.sign * hessian + torch.diag(curvature.l2)
    return float(torch.linalg.eigvalsh(scale[:, None] * a * scale)[-1])


def random_hessian(n: int, seed: int) -> Tensor:
    """Positive definite with eigenvalues over two orders of magnitude."""
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0]
    return q @ torch.diag(10 ** torch.linspace(-2, 0, n, dtype=torch.float64)) @ q.T


def one(cls: type[Optimizer], **settings: Any) -> Build:
    return lambda ps: [cls(ps, **settings)]


def split(first: type[Optimizer], second: type[Optimizer], a: dict[str, Any], b: dict[str, Any]) -> Build:
    """Two optimizers, the first parameter with one and the rest with the other."""
    return lambda ps: [first(ps[:1], **a), second(ps[1:], **b)]


def groups(cls: type[Optimizer], a: dict[str, Any], b: dict[str, Any], **common: Any) -> Build:
    return lambda ps: [cls([{"params": ps[:1], **a}, {"params": ps[1:], **b}], **common)]


SINGLE: dict[str, Build] = {
    "sgd": one(SGD, lr=0.1),
    "sgd-l2": one(SGD, lr=0.1, weight_decay=0.3),
    "sgd-idle-dampening": one(SGD, lr=0.1, dampening=0.4),
    "sgd-maximize": one(SGD, lr=0.1, maximize=True),
    "sgd-maximize-l2": one(SGD, lr=0.1, maximize=True, weight_decay=0.3, momentum=0.9),
    "sgd-foreach": one(SGD, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": one(SGD, lr=0.1, momentum=0.9, fused=True),
    "sgd-tensor-lr": one(SGD, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9),
    "heavy-ball": one(SGD, lr=0.1, momentum=0.9),
    "heavy-ball-l2": one(SGD, lr=0.1, momentum=0.9, weight_decay=0.3),
    "heavy-ball-dampening": one(SGD, lr=0.1, momentum=0.9, dampening=0.5),
    "averaged-momentum": one(SGD, lr=0.1, momentum=0.9, dampening=0.9, weight_decay=0.3),
    "nesterov": one(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "nesterov-l2": one(SGD, lr=0.1, momentum=0.5, nesterov=True, weight_decay=0.3),
    "adam": one(Adam, lr=1e-2),
    "adam-l2": one(Adam, lr=1e-2, weight_decay=0.3),
    "adam-large-eps": one(Adam, lr=1e-2, eps=0.1, betas=(0.8, 0.95)),
    "adam-no-momentum": one(Adam, lr=1e-2, betas=(0.0, 0.95)),
    "adam-maximize": one(Adam, lr=1e-2, maximize=True, weight_decay=0.3),
    "adam-foreach": one(Adam, lr=1e-2, foreach=True),
    "adam-fused": one(Adam, lr=1e-2, fused=True),
    "adam-tensor-lr": one(Adam, lr=torch.tensor(1e-2, dtype=torch.float64), foreach=False),
    "adam-decoupled": one(Adam, lr=1e-2, weight_decay=5.0, decoupled_weight_decay=True),
    "adamw": one(AdamW, lr=1e-2),
    "adamw-strong-decay": one(AdamW, lr=0.1, weight_decay=3.0),
    "adamw-maximize": one(AdamW, lr=1e-2, weight_decay=5.0, maximize=True),
    "amsgrad": one(Adam, lr=1e-2, amsgrad=True),
    "amsgrad-l2": one(Adam, lr=1e-2, amsgrad=True, weight_decay=0.3),
    "adamw-amsgrad": one(AdamW, lr=1e-2, amsgrad=True, weight_decay=5.0),
}  # fmt: skip

MIXED: dict[str, Build] = {
    "sgd-lrs": groups(SGD, {"lr": 0.1}, {"lr": 0.7}),
    "sgd-momenta": groups(SGD, {"momentum": 0.9, "weight_decay": 0.2}, {"momentum": 0.3, "nesterov": True}, lr=0.1),
    "sgd-decay-and-none": groups(SGD, {"weight_decay": 0.5}, {"weight_decay": 0.0}, lr=0.1, momentum=0.9),
    "adam-betas": groups(Adam, {"betas": (0.9, 0.99)}, {"betas": (0.5, 0.9), "lr": 3e-3}, lr=1e-2),
    "adam-l2-and-none": groups(Adam, {"weight_decay": 0.5}, {"weight_decay": 0.0, "eps": 1e-2}, lr=1e-2),
    "adamw-decay-and-none": groups(AdamW, {"weight_decay": 8.0}, {"weight_decay": 0.0}, lr=1e-2),
    "adamw-amsgrad-and-not": groups(AdamW, {"amsgrad": True}, {"amsgrad": False, "betas": (0.95, 0.9)}, lr=1e-2),
    "sgd+adamw": split(SGD, AdamW, {"lr": 0.3, "momentum": 0.9}, {"lr": 1e-2, "weight_decay": 4.0}),
    "nesterov+adam-l2": split(
        SGD,
        Adam,
        {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.02, "weight_decay": 0.3},
    ),
    "adam+amsgrad": split(Adam, AdamW, {"lr": 1e-2, "betas": (0.7, 0.9)}, {"lr": 2e-2, "amsgrad": True}),
    "sgd+sgd-maximize-both": split(
        SGD, SGD, {"lr": 0.1, "maximize": True}, {"lr": 0.3, "momentum": 0.9, "maximize": True}
    ),
}

CASES = [(name, build, sizes) for name, build in SINGLE.items() for sizes in ((1,), (2, 3))]
CASES += [(name, build, sizes) for name, build in MIXED.items() for sizes in ((1, 1), (2, 4))]
IDS = [f"{name}-{sum(sizes)}d" for name, _, sizes in CASES]
# Young states too, whose bias corrections are far from 1; SGD's do not age.
AGED = [(*case, steps) for case in CASES for steps in ((2, 100) if "ada" in case[0] or "ams" in case[0] else (100,))]


def quadratic(build: Build, sizes: Sequence[int], steps: int, seed: int = 1) -> Quadratic:
    n = sum(sizes)
    hessian = random_hessian(n, seed) if n > 1 else torch.ones(1, 1, dtype=torch.float64)
    system = Quadratic(hessian, sizes, build, steps)
    if system.optimizers[0].param_groups[0].get("maximize"):
        system.hessian = -hessian  # a loss to be maximized has its bowl upside down
    return system


@pytest.mark.parametrize(
    ("name", "build", "sizes", "steps"), AGED, ids=[f"{name}-{sum(sizes)}d-{steps}" for name, _, sizes, steps in AGED]
)
def test_critical_curvature_is_where_the_real_step_turns_unstable(
    name: str, build: Build, sizes: tuple[int, ...], steps: int
) -> None:
    """Scale H until the edge ratio is 1; scale it until the spectral radius is 1; the factors agree."""
    system = quadratic(build, sizes, steps)
    unit = system.hessian

    def unstable(factor: float) -> bool:
        system.hessian = factor * unit
        return system.radius() > 1.0

    measured = bisect(unstable)
    predicted = bisect(lambda factor: edge_ratio(factor * unit, system.optimizers) > 1.0)
    # Both bisections stop at 1e-9; the eigenvalues of a 2n × 2n matrix near -1 are good to 1e-12.
    assert measured == pytest.approx(predicted, rel=1e-8)
    system.hessian = 1.001 * measured * unit
    largest = max(system.multipliers().tolist(), key=abs)
    # It leaves by a flip: |z| grows by 2κ(r − 1) with κ ≤ 39 here.
    assert abs(largest.imag) < 1e-9
    assert -1.1 < largest.real < -1.0


@pytest.mark.parametrize(("name", "build", "sizes"), CASES, ids=IDS)
def test_edge_scale_is_where_the_real_step_turns_unstable(name: str, build: Build, sizes: tuple[int, ...]) -> None:
    """Scale all learning rates until the real step's spectral radius is 1; that is the reading's ``edge_scale``."""
    system = quadratic(build, sizes, steps=100)
    unit = system.hessian
    # Some way below the edge, as runs are; the reading's absolute tolerance of 1e-6 is nothing there.
    system.hessian = unit * bisect(lambda factor: edge_ratio(factor * unit, system.optimizers) > 0.3)
    lrs = [(g, g["lr"]) for o in system.optimizers for g in o.param_groups]
    reading = measure_stability(
        system, lambda m, b: m(b), [torch.zeros(1)], system.optimizers, rtol=1e-9, max_matvecs=300, full_batch=True
    )
    assert reading.edge_scale is not None

    def unstable(factor: float) -> bool:
        for group, lr in lrs:
            group["lr"] = lr * factor
        return system.radius() > 1.0

    measured = bisect(unstable)
    assert reading.edge_scale == pytest.approx(measured, rel=1e-6)
    assert reading.edge_lr == pytest.approx(tuple(measured * float(lr) for _, lr in lrs), rel=1e-6)


def test_edge_scale_survives_decay_that_is_unstable_by_itself() -> None:
    """Far below the edge the factor would take lr·wd past 2 in one group; the real limit lies before that."""
    system = quadratic(MIXED["adamw-decay-and-none"], (1, 1), steps=100)
    lrs = [(g, g["lr"]) for g in system.optimizers[0].param_groups]
    reading = measure_stability(system, lambda m, b: m(b), [torch.zeros(1)], system.optimizers, rtol=1e-9)

    def unstable(factor: float) -> bool:
        for group, lr in lrs:
            group["lr"] = lr * factor
        return system.radius() > 1.0

    # The reading's absolute tolerance of 1e-6 is 3e-3 of this edge ratio; at such a pole it matters little.
    assert reading.edge_scale == pytest.approx(bisect(unstable), rel=1e-4)


def test_growth_past_the_edge_decay_below_it() -> None:
    """The torch optimizer itself: 0.99 of the predicted curvature decays, 1.01 grows."""
    for build in (SINGLE["heavy-ball"], SINGLE["nesterov"], SINGLE["sgd"]):
        for share, grows in ((0.99, False), (1.01, True)):
            p = nn.Parameter(torch.ones(1, dtype=torch.float64))
            (optimizer,) = build([p])
            c = critical_curvature(optimizer).c
            assert c is not None
            for _ in range(2000):
                p.grad = share * c * p.detach()
                optimizer.step()
            assert (abs(p.item()) > 1.0) is grows


# What is read, and what is not guessed.


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(n)) for n in sizes]


def stepped(optimizer: Optimizer, times: int = 1) -> Optimizer:
    for _ in range(times):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


class OwnStep(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Renamed(SGD):
    """Changes nothing that matters."""


UNKNOWN: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.1),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.1),
    "subclass-with-own-step": lambda ps: OwnStep(ps, lr=0.1),
}
if hasattr(torch.optim, "Muon"):
    UNKNOWN["muon"] = lambda ps: torch.optim.Muon([nn.Parameter(torch.ones(2, 2))], lr=0.1)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_optimizer_is_not_guessed(name: str) -> None:
    optimizer = UNKNOWN[name](parameters(3, 2))
    curvature = critical_curvature(optimizer)
    assert curvature.c is None
    assert curvature.threshold is None
    assert curvature.without_threshold == (type(optimizer).__name__,)
    assert curvature.ready


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_optimizer_drops_out_beside_a_known_one(name: str) -> None:
    known = SGD(parameters(2), lr=0.5, weight_decay=0.1)
    curvature = critical_curvature([UNKNOWN[name](parameters(3)), known])
    assert curvature.c is not None
    assert curvature.c[-2:].tolist() == [4.0, 4.0]
    assert bool(torch.isinf(curvature.c[:-2]).all())
    assert curvature.l2[-2:].tolist() == pytest.approx([0.1, 0.1])
    assert not bool(curvature.l2[:-2].any())
    assert curvature.threshold is None
    assert curvature.ready


def test_subclass_without_a_step_of_its_own_inherits() -> None:
    curvature = critical_curvature(Renamed(parameters(2), lr=0.1, momentum=0.9))
    assert curvature.threshold == pytest.approx(3.8)
    assert curvature.without_threshold == ()


def test_patched_step_still_counts_as_the_class() -> None:
    """Schedulers wrap the bound ``step`` of the instance; that is no other optimizer."""
    optimizer = SGD(parameters(2), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert critical_curvature(optimizer).c is not None


def test_vectors_follow_the_param_groups_by_identity() -> None:
    a, b, c, frozen = parameters(2, 1, 3, 4)
    frozen.requires_grad_(False)
    first = SGD([{"params": [c, frozen], "lr": 0.5}, {"params": [a], "lr": 0.25}])
    second = SGD([b], lr=0.125)
    curvature = critical_curvature([first, second])
    assert [id(p) for p in curvature.params] == [id(c), id(a), id(b)]
    assert curvature.c is not None
    assert curvature.c.tolist() == [4.0] * 3 + [8.0] * 2 + [16.0]
    assert curvature.l2.shape == curvature.c.shape
    assert learning_rates([first, second]) == (0.5, 0.25, 0.125)


def test_names_come_from_the_optimizer_or_say_the_place() -> None:
    net = nn.Linear(2, 1)
    named, unnamed = SGD(net.named_parameters(), lr=0.1), SGD(parameters(1, 1), lr=0.1)
    assert critical_curvature([named, unnamed]).names == (
        "weight",
        "bias",
        "optimizer 1, group 0, parameter 0",
        "optimizer 1, group 0, parameter 1",
    )


def test_c_takes_the_parameters_precision_and_shape_of_state() -> None:
    p = nn.Parameter(torch.ones(2, 3))
    adam = Adam([p], lr=0.1)
    p.grad = torch.arange(1.0, 7.0).reshape(2, 3)
    adam.step()
    c = critical_curvature(adam).c
    assert c is not None
    assert (c.dtype, c.shape) == (torch.float32, (6,))
    # √v̂ = |g| √((1 − β2)/(1 − β2²)) after one step: proportional to the gradient, in its order.
    torch.testing.assert_close(c / c[0], torch.arange(1.0, 7.0), rtol=1e-5, atol=0)
    double = critical_curvature(SGD([nn.Parameter(torch.ones(2, dtype=torch.float64))], lr=0.1)).c
    assert double is not None
    assert double.tolist() == [20.0, 20.0]  # not 20 rounded through float32


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_bfloat16_parameters_give_float32_vectors(order: tuple[int, int]) -> None:
    ps = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2))]
    curvature = critical_curvature(SGD([ps[i] for i in order], lr=0.3, weight_decay=0.1))
    assert curvature.c is not None
    assert curvature.c.tolist() == pytest.approx([2 / 0.3] * 4, rel=1e-6)
    assert curvature.l2.tolist() == pytest.approx([0.1] * 4, rel=1e-6)


THRESHOLDS: dict[str, tuple[Build, float | None]] = {
    "sgd": (SINGLE["sgd"], 2.0),
    "heavy-ball": (SINGLE["heavy-ball"], 3.8),
    "averaged-momentum": (SINGLE["averaged-momentum"], 38.0),
    "nesterov": (SINGLE["nesterov"], 3.8 / 2.8),
    "groups-alike": (groups(SGD, {"lr": 0.1}, {"lr": 0.7}, momentum=0.9), 3.8),
    "groups-that-differ": (groups(SGD, {"momentum": 0.9}, {"momentum": 0.5}, lr=0.1), None),
}


@pytest.mark.parametrize("name", THRESHOLDS)
def test_threshold(name: str) -> None:
    build, threshold = THRESHOLDS[name]
    assert critical_curvature(build(parameters(2, 3))).threshold == (threshold and pytest.approx(threshold))


def test_threshold_of_adam_has_its_bias_correction() -> None:
    adam = stepped(Adam(parameters(2), lr=0.1, betas=(0.9, 0.999)), 4)
    assert critical_curvature(adam).threshold == pytest.approx(38 * (1 - 0.9**5))


def test_lr_scale_reads_without_touching_the_optimizer() -> None:
    sgd = SGD([{"params": parameters(1), "lr": 0.1}, {"params": parameters(1), "lr": torch.tensor(0.2)}])
    c = critical_curvature(sgd, lr_scale=4.0).c
    assert c is not None
    assert c.tolist() == pytest.approx([5.0, 2.5])
    assert learning_rates([sgd]) == pytest.approx((0.1, 0.2))


@pytest.mark.parametrize("dampening", [1.0, 1.5])
def test_momentum_that_never_takes_a_gradient_in_has_no_limit(dampening: float) -> None:
    c = critical_curvature(SGD(parameters(2), lr=0.1, momentum=0.9, dampening=dampening)).c
    assert c is not None
    assert bool(torch.isinf(c).all())


def test_learning_rate_zero_has_no_limit() -> None:
    c = critical_curvature(groups(SGD, {"lr": 0.0}, {"lr": 0.5})(parameters(2, 1))).c
    assert c is not None
    assert c.tolist() == [math.inf, math.inf, 4.0]


def test_parameter_in_two_optimizers_is_refused() -> None:
    (p,) = parameters(2)
    with pytest.raises(
        ValueError, match="Expected each parameter in one place, got 'optimizer 1, group 0, parameter 0'"
    ):
        critical_curvature([SGD([p], lr=0.1), Adam([p])])


def test_minimizing_and_maximizing_is_refused() -> None:
    with pytest.raises(ValueError, match="all minimize or all maximize the loss, got both"):
        critical_curvature(groups(SGD, {"maximize": True}, {"maximize": False}, lr=0.1)(parameters(1, 1)))


@pytest.mark.parametrize("maximize", [False, True])
def test_sign(maximize: bool) -> None:
    assert critical_curvature(SGD(parameters(1), lr=0.1, maximize=maximize)).sign == (-1 if maximize else 1)


def test_nothing_to_train_is_refused() -> None:
    sgd = SGD(parameters(2), lr=0.1)
    sgd.param_groups[0]["params"][0].requires_grad_(False)
    with pytest.raises(ValueError, match="Expected an optimizer with trainable parameters, got none"):
        critical_curvature(sgd)


@pytest.mark.parametrize("cls", [Adam, AdamW])
def test_adam_before_its_first_step_knows_nothing(cls: type[Optimizer]) -> None:
    curvature = critical_curvature(cls(parameters(2), lr=0.1))  # type: ignore[call-arg]
    assert curvature.c is None
    assert curvature.threshold is None
    assert not curvature.ready
    assert curvature.without_threshold == ()


def test_optimizer_that_has_not_begun_keeps_a_known_one_waiting() -> None:
    curvature = critical_curvature([SGD(parameters(2), lr=0.1), Adam(parameters(3))])
    assert not curvature.ready


def test_parameter_without_a_gradient_drops_out_for_good() -> None:
    used, idle = parameters(2, 3)
    adam = Adam([used, idle], betas=(0.0, 0.9))
    for _ in range(11):
        used.grad = torch.ones(2)
        adam.step()
    curvature = critical_curvature(adam)
    assert curvature.ready
    assert curvature.c is not None
    assert torch.isfinite(curvature.c).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("beta1", "last"), [(0.0, 10), (0.5, 10), (0.9, 30), (0.95, 60)])
def test_adaptive_state_is_ready_after_the_larger_of_ten_and_three_memories(beta1: float, last: int) -> None:
    """More than max(10, 3/(1 − β1)) steps, give or take the rounding of the quotient."""
    adam = Adam(parameters(1), betas=(beta1, 0.999))
    ready = []
    for _ in range(last + 2):
        stepped(adam)
        ready.append(critical_curvature(adam).ready)
    first = 1 + ready.index(True)
    assert first in (last, last + 1)
    assert all(ready[first:])


@pytest.mark.parametrize("cls", [SGD, Adam, AdamW, torch.optim.RMSprop])
def test_looking_creates_no_state(cls: type[Optimizer]) -> None:
    optimizer = cls(parameters(2, 3), lr=0.1)  # type: ignore[call-arg]
    before = optimizer.state_dict()
    critical_curvature(optimizer)
    assert len(optimizer.state) == 0
    assert optimizer.state_dict() == before


def test_looking_leaves_the_state() -> None:
    adam = stepped(Adam(parameters(2), lr=torch.tensor(0.1), amsgrad=True, foreach=False), 3)
    values = {k: (v, v.clone(), v._version) for k, v in adam.state[adam.param_groups[0]["params"][0]].items()}
    critical_curvature(adam, lr_scale=2.0)
    for tensor, copy, version in values.values():
        assert torch.equal(tensor, copy)
        assert tensor._version == version
    assert float(adam.param_groups[0]["lr"]) == pytest.approx(0.1)


# The registry.


class Custom(Optimizer):
    """x ← x − lr·scale·g, with a scale for each coordinate and a decay that is added to the gradient."""

    def __init__(self, params: Any, lr: float, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= group["lr"] * (p.grad + group["decay"] * p.data) * torch.arange(1, p.numel() + 1)


@pytest.fixture
def registry() -> Any:
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)


@pytest.mark.usefixtures("registry")
def test_registered_rule_gives_c_and_decay() -> None:
    seen = []

    @register_critical_curvature(Custom)
    def rule(group: Any, param: Tensor, state: Any) -> Any:
        seen.append((dict(group), param, dict(state)))
        return 2 / (group["lr"] * torch.arange(1, param.numel() + 1)), group["decay"]

    custom = Custom(parameters(3), lr=0.1, decay=0.3)
    curvature = critical_curvature(custom)
    assert curvature.c is not None
    assert curvature.c.tolist() == pytest.approx([20.0, 10.0, 20 / 3])
    assert curvature.l2.tolist() == pytest.approx([0.3] * 3)
    assert (curvature.threshold, curvature.without_threshold) == (None, ())
    assert seen == [({"lr": 0.1, "decay": 0.3}, custom.param_groups[0]["params"][0], {})]


RULES: dict[str, tuple[Any, list[float], list[float], float | None]] = {
    "number": (5.0, [5.0, 5.0], [0.0, 0.0], None),
    "integer": (5, [5.0, 5.0], [0.0, 0.0], None),
    "tensor": (torch.tensor([1.0, 2.0]), [1.0, 2.0], [0.0, 0.0], None),
    "scalar-tensor": (torch.tensor(3.0), [3.0, 3.0], [0.0, 0.0], None),
    "decay-tensor": ((5.0, torch.tensor([0.1, 0.2])), [5.0, 5.0], [0.1, 0.2], None),
    "threshold": ((5.0, 0.1, 2.5), [5.0, 5.0], [0.1, 0.1], 2.5),
}


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", RULES)
def test_what_a_rule_may_return(name: str) -> None:
    value, c, l2, threshold = RULES[name]
    register_critical_curvature(Custom)(lambda group, param, state: value)
    curvature = critical_curvature(Custom(parameters(2), lr=0.1))
    assert curvature.c is not None
    assert curvature.c.tolist() == pytest.approx(c)
    assert curvature.l2.tolist() == pytest.approx(l2)
    assert curvature.threshold == threshold


@pytest.mark.usefixtures("registry")
def test_rule_sees_tensors_as_floats() -> None:
    seen = {}

    @register_critical_curvature(OwnStep)
    def rule(group: Any, param: Tensor, state: Any) -> float:
        seen.update(group)
        return 1.0

    critical_curvature(OwnStep(parameters(1), lr=torch.tensor(0.5)))
    assert type(seen["lr"]) is float
    assert seen["lr"] == 0.5
    assert "params" not in seen


@pytest.mark.usefixtures("registry")
def test_rule_of_the_nearest_class_wins() -> None:
    register_critical_curvature(OwnStep)(lambda group, param, state: 7.0)
    curvature = critical_curvature(OwnStep(parameters(1), lr=0.1))
    assert curvature.c is not None
    assert curvature.c.tolist() == [7.0]


@pytest.mark.parametrize("thing", [nn.Linear, SGD(parameters(1), lr=0.1), "SGD"], ids=["module", "instance", "name"])
def test_only_classes_of_optimizers_can_be_registered(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected a subclass of torch\.optim\.Optimizer, got"):
        register_critical_curvature(thing)
