"""Optimizers of other libraries: small twins of their published updates, under their names, against their thresholds.

Each twin is written from the formula of its method, and carries the name, module and settings of the original.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from eos_monitor import critical_curvature, measure_stability
from eos_monitor.limits.neighbours import NEIGHBOURS, WITHOUT_THRESHOLD, clipped_ratio, sam_edge
from tests.limits.frozen_step import Build, crossing, edge_ratio, groups, one, quadratic


class Twin(Optimizer):
    """Runs ``update(p, g, state, group)`` on each parameter."""

    SETTINGS: dict[str, Any] = {}

    def __init__(self, params: Any, **settings: Any) -> None:
        unknown = set(settings) - set(self.SETTINGS)
        assert not unknown, unknown
        super().__init__(params, self.SETTINGS | settings)

    def walk(self) -> None:
        for group in self.param_groups:
            self.begin(group)
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)

    def begin(self, group: Any) -> None:
        """Once a step for each group."""

    def update(self, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        raise NotImplementedError


ADAM = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def moments(p: Tensor, g: Tensor, state: Any, group: Any) -> tuple[Tensor, Tensor]:
    beta1, beta2 = group["betas"]
    m, v = (state.setdefault(key, torch.zeros_like(p)) for key in ("exp_avg", "exp_avg_sq"))
    return m.mul_(beta1).add_(g, alpha=1 - beta1), v.mul_(beta2).addcmul_(g, g, value=1 - beta2)


class FusedAdam(Twin):
    """p ← p − lr·(m̂/(√v̂ + ε) + wd·p), or with wd·p in the gradient (Kingma and Ba 2015; Loshchilov and Hutter 2019)."""

    __module__ = "apex.optimizers.fused_adam"
    SETTINGS = ADAM | {"bias_correction": True}

    def __init__(self, params: Any, adam_w_mode: bool = True, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.adam_w_mode = 1 if adam_w_mode else 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.walk()

    def begin(self, group: Any) -> None:
        group["step"] = group.get("step", 0) + 1

    def update(self, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        decay = group["weight_decay"] * p
        m, v = moments(p, g if self.adam_w_mode else g + decay, state, group)
        b1, b2 = (1 - beta ** group["step"] if group["bias_correction"] else 1.0 for beta in group["betas"])
        p.sub_(group["lr"] * ((m / b1) / ((v / b2).sqrt() + group["eps"]) + (decay if self.adam_w_mode else 0.0)))


class NAdamW(Twin):
    """AdamW whose numerator is β1·m + (1 − β1)·g (Choi et al. 2019, arXiv 1910.05446, Table 1)."""

    __module__ = "timm.optim.nadamw"
    SETTINGS = ADAM | {
        "caution": False,
        "corrected_weight_decay": False,
        "foreach": None,
        "maximize": False,
        "capturable": False,
    }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.walk()

    def update(self, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        g = -g if group["maximize"] else g
        t = state["step"] = state.get("step", 0) + 1
        beta1, beta2 = group["betas"]
        m, v = moments(p, g, state, group)
        ahead = (beta1 * m + (1 - beta1) * g) / (1 - beta1**t)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * ahead / ((v / (1 - beta2**t)).sqrt() + group["eps"]))


class RMSpropTF(Twin):
    """RMSprop with ε under the root, and the learning rate inside or outside its momentum."""

    __module__ = "timm.optim.rmsprop_tf"
    SETTINGS = {
        "lr": 0.01,
        "alpha": 0.9,
        "eps": 1e-10,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "decoupled_decay": False,
        "lr_in_momentum": True,
        "caution": False,
    }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.walk()

    def update(self, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        alpha, lr = group["alpha"], group["lr"]
        state["step"] = state.get("step", 0) + 1
        if group["decoupled_decay"]:
            p.mul_(1 - lr * group["weight_decay"])
        else:
            g = g + group["weight_decay"] * p
        v = state.setdefault("square_avg", torch.ones_like(p)).mul_(alpha).addcmul_(g, g, value=1 - alpha)
        if group["centered"]:
            v = v - state.setdefault("grad_avg", torch.zeros_like(p)).lerp_(g, 1 - alpha) ** 2
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
        inside = lr if group["lr_in_momentum"] else 1.0
        buffer.mul_(group["momentum"]).add_(inside * g / (v + group["eps"]).sqrt())
        p.sub_(lr / inside * buffer)


class SGDW(Twin):
    """SGD with decoupled weight decay (Loshchilov and Hutter 2019, Algorithm 1)."""

    __module__ = "timm.optim.sgdw"
    SETTINGS = {
        "lr": 0.1,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "caution": False,
        "corrected_weight_decay": False,
        "maximize": False,
        "foreach": None,
        "differentiable": False,
    }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.walk()

    def update(self, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        g = -g if group["maximize"] else g
        p.mul_(1 - group["lr"] * group["weight_decay"])
        if group["momentum"]:
            first = "momentum_buffer" not in state
            b = state.setdefault("momentum_buffer", g.clone())
            if not first:
                b.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
            g = g + group["momentum"] * b if group["nesterov"] else b
        p.sub_(group["lr"] * g)


class ScheduleFree(Twin):
    """Schedule-Free learning (Defazio et al. 2024, arXiv 2405.15682): gradients at y = (1 − β)·z + β·x, and
    z ← z − γ·(update), x ← (1 − c)·x + c·z with c = γ_max²/Σγ_max². The parameters hold y.
    """

    SHARED = {
        "weight_decay": 0.0,
        "warmup_steps": 0,
        "r": 0.0,
        "weight_lr_power": 2.0,
        "k": 0,
        "train_mode": True,
        "weight_sum": 0.0,
        "lr_max": -1.0,
        "scheduled_lr": 0.0,
        "foreach": False,
    }

    def begin(self, group: Any) -> None:
        warmth = min(1.0, (group["k"] + 1) / group["warmup_steps"]) if group["warmup_steps"] else 1.0
        group["scheduled_lr"] = group["lr"] * warmth
        group["lr_max"] = max(group["scheduled_lr"], group["lr_max"])
        weight = (group["k"] + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
        group["weight_sum"] += weight
        group["c"] = weight / group["weight_sum"]
        group["k"] += 1

    def average(self, y: Tensor, direction: Tensor, state: Any, group: Any, beta: float) -> None:
        z = state.setdefault("z", y.clone())
        x = (y - (1 - beta) * z) / beta
        z.sub_(group["scheduled_lr"] * direction)
        x = (1 - group["c"]) * x + group["c"] * z
        y.copy_((1 - beta) * z + beta * x)


class SGDScheduleFree(ScheduleFree):
    __module__ = "schedulefree.sgd_schedulefree"
    SETTINGS = ScheduleFree.SHARED | {"lr": 1.0, "momentum": 0.9}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.walk()

    def update(self, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        self.average(p, g + group["weight_decay"] * p, state, group, group["momentum"])


class AdamWScheduleFree(ScheduleFree):
    __module__ = "schedulefree.adamw_schedulefree"
    SETTINGS = ScheduleFree.SHARED | {"lr": 0.0025, "betas": (0.9, 0.999), "eps": 1e-8}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.walk()

    def update(self, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        beta1, beta2 = group["betas"]
        v = state.setdefault("exp_avg_sq", torch.zeros_like(p)).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        scaled = g / ((v / (1 - beta2 ** group["k"])).sqrt() + group["eps"])
        self.average(p, scaled + group["weight_decay"] * p, state, group, beta1)


CASES: dict[str, Build] = {
    "fused-adam": one(FusedAdam),
    "fused-adamw-decay": one(FusedAdam, lr=0.1, weight_decay=3.0, eps=0.1),
    "fused-adam-l2": one(FusedAdam, adam_w_mode=False, weight_decay=0.3),
    "fused-adam-uncorrected": one(FusedAdam, bias_correction=False),
    "fused-adam-groups": groups(FusedAdam, {"betas": (0.5, 0.9)}, {"lr": 0.1, "weight_decay": 3.0}),
    "nadamw": one(NAdamW),
    "nadamw-decay": one(NAdamW, lr=0.1, weight_decay=3.0, betas=(0.95, 0.99)),
    "nadamw-maximize": one(NAdamW, maximize=True),
    "nadamw-groups": groups(NAdamW, {"betas": (0.5, 0.9)}, {"lr": 0.1, "weight_decay": 3.0}),
    "rmsprop-tf": one(RMSpropTF),
    "rmsprop-tf-momentum": one(RMSpropTF, momentum=0.9, weight_decay=0.3, eps=1e-2),
    "rmsprop-tf-decoupled": one(
        RMSpropTF, lr=0.1, momentum=0.9, weight_decay=3.0, decoupled_decay=True, lr_in_momentum=False
    ),
    "rmsprop-tf-centered": one(RMSpropTF, centered=True),
    "rmsprop-tf-groups": groups(RMSpropTF, {"momentum": 0.9}, {"weight_decay": 0.3}),
    "sgdw": one(SGDW, weight_decay=3.0),
    "sgdw-momentum": one(SGDW, momentum=0.9, weight_decay=3.0, dampening=0.5),
    "sgdw-nesterov": one(SGDW, momentum=0.9, weight_decay=3.0, nesterov=True),
    "sgdw-groups": groups(SGDW, {"momentum": 0.9, "weight_decay": 3.0}, {"maximize": False}),
    "schedule-free-sgd": one(SGDScheduleFree),
    "schedule-free-sgd-l2": one(SGDScheduleFree, lr=0.1, momentum=0.95, weight_decay=0.3),
    "schedule-free-sgd-warm-up": one(SGDScheduleFree, lr=0.1, momentum=0.5, warmup_steps=400, r=1.0),
    "schedule-free-sgd-groups": groups(SGDScheduleFree, {"momentum": 0.9}, {"lr": 0.3, "weight_decay": 0.1}),
    "schedule-free-adamw": one(AdamWScheduleFree),
    "schedule-free-adamw-decay": one(AdamWScheduleFree, lr=0.1, weight_decay=3.0, betas=(0.95, 0.99)),
    "schedule-free-adamw-groups": groups(AdamWScheduleFree, {"betas": (0.5, 0.9)}, {"lr": 0.1, "weight_decay": 1.0}),
}


@pytest.mark.parametrize(
    ("name", "steps"), [(name, 20) for name in CASES] + [(name, 1000) for name in CASES if "free" in name]
)
def test_threshold_is_where_the_published_update_turns_unstable(name: str, steps: int) -> None:
    """Both searches stop at 1e-9; the eigenvalues near -1 are good to 1e-12."""
    system = quadratic(CASES[name], (2, 3), steps)
    assert critical_curvature(system.optimizers).without_threshold == ()
    unit = system.hessian
    predicted = crossing(lambda factor: edge_ratio(factor * unit, system.optimizers))
    assert system.critical_scale(near=predicted) == pytest.approx(predicted, rel=1e-8)
    assert system.leading() == pytest.approx(-1.0, abs=1e-7)


def test_schedule_free_sgd_tends_to_two_over_one_minus_beta() -> None:
    system = quadratic(one(SGDScheduleFree, lr=0.5), (2, 3), 10**7)
    c = critical_curvature(system.optimizers).c
    assert c is not None
    assert c.tolist() == pytest.approx([40.0] * 5, rel=1e-5)  # but for c_t = 1e-7 over 1 − β


def test_schedule_free_diverges_past_its_edge_and_not_before() -> None:
    """The run itself, with its average's weight 1/t going down: 0.97 of the limit decays, 1.03 explodes."""
    for share, grows in ((0.97, False), (1.03, True)):
        p = nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = SGDScheduleFree([p], lr=1.0)
        for _ in range(2000):
            p.grad = share * 20.0 * p.detach()
            optimizer.step()
        assert (abs(p.item()) > 1.0) is grows


