"""Critical curvature against the real optimizers of torch: bisection of the spectral radius of one step."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    SparseAdam,
)

from eos_monitor import critical_curvature, measure_stability, register_critical_curvature
from eos_monitor.limits.thresholds import _RULES, learning_rates
from tests.limits.frozen_step import (
    Build,
    Size,
    crossing,
    edge_ratio,
    groups,
    one,
    quadratic,
    split,
)

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
    "asgd": one(ASGD, lr=0.1),
    "asgd-strong": one(ASGD, lr=0.1, lambd=0.05, alpha=0.6, t0=10, weight_decay=0.3),
    "asgd-foreach": one(ASGD, lr=0.1, lambd=0.05, foreach=True),
    "asgd-maximize": one(ASGD, lr=0.1, lambd=0.05, maximize=True),
    "adadelta": one(Adadelta),
    "adadelta-l2": one(Adadelta, lr=0.1, rho=0.8, eps=1e-2, weight_decay=0.3),
    "adadelta-foreach-maximize": one(Adadelta, lr=0.1, foreach=True, maximize=True),
    "adagrad": one(Adagrad),
    "adagrad-decaying": one(Adagrad, lr=0.1, lr_decay=0.05, eps=0.1, weight_decay=0.3),
    "adagrad-foreach": one(Adagrad, lr_decay=0.05, foreach=True),
    "adagrad-fused": one(Adagrad, fused=True),
    "adagrad-maximize": one(Adagrad, maximize=True),
    "adamax": one(Adamax),
    "adamax-l2": one(Adamax, lr=0.1, betas=(0.8, 0.95), weight_decay=0.3),
    "adamax-foreach-maximize": one(Adamax, lr=0.1, foreach=True, maximize=True),
    "nadam": one(NAdam),
    "nadam-l2": one(NAdam, lr=0.1, momentum_decay=0.05, weight_decay=0.3),
    "nadam-decoupled": one(NAdam, lr=0.1, momentum_decay=0.05, weight_decay=3.0, decoupled_weight_decay=True),
    "nadam-foreach-maximize": one(NAdam, lr=0.1, foreach=True, maximize=True, eps=0.1),
    "radam": one(RAdam),
    "radam-l2": one(RAdam, lr=0.1, weight_decay=0.3, eps=0.1, betas=(0.8, 0.99)),
    "radam-decoupled": one(RAdam, lr=0.1, weight_decay=3.0, decoupled_weight_decay=True),
    "radam-foreach-maximize": one(RAdam, lr=0.1, foreach=True, maximize=True),
    "radam-never-rectified": one(RAdam, betas=(0.9, 0.5)),
    "rmsprop": one(RMSprop),
    "rmsprop-momentum": one(RMSprop, momentum=0.9, eps=0.1),
    "rmsprop-centered": one(RMSprop, centered=True, alpha=0.9),
    "rmsprop-all": one(RMSprop, centered=True, momentum=0.5, weight_decay=0.3),
    "rmsprop-foreach-maximize": one(RMSprop, centered=True, momentum=0.5, foreach=True, maximize=True),
    "rmsprop-tensor-lr": one(RMSprop, lr=torch.tensor(0.1, dtype=torch.float64), momentum=0.9),
    "sparse-adam": one(SparseAdam, lr=0.1, eps=1e-3),
    "sparse-adam-maximize": one(SparseAdam, lr=torch.tensor(0.1, dtype=torch.float64), maximize=True),
    "adafactor": one(Adafactor),
    "adafactor-decay": one(Adafactor, lr=0.02, weight_decay=5.0, eps=(1e-4, 1e-2)),
    "adafactor-foreach-maximize": one(Adafactor, lr=0.02, foreach=True, maximize=True),
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
    "asgd-lrs": groups(ASGD, {"lr": 0.1}, {"lr": 0.7, "lambd": 5e-3}),
    "adadelta-l2-and-none": groups(Adadelta, {"weight_decay": 0.01}, {"lr": 0.2, "rho": 0.5}),
    "adagrad-lrs": groups(Adagrad, {"lr": 0.1}, {"lr_decay": 0.1, "weight_decay": 0.1}),
    "adamax-betas": groups(Adamax, {"betas": (0.9, 0.99)}, {"betas": (0.5, 0.9), "weight_decay": 0.1}),
    "nadam-decays": groups(NAdam, {"momentum_decay": 0.1}, {"betas": (0.5, 0.9), "weight_decay": 0.1}, lr=0.1),
    "radam-decoupled-and-none": groups(
        RAdam, {"weight_decay": 3.0}, {"betas": (0.5, 0.9)}, lr=0.1, decoupled_weight_decay=True
    ),
    "rmsprop-momenta": groups(RMSprop, {"momentum": 0.9}, {"centered": True, "weight_decay": 0.1}),
    "sparse-adam-lrs": groups(SparseAdam, {"lr": 0.1}, {"lr": 0.01, "betas": (0.5, 0.9)}),
    "adafactor-decay-and-none": groups(Adafactor, {"weight_decay": 20.0}, {"lr": 0.01}, lr=0.02),
    "nesterov+rmsprop": split(SGD, RMSprop, {"lr": 0.3, "momentum": 0.9, "nesterov": True}, {"momentum": 0.9}),
    "nadam+asgd": split(NAdam, ASGD, {"lr": 0.1, "momentum_decay": 0.1}, {"lr": 0.1, "lambd": 1e-2}),
    "adamw+adafactor": split(AdamW, Adafactor, {"lr": 0.01, "weight_decay": 5.0}, {"lr": 0.02}),
    "sgd+sgd-maximize-both": split(
        SGD, SGD, {"lr": 0.1, "maximize": True}, {"lr": 0.3, "momentum": 0.9, "maximize": True}
    ),
}

# Ways to compute the same step are tried once each.
VARIANTS = ("foreach", "fused", "maximize", "tensor")
CASES = [
    (name, build, sizes)
    for name, build in SINGLE.items()
    for sizes in ((1,), (2, 3))
    if sizes != (1,) or not any(word in name for word in VARIANTS)
]
CASES += [(name, build, sizes) for name, build in MIXED.items() for sizes in ((2, 4),)]
PLAIN = [case for case in CASES if not any(word in case[0] for word in VARIANTS)]
# Young states too, whose bias corrections are far from 1 (and RAdam's without P); SGD's do not age.
AGED = [(*case, 100) for case in CASES]
LARGE = [case for case in PLAIN if sum(case[2]) > 2]
AGED += [(*case, 2) for case in LARGE if case[0] in SINGLE and ("ad" in case[0] or "ams" in case[0])]
AGED += [("nadam", SINGLE["nadam"], (2, 3), steps) for steps in (2, 2000)]  # its threshold creeps
# Single precision in the state (eta, mu_product), 6e-8 each, and with it a product of μ's.
TOLERANCES = {"asgd": 3e-7, "nadam": 3e-7}


def tolerance(name: str) -> float:
    """Both searches stop at 1e-9; the eigenvalues of a 2n × 2n matrix near -1 are good to 1e-12."""
    return max((rtol for part, rtol in TOLERANCES.items() if part in name), default=1e-8)


@pytest.mark.parametrize(
    ("name", "build", "sizes", "steps"), AGED, ids=[f"{name}-{sum(sizes)}d-{steps}" for name, _, sizes, steps in AGED]
)
def test_critical_curvature_is_where_the_real_step_turns_unstable(
    name: str, build: Build, sizes: tuple[int, ...], steps: int
) -> None:
    """Scale H until the edge ratio is 1; scale it until the spectral radius is 1; the factors agree."""
    system = quadratic(build, sizes, steps)
    unit = system.hessian
    predicted = crossing(lambda factor: edge_ratio(factor * unit, system.optimizers))
    measured = system.critical_scale(near=predicted)
    assert measured == pytest.approx(predicted, rel=tolerance(name))
    # It leaves by a flip; |z| − 1 is 2κ(r − 1) with κ ≤ 39 here, and r is 1 to 1e-9.
    assert system.leading() == pytest.approx(-1.0, abs=1e-7)


# Adafactor's step depends on RMS(p) too: its map is linear to the order of the probe, 1e-7 of RMS(p) = 0.7, up to
# rounding over the probe, 1e-16/1e-7.
@pytest.mark.parametrize("sizes", [(3, 2), ((2, 3),), ((2, 2, 2), 3)], ids=str)
@pytest.mark.parametrize("settings", [{"lr": 0.3}, {"lr": 0.02}, {"eps": (None, 2.0)}], ids=str)
def test_adafactor_reads_the_size_of_parameters_and_factored_moments(
    sizes: tuple[Size, ...], settings: dict[str, Any]
) -> None:
    system = quadratic(one(Adafactor, **settings), sizes, 100, center=0.7, probe=1e-7)
    unit = system.hessian
    predicted = crossing(lambda factor: edge_ratio(factor * unit, system.optimizers))
    assert system.critical_scale(near=predicted) == pytest.approx(predicted, rel=1e-6)
    assert system.leading() == pytest.approx(-1.0, abs=1e-5)


def test_update_clip_of_adafactor_only_moves_the_edge_away() -> None:
    """The clip acts on updates whose RMS is above d; the rule leaves it out, and so errs on the side of stability."""
    p = nn.Parameter(torch.full((1,), 0.7, dtype=torch.float64))
    optimizer = Adafactor([p], lr=0.1)
    p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    c = critical_curvature(optimizer).c
    assert c is not None
    before = p.item()
    p.grad = 100 * torch.ones_like(p)  # far above what the moments have seen
    optimizer.step()
    assert 0.0 < abs(p.item() - before) < 2 * 100 / float(c)  # c alone says 2g/c


def test_sparse_adam_speaks_of_the_rows_that_are_touched() -> None:
    """Rows left alone keep their place: the edge is that of the touched block of H."""
    system = quadratic(one(SparseAdam, lr=0.1), (4,), 100)
    unit, touched = system.hessian, torch.tensor([0, 2])
    (optimizer,), (p,) = system.optimizers, system.pieces

    def radius(factor: float) -> float:
        block = factor * unit[touched][:, touched]
        columns = []
        for probe in 1e-4 * torch.eye(4, dtype=torch.float64):
            system.settle()
            x, momentum = probe[:2], probe[2:]
            gradient = block @ x
            with torch.no_grad():
                p[touched] = x
                optimizer.state[p]["exp_avg"].zero_()[touched] = momentum
                moments = optimizer.state[p]["exp_avg_sq"]
                moments[touched] = (moments[touched] - 1e-3 * gradient**2) / 0.999
            p.grad = torch.sparse_coo_tensor(touched[None], gradient, p.shape, check_invariants=True)
            optimizer.step()
            columns.append(torch.cat([p.detach()[touched], optimizer.state[p]["exp_avg"][touched]]))
        system.settle()
        return float(torch.linalg.eigvals(torch.stack(columns, dim=1) / 1e-4).abs().max())

    c = critical_curvature(optimizer).c
    assert c is not None
    scale = c[touched].rsqrt()
    predicted = 1 / float(torch.linalg.eigvalsh(scale[:, None] * unit[touched][:, touched] * scale)[-1])
    assert crossing(radius) == pytest.approx(predicted, rel=1e-8)


@pytest.mark.parametrize(("name", "build", "sizes"), LARGE, ids=[name for name, _, _ in LARGE])
def test_edge_scale_is_where_the_real_step_turns_unstable(name: str, build: Build, sizes: tuple[int, ...]) -> None:
    """Scale all learning rates until the real step's spectral radius is 1; that is the reading's ``edge_scale``."""
    system = quadratic(build, sizes, steps=100)
    unit = system.hessian
    # Some way below the edge, as runs are; the reading's absolute tolerance of 1e-6 is nothing there.
    system.hessian = unit * crossing(lambda factor: edge_ratio(factor * unit, system.optimizers) / 0.3)
    lrs = [(g, g["lr"]) for o in system.optimizers for g in o.param_groups]
    reading = measure_stability(
        system, lambda m, b: m(b), [torch.zeros(1)], system.optimizers, rtol=1e-9, max_matvecs=300, full_batch=True
    )
    assert reading.edge_scale is not None

    def radius(factor: float) -> float:
        for group, lr in lrs:
            group["lr"] = lr * factor
        return system.radius()

    measured = crossing(radius, start=0.5)
    assert reading.edge_scale == pytest.approx(measured, rel=1e-6)
    assert reading.edge_lr == pytest.approx(tuple(measured * float(lr) for _, lr in lrs), rel=1e-6)


def test_edge_scale_survives_decay_that_is_unstable_by_itself() -> None:
    """Far below the edge the factor would take lr·wd past 2 in one group; the real limit lies before that."""
    system = quadratic(MIXED["adamw-decay-and-none"], (1, 1), steps=100)
    lrs = [(g, g["lr"]) for g in system.optimizers[0].param_groups]
    reading = measure_stability(system, lambda m, b: m(b), [torch.zeros(1)], system.optimizers, rtol=1e-9)

    def radius(factor: float) -> float:
        for group, lr in lrs:
            group["lr"] = lr * factor
        return system.radius()

    # The reading's absolute tolerance of 1e-6 is 3e-3 of this edge ratio; at such a pole it matters little.
    assert reading.edge_scale == pytest.approx(crossing(radius), rel=1e-4)


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


def test_no_learning_rate_leads_adafactor_to_an_edge_beyond_its_relative_step() -> None:
    """Above t^-½ its step no longer grows with lr, so that an edge farther away is out of reach."""
    system = quadratic(one(Adafactor, lr=0.3), (2, 3), steps=100)
    system.hessian = system.hessian * crossing(lambda f: edge_ratio(f * system.hessian, system.optimizers) / 0.3)
    reading = measure_stability(system, lambda m, b: m(b), [torch.zeros(1)], system.optimizers)
    assert reading.edge_ratio == pytest.approx(0.3, rel=1e-3)
    assert reading.edge_scale is None


def test_decay_that_is_unstable_by_itself_is_said_and_gives_no_edge() -> None:
    system = quadratic(one(AdamW, lr=0.1, weight_decay=25.0), (2, 3), steps=100)
    reading = measure_stability(system, lambda m, b: m(b), [torch.zeros(1)], system.optimizers)
    assert reading.edge_ratio is None
    assert reading.notes == ("weight decay alone is unstable: lr · weight_decay = 2.5 is past its limit of 2",)
    system.hessian = 1e-9 * system.hessian
    assert system.leading().real == pytest.approx(1 - 2.5, rel=1e-6)  # so is the real step


def test_decay_at_its_limit_counts_as_unstable() -> None:
    adam = stepped(AdamW(parameters(2), lr=0.5, weight_decay=4.0), 40)
    curvature = critical_curvature(adam)
    assert curvature.c is not None
    assert bool((curvature.c < 0).all())
    assert curvature.notes == ("weight decay alone is unstable: lr · weight_decay = 2 is past its limit of 2",)


def test_dampening_that_takes_no_gradient_in_is_said() -> None:
    system = quadratic(one(SGD, lr=0.1, momentum=0.9, dampening=1.0), (2, 3), steps=100)
    reading = measure_stability(system, lambda m, b: m(b), [torch.zeros(1)], system.optimizers)
    assert reading.edge_ratio is None
    assert reading.notes == ("momentum with a dampening of 1 or more takes no gradient in",)


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


UNKNOWN: dict[str, tuple[Callable[[list[nn.Parameter]], Optimizer], str]] = {
    "rprop": (lambda ps: torch.optim.Rprop(ps, lr=0.1), "Rprop (sign rule)"),
    "lbfgs": (lambda ps: torch.optim.LBFGS(ps, lr=0.1), "LBFGS (quasi-Newton or line search)"),
    "subclass-with-own-step": (lambda ps: OwnStep(ps, lr=0.1), "OwnStep"),
}
if hasattr(torch.optim, "Muon"):
    UNKNOWN["muon"] = (
        lambda ps: torch.optim.Muon([nn.Parameter(torch.ones(2, 2))], lr=0.1),
        "Muon (step-size floor: see the directional ratio)",
    )


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_optimizer_is_not_guessed(name: str) -> None:
    build, said = UNKNOWN[name]
    curvature = critical_curvature(build(parameters(3, 2)))
    assert curvature.c is None
    assert curvature.threshold is None
    assert curvature.without_threshold == (said,)
    assert curvature.ready


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_optimizer_drops_out_beside_a_known_one(name: str) -> None:
    known = SGD(parameters(2), lr=0.5, weight_decay=0.1)
    curvature = critical_curvature([UNKNOWN[name][0](parameters(3)), known])
    assert curvature.c is not None
    assert curvature.c[-2:].tolist() == [4.0, 4.0]
    assert bool(torch.isinf(curvature.c[:-2]).all())
    assert curvature.l2[-2:].tolist() == pytest.approx([0.1, 0.1])
    assert not bool(curvature.l2[:-2].any())
    assert curvature.threshold is None
    assert curvature.ready


def test_every_optimizer_of_torch_has_a_rule() -> None:
    """What torch adds must be looked at."""
    there = {thing for thing in vars(torch.optim).values() if isinstance(thing, type) and issubclass(thing, Optimizer)}
    assert there - {Optimizer} <= set(_RULES)


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


@pytest.mark.parametrize("cls", [Adam, AdamW, Adadelta, Adafactor, Adamax, NAdam, RAdam, RMSprop, SparseAdam])
def test_adaptive_optimizer_before_its_first_step_knows_nothing(cls: type[Optimizer]) -> None:
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


READY: dict[str, tuple[Optimizer, int]] = {
    "adam-0": (Adam(parameters(1), betas=(0.0, 0.999)), 10),
    "adam-0.5": (Adam(parameters(1), betas=(0.5, 0.999)), 10),
    "adam-0.9": (Adam(parameters(1)), 30),
    "adam-0.95": (Adam(parameters(1), betas=(0.95, 0.999)), 60),
    "adamax": (Adamax(parameters(1)), 30),
    "nadam": (NAdam(parameters(1)), 30),
    "radam": (RAdam(parameters(1)), 30),
    "radam-short": (RAdam(parameters(1), betas=(0.5, 0.999)), 10),
    # ρ_∞ = 2/0.33 − 1 = 5.06, and ρ_t > 5 first at t = 16, the step after 15: 2·16·0.67^16 = 0.053 < 0.0606 < 0.074
    "radam-late": (RAdam(parameters(1), betas=(0.0, 0.67)), 14),
    "radam-never-rectified": (RAdam(parameters(1), betas=(0.0, 0.5)), 10),
    "rmsprop": (RMSprop(parameters(1)), 10),
    "rmsprop-momentum": (RMSprop(parameters(1), momentum=0.9), 30),
    "adagrad": (Adagrad(parameters(1)), 10),
    "adadelta": (Adadelta(parameters(1)), 10),
    "adafactor": (Adafactor(parameters(1)), 10),
}


@pytest.mark.parametrize("name", READY)
def test_adaptive_state_is_ready_after_the_larger_of_ten_and_three_memories(name: str) -> None:
    """More than max(10, 3/(1 − β1)) steps, give or take the rounding of the quotient; RAdam where it has P, too."""
    optimizer, last = copy.deepcopy(READY[name])
    ready = []
    for _ in range(last + 2):
        stepped(optimizer)
        ready.append(critical_curvature(optimizer).ready)
    first = 1 + ready.index(True)
    assert first in (last, last + 1)
    assert all(ready[first:])


@pytest.mark.parametrize("cls", [SGD, ASGD])
def test_state_that_does_not_adapt_is_ready_at_once(cls: type[Optimizer]) -> None:
    assert critical_curvature(cls(parameters(2), lr=0.1)).ready  # type: ignore[call-arg]


@pytest.mark.parametrize("cls", sorted(set(_RULES) - {Adagrad, getattr(torch.optim, "Muon", None)}, key=str))
def test_looking_creates_no_state(cls: type[Optimizer]) -> None:
    """Adagrad has its state from the start; Muon takes matrices."""
    optimizer = cls(parameters(2, 3), lr=0.1)  # type: ignore[call-arg]
    before = optimizer.state_dict()
    critical_curvature(optimizer)
    assert len(optimizer.state) == 0
    assert optimizer.state_dict() == before


def test_looking_leaves_the_state() -> None:
    adam = stepped(Adam(parameters(2), lr=torch.tensor(0.1), amsgrad=True, foreach=False), 3)
    values = {k: (v, v.clone(), v._version) for k, v in adam.state[adam.param_groups[0]["params"][0]].items()}
    critical_curvature(adam, lr_scale=2.0)
    for tensor, value, version in values.values():
        assert torch.equal(tensor, value)
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
def test_rule_may_say_why_there_is_no_threshold() -> None:
    register_critical_curvature(Custom)(lambda group, param, state: "sign rule")
    curvature = critical_curvature([Custom(parameters(2), lr=0.1), SGD(parameters(1), lr=0.5)])
    assert curvature.without_threshold == ("Custom (sign rule)",)
    assert curvature.c is not None
    assert curvature.c.tolist() == [math.inf, math.inf, 4.0]
    assert curvature.ready


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