def test_schedule_free_in_eval_mode_is_elsewhere() -> None:
    optimizer = trained(SGDScheduleFree)
    assert critical_curvature(optimizer).c is not None
    optimizer.param_groups[0]["train_mode"] = False
    curvature = critical_curvature(optimizer)
    assert curvature.c is None
    assert curvature.without_threshold[0].startswith("SGDScheduleFree (in eval mode its parameters are the average x")


# Whom not to trust.


def trained(cls: Callable[..., Optimizer], times: int = 40, **settings: Any) -> Optimizer:
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p], **settings)
    for _ in range(times):
        p.grad = torch.ones_like(p)
        optimizer.step()
    return optimizer


TWINS = [FusedAdam, NAdamW, RMSpropTF, SGDW, SGDScheduleFree, AdamWScheduleFree]


def test_every_entry_of_the_table_has_a_twin() -> None:
    assert {cls.__name__ for cls in TWINS} == set(NEIGHBOURS)
    assert all(cls.__module__.split(".")[0] in NEIGHBOURS[cls.__name__].libraries for cls in TWINS)


def unknown(optimizer: Optimizer) -> bool:
    curvature = critical_curvature(optimizer)
    return curvature.c is None and curvature.without_threshold == (type(optimizer).__name__,)


@pytest.mark.parametrize("cls", TWINS)
def test_stranger_of_the_same_name_is_unknown(cls: type[Twin]) -> None:
    assert not unknown(trained(cls))
    stranger = type(cls.__name__, (cls,), {"__module__": "my.optimizers", "step": lambda self: cls.step(self)})
    assert unknown(trained(stranger))


@pytest.mark.parametrize("cls", TWINS)
def test_overridden_step_is_unknown_and_an_inherited_one_is_not(cls: type[Twin]) -> None:
    module = {"__module__": cls.__module__}
    heir = type("Heir", (cls,), dict(module))
    assert not unknown(trained(heir))
    assert unknown(trained(type("Heir", (cls,), module | {"step": lambda self: cls.step(self)})))


@pytest.mark.parametrize("cls", TWINS)
def test_setting_that_the_formula_does_not_know_is_unknown(cls: type[Twin]) -> None:
    newer = type(cls.__name__, (cls,), {"__module__": cls.__module__, "SETTINGS": cls.SETTINGS | {"trick": 0.5}})
    assert unknown(trained(newer))


@pytest.mark.parametrize("cls", TWINS)
def test_what_a_user_adds_to_a_group_does_not_matter(cls: type[Twin]) -> None:
    optimizer = trained(cls)
    optimizer.param_groups[0]["name"] = "backbone"
    assert not unknown(optimizer)


@pytest.mark.parametrize("setting", ["caution", "corrected_weight_decay"])
@pytest.mark.parametrize("cls", [NAdamW, SGDW, RMSpropTF])
def test_setting_outside_the_formula_is_unknown(cls: type[Twin], setting: str) -> None:
    if setting in cls.SETTINGS:
        assert unknown(trained(cls, **{setting: True}))


@pytest.mark.parametrize("cls", [FusedAdam, NAdamW, AdamWScheduleFree])
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_state_in_another_form_is_not_read(cls: type[Twin], change: str) -> None:
    optimizer = trained(cls)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    v = state["exp_avg_sq"]
    state["exp_avg_sq"] = v.to(torch.uint8) if change == "dtype" else v[:1]
    curvature = critical_curvature(optimizer)
    assert curvature.c is None
    assert curvature.without_threshold == (f"{cls.__name__} (its state cannot be read)",)


@pytest.mark.parametrize("cls", TWINS)
def test_ready_after_three_memories_of_the_momentum(cls: type[Twin]) -> None:
    """Those with state; SGDW has none to wait for, and RMSprop's momentum is 0 here."""
    ages = {SGDW: 0, RMSpropTF: 11}
    first = next(t for t in range(60) if critical_curvature(trained(cls, t)).ready)
    assert first in (ages.get(cls, 31), ages.get(cls, 30))  # 3/(1 − 0.9) is 30 up to rounding


@pytest.mark.parametrize("cls", [FusedAdam, NAdamW, RMSpropTF, SGDScheduleFree, AdamWScheduleFree])
def test_before_the_first_step_nothing_is_known(cls: type[Twin]) -> None:
    curvature = critical_curvature(trained(cls, 0))
    assert curvature.c is None
    assert not curvature.ready
    assert curvature.without_threshold == ()


@pytest.mark.parametrize("name", WITHOUT_THRESHOLD)
def test_known_to_have_no_threshold(name: str) -> None:
    cls = type(name, (Twin,), {"step": lambda self: None})
    curvature = critical_curvature([cls([nn.Parameter(torch.ones(2))]), SGD([nn.Parameter(torch.ones(1))], lr=0.5)])
    assert curvature.c is not None
    assert curvature.c.tolist() == [math.inf, math.inf, 4.0]
    (said,) = curvature.without_threshold
    assert said.startswith(f"{name} (")
    assert curvature.ready


def test_optimizer_that_inherits_its_step_from_its_library_is_known_by_name() -> None:
    base = type("Optimizer8bit", (Twin,), {"step": lambda self: None})
    optimizer = type("AdamW8bit", (base,), {})([nn.Parameter(torch.ones(2))])
    assert critical_curvature(optimizer).without_threshold == ("AdamW8bit (quantized state)",)


# Wrappers.


class AcceleratedOptimizer(Optimizer):
    """Passes everything on to the optimizer inside."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class ZeroRedundancyOptimizer(Optimizer):
    """Groups of its own with the settings of the optimizer inside, which steps the parameters of this process."""

    def __init__(self, params: list[nn.Parameter], mine: list[nn.Parameter], **settings: Any) -> None:
        super().__init__(params, settings)
        self.optim = AdamW(mine, **settings)
        self.sync(self.optim, self)

    def sync(self, source: Optimizer, target: Optimizer) -> None:
        for group, other in zip(source.param_groups, target.param_groups, strict=True):
            other.update({key: value for key, value in group.items() if key != "params"})

    def step(self, closure: Any = None) -> Any:
        self.sync(self, self.optim)
        return self.optim.step(closure)


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): the base steps with the gradient at θ + ρ·g/‖g‖."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float, **settings: Any) -> None:
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        closure()
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        away = [self.defaults["rho"] * p.grad / norm for p in params]
        for p, e in zip(params, away, strict=True):
            p.add_(e)
        closure()
        for p, e in zip(params, away, strict=True):
            p.sub_(e)
        self.base_optimizer.step()


@pytest.mark.parametrize("inner", [SGD, Adam], ids=lambda cls: cls.__name__)
def test_wrapper_is_read_as_what_it_wraps(inner: type[Optimizer]) -> None:
    optimizer = trained(inner, lr=0.1)
    bare, wrapped = critical_curvature(optimizer), critical_curvature(AcceleratedOptimizer(optimizer))
    assert bare.c is not None
    assert wrapped.c is not None
    assert torch.equal(bare.c, wrapped.c)
    assert (bare.threshold, bare.ready, wrapped.notes) == (wrapped.threshold, wrapped.ready, ())
    twice = critical_curvature(AcceleratedOptimizer(AcceleratedOptimizer(optimizer)))
    assert twice.c is not None
    assert torch.equal(bare.c, twice.c)


@pytest.mark.parametrize("library", ["pytorch_lightning", "lightning.pytorch"])
def test_lightnings_wrapper_is_read_as_what_it_wraps(library: str) -> None:
    """It takes on the class of what it wraps, with a step of its own."""
    wrapper = pytest.importorskip(f"{library}.core.optimizer").LightningOptimizer(trained(Adam, lr=0.1))
    bare, wrapped = critical_curvature(wrapper.optimizer), critical_curvature(wrapper)
    assert bare.c is not None
    assert wrapped.c is not None
    assert torch.equal(bare.c, wrapped.c)
    assert wrapped.without_threshold == ()


def test_wrapper_that_shards_its_state_is_not_read() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    whole = ZeroRedundancyOptimizer([a, b], [a, b], lr=0.1)
    part = ZeroRedundancyOptimizer([a, b], [a], lr=0.1)
    for _ in range(40):
        a.grad, b.grad = torch.ones(2), torch.ones(2)
        whole.step()
        part.step()
    assert critical_curvature(whole).c is not None
    curvature = critical_curvature(part)
    assert curvature.c is None
    assert curvature.without_threshold == (
        "ZeroRedundancyOptimizer (the optimizer inside does not step the same parameters)",
    )


def test_groups_of_the_wrapper_are_those_that_a_scheduler_moves() -> None:
    a = nn.Parameter(torch.ones(2))
    zero = ZeroRedundancyOptimizer([a], [a], lr=0.1, weight_decay=0.0)
    for _ in range(40):
        a.grad = torch.ones(2)
        zero.step()
    before = critical_curvature(zero).c
    zero.param_groups[0]["lr"] = 0.2
    after = critical_curvature(zero).c
    assert before is not None
    assert after is not None
    torch.testing.assert_close(before, 2 * after)


# SAM.


def test_sam_is_read_as_its_base_with_a_note() -> None:
    sam = SAM([nn.Parameter(torch.ones(2))], SGD, rho=0.05, lr=0.1, momentum=0.9)
    curvature = critical_curvature(sam)
    assert curvature.c is not None
    assert curvature.c.tolist() == pytest.approx([38.0, 38.0])
    assert curvature.notes == (
        "SAM: this is the edge of its base optimizer, with H at θ; SAM's own (neighbours.sam_edge) lies below it",
    )
    net = nn.Linear(2, 1)
    reading = measure_stability(
        net, lambda m, b: m(b).square().mean(), [torch.ones(2, 2)], SAM(net.parameters(), SGD, 0.1, lr=0.1)
    )
    assert curvature.notes[0] in reading.notes
    assert reading.edge_ratio is not None


@pytest.mark.parametrize(("lr", "h", "rho"), [(0.1, 5.0, 0.05), (0.1, 15.0, 0.2), (0.02, 40.0, 1.0)])
def test_on_sams_cycle_its_edge_is_the_curvature(lr: float, h: float, rho: float) -> None:
    """On any quadratic SAM ends on |x| = η·ρ·h/(2 − η·h), far below 2/η too; there sam_edge = h exactly."""
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    sam = SAM([p], SGD, rho=rho, lr=lr)

    def closure() -> None:
        p.grad = h * p.detach()

    for _ in range(3000):
        sam.step(closure)
    assert abs(p.item()) == pytest.approx(lr * rho * h / (2 - lr * h), rel=1e-9)
    (c,) = critical_curvature(sam).c.tolist()  # type: ignore[union-attr]
    assert sam_edge(c, rho=rho, grad_norm=abs(h * p.item())) == pytest.approx(h, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sam_edge_is_where_its_step_with_the_norm_held_turns_unstable(momentum: float) -> None:
    """The gradient (1 + ρ·h/‖g‖)·h·x with ‖g‖ held: 0.99 of the edge decays, 1.01 grows."""
    rho, norm = 0.1, 0.7
    for share, grows in ((0.99, False), (1.01, True)):
        p = nn.Parameter(torch.ones(1, dtype=torch.float64))
        sgd = SGD([p], lr=0.1, momentum=momentum)
        h = share * sam_edge(2 * (1 + momentum) / 0.1, rho=rho, grad_norm=norm)
        for _ in range(3000):
            p.grad = (1 + rho * h / norm) * h * p.detach()
            sgd.step()
        assert (abs(p.item()) > 1.0) is grows


def test_sam_edge_without_ascent_is_that_of_the_base() -> None:
    assert sam_edge(20.0, rho=0.0, grad_norm=1.0) == 20.0


@pytest.mark.parametrize("settings", [{"c": 0.0}, {"rho": -1.0}, {"grad_norm": 0.0}, {"c": math.nan}], ids=str)
def test_sam_edge_refuses(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected `c` > 0"):
        sam_edge(**({"c": 1.0, "rho": 0.1, "grad_norm": 1.0} | settings))


# Clipping and averages.


@pytest.mark.parametrize("h", [30.0, 100.0])
def test_clipped_ratio_is_one_on_the_cycle_past_the_edge(h: float) -> None:
    """Past the raw edge clipping leaves a bounded 2-cycle with |x_t| + |x_{t+1}| = η·c; 1/r averages to 1 on it."""
    lr, clip = 0.1, 0.5
    p = nn.Parameter(torch.full((1,), 0.0123, dtype=torch.float64))
    sgd = SGD([p], lr=lr)
    raw = h / float(critical_curvature(sgd).c)  # type: ignore[arg-type]
    assert raw > 1.0
    sizes, ratios = [], []
    for _ in range(400):
        p.grad = h * p.detach()
        sizes.append(abs(p.item()))
        norm = float(nn.utils.clip_grad_norm_([p], clip))
        ratios.append(clipped_ratio(raw, clip_norm=clip, grad_norm=norm))
        sgd.step()
    assert sizes[-1] + sizes[-2] == pytest.approx(lr * clip, rel=1e-5)  # torch clips by c/(‖g‖ + 1e-6)
    assert (1 / ratios[-1] + 1 / ratios[-2]) / 2 == pytest.approx(1.0, rel=1e-5)


def test_clipped_ratio_leaves_small_gradients() -> None:
    assert clipped_ratio(1.5, clip_norm=1.0, grad_norm=0.9) == 1.5
    assert clipped_ratio(1.5, clip_norm=1.0, grad_norm=0.0) == 1.5


@pytest.mark.parametrize(("clip", "norm"), [(0.0, 1.0), (1.0, -1.0), (math.nan, 1.0)])
def test_clipped_ratio_refuses(clip: float, norm: float) -> None:
    with pytest.raises(ValueError, match="Expected `clip_norm` > 0 and `grad_norm` >= 0"):
        clipped_ratio(1.0, clip_norm=clip, grad_norm=norm)


def test_constant_clipping_cancels_in_adam() -> None:
    """Gradients smaller by a factor, and so m and √v: the step is the same, and c smaller as H is."""
    whole, clipped = trained_on(1.0), trained_on(0.01)
    assert clipped[0] == pytest.approx(whole[0], rel=1e-9)
    assert clipped[1] == pytest.approx(0.01 * whole[1], rel=1e-9)


def trained_on(factor: float) -> tuple[float, float]:
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    adam = Adam([p], eps=0.0)
    for t in range(50):
        p.grad = torch.full_like(p, factor * (1 + math.sin(t)))
        adam.step()
    return p.item(), float(critical_curvature(adam).c)  # type: ignore[arg-type]


def test_averaging_weights_changes_no_threshold() -> None:
    net = nn.Linear(3, 2)
    sgd = SGD(net.parameters(), lr=0.1, momentum=0.9)
    before = critical_curvature(sgd)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for _ in range(3):
        net(torch.ones(1, 3)).sum().backward()
        sgd.step()
        averaged.update_parameters(net)
    after = critical_curvature(sgd)
    assert before.c is not None
    assert after.c is not None
    assert torch.equal(before.c, after.c)
    assert [id(p) for p in after.params] == [id(p) for p in net.parameters()]
