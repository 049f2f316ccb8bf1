"""Optimizers of other libraries, recognized without importing them.

Whose threshold is read is decided by four things together, each of which a stranger of the same name would have to
meet: the *name* of the class that defines ``step``, the *library* its module belongs to, the *settings* it was made
with (every name that its constructor sets is one that the formula knows, and none is switched to something the formula
does not cover), and the *state* that the formula reads, in floating point and of the parameter's shape. A class that
misses one of them is unknown: nothing is guessed. Names alone decide only that there is *no* threshold, which is what
an unknown optimizer has too.

Weight averaging (EMA, SWA) beside an optimizer feeds nothing back and changes no threshold.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from eos_monitor.limits import rules
from eos_monitor.limits.thresholds import Group, Limit, Rule, Source, State, register_finder, source_of


class Neighbour(NamedTuple):
    """An optimizer of another library.

    Attributes:
        rule: Its critical curvature.
        libraries: Top-level packages that define it.
        reads: State that the formula reads.
        needs: Settings that the formula reads.
        knows: Settings that change nothing, or whose values are checked.
        off: Settings that must be false.
        attributes: Settings that it keeps beside its groups.
    """

    rule: Rule
    libraries: tuple[str, ...]
    reads: tuple[str, ...]
    needs: frozenset[str]
    knows: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()
    attributes: tuple[str, ...] = ()


def fused_adam(group: Group, param: Tensor, state: State) -> Limit | None:
    """Adam's or, with ``adam_w_mode``, AdamW's; without ``bias_correction`` at t → ∞.

    Source: as Adam. The step is counted in the group.
    """
    steps = float(group.get("step", 0)) + group.get("steps_ahead", 0)
    limit = rules.adam(
        {**group, "amsgrad": False, "decoupled_weight_decay": group["adam_w_mode"]},
        param,
        {**state, "step": steps if group["bias_correction"] else math.inf},
    )
    return limit and limit._replace(ready=rules.old_enough(steps, group["betas"][0]))


def nadamw(group: Group, param: Tensor, state: State) -> Limit:
    """(2−η·wd)(1+β1)/((1−β1)(1+2β1))·(1−β1ᵗ)·P/η with Adam's P: Nesterov's momentum on an average of gradients.

    Source: derived here.
    """
    beta1, beta2 = group["betas"]
    t = float(state["step"]) + 1
    # β1·m + (1 − β1)·g at the flip, where m = (1−β1)/(1+β1)·g.
    response = (1 - beta1 + beta1 * rules.averaged(beta1)) / (1 - beta1**t)
    preconditioner = rules.root(state["exp_avg_sq"]) / math.sqrt(1 - beta2**t) + group["eps"]
    return rules.adam_like(group, t, preconditioner, decoupled=True, response=response)


def rmsprop_tf(group: Group, param: Tensor, state: State) -> Limit:
    """(2−η·wd)(1+μ)/η·P, P = √(v + ε), centered: √(v − ḡ² + ε); coupled decay: on h + wd instead.

    Source: derived here. Experimental: v starts at 1 and forgets it as αᵗ.
    """
    preconditioner = (rules.squared_average(group, state) + group["eps"]).sqrt()
    response = 1 / (1 + group["momentum"])
    ready = rules.old_enough(float(state["step"]), group["momentum"])
    if group["decoupled_decay"]:
        return rules.flip(group, response, preconditioner, decoupled=group["weight_decay"], ready=ready)
    return rules.with_decay(group, rules.flip(group, response, preconditioner, ready=ready))


def sgdw(group: Group, param: Tensor, state: State) -> Limit:
    """SGD's, with 2 − η·wd in place of 2: the decay is decoupled.

    Source: derived here.
    """
    return rules.flip(group, rules.sgd_response(group), decoupled=group["weight_decay"])


def schedule_free_sgd(group: Group, param: Tensor, state: State) -> Limit | str:
    """(2−c)/((1−β)(1−c)+c/2)/η with c the weight of the next average, 2/((1−β)η) as c → 0; H at y, on h + wd.

    Source: Defazio et al. 2024, arXiv 2405.15682 (the method); derived here. Experimental: c ~ 1/t frozen.
    """
    if not group["train_mode"]:
        return _EVAL_MODE
    lr, weight = _schedule_free_step(group)
    response = _schedule_free_response(weight, group["momentum"])
    limit = rules.flip({"lr": lr}, response, ready=rules.old_enough(group["k"], group["momentum"]))
    return rules.with_decay(group, limit)


def schedule_free_adamw(group: Group, param: Tensor, state: State) -> Limit | str:
    """((2−c)/((1−β1)(1−c)+c/2)/η − wd)·P, P = √(v/(1−β2ᵗ)) + ε, with c as for SGD; H at y.

    Source: Defazio et al. 2024, arXiv 2405.15682 (the method); derived here. Experimental: c ~ 1/t frozen.
    """
    if not group["train_mode"]:
        return _EVAL_MODE
    beta1, beta2 = group["betas"]
    lr, weight = _schedule_free_step(group)
    response = _schedule_free_response(weight, beta1)
    preconditioner = rules.root(state["exp_avg_sq"] / (1 - beta2 ** (group["k"] + 1))) + group["eps"]
    decay = response * group["weight_decay"]  # it joins the normalized gradient, and so passes the same filter
    ready = rules.old_enough(group["k"], beta1)
    return rules.flip({"lr": lr}, response, preconditioner, decoupled=decay, ready=ready)


_EVAL_MODE = "in eval mode its parameters are the average x, while it steps at y: call its train()"


def _schedule_free_step(group: Group) -> tuple[float, float]:
    """Return the learning rate of the step to come, and the weight of its iterate in the average."""
    k = group["k"] + group.get("steps_ahead", 0)  # its warm-up is its own
    lr = group["lr"] * (min(1.0, (k + 1) / group["warmup_steps"]) if group["warmup_steps"] else 1.0)
    weight = (k + 1) ** group["r"] * max(lr, group["lr_max"]) ** group["weight_lr_power"]
    total = group["weight_sum"] + weight
    return lr, weight / total if total else 0.0


def _schedule_free_response(weight: float, beta: float) -> float:
    """Return T over 1 − c/2: at the flip z = lr·g/2, and (2 − c)·y = lr·g·(1 − β(1−c) − c/2)."""
    return (1 - beta * (1 - weight) - weight / 2) / (1 - weight / 2)


def _guarded(entry: Neighbour, group: Group, param: Tensor, state: State) -> Limit | str | None:
    """Ask the rule where the state that it reads is there, in floating point and of the parameter's shape."""
    for key in entry.reads:
        value = state.get(key)
        if value is None:
            return None
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == param.shape):
            return "its state cannot be read"
    found: Limit | str | None = entry.rule(group, param, state)
    return found


_ADAM = frozenset({"lr", "betas", "eps", "weight_decay"})
_SGD = frozenset({"lr", "momentum", "weight_decay"})
_TIMM = frozenset({"caution", "corrected_weight_decay"})
# `scheduled_lr` marks the releases since the bias correction left the learning rate for v.
_SCHEDULE_FREE = frozenset({"lr", "weight_decay", "k", "train_mode", "warmup_steps", "scheduled_lr"}) | frozenset(
    {"r", "weight_lr_power", "weight_sum", "lr_max"}
)
_HARMLESS = frozenset({"foreach", "maximize", "capturable", "differentiable", "fused"})

NEIGHBOURS: dict[str, Neighbour] = {
    "FusedAdam": Neighbour(
        fused_adam, ("apex",), ("exp_avg_sq",), _ADAM | {"bias_correction"}, attributes=("adam_w_mode",)
    ),
    "NAdamW": Neighbour(nadamw, ("timm",), ("exp_avg_sq",), _ADAM, _HARMLESS, _TIMM),
    "RMSpropTF": Neighbour(
        rmsprop_tf,
        ("timm",),
        ("square_avg",),
        _SGD | {"alpha", "eps", "centered", "decoupled_decay"},
        frozenset({"lr_in_momentum"}),
        _TIMM,
    ),
    "SGDW": Neighbour(sgdw, ("timm",), (), _SGD | {"dampening", "nesterov"}, _HARMLESS, _TIMM),
    "SGDScheduleFree": Neighbour(
        schedule_free_sgd, ("schedulefree",), ("z",), _SCHEDULE_FREE | {"momentum"}, _HARMLESS
    ),
    "AdamWScheduleFree": Neighbour(
        schedule_free_adamw, ("schedulefree",), ("z", "exp_avg_sq"), _SCHEDULE_FREE | _ADAM, _HARMLESS
    ),
}

_DENSE = rules.without_threshold("dense preconditioner: out of reach of a diagonal C")
_TRUST = rules.without_threshold("trust ratio: each step renews it, its state does not hold it")
_QUANTIZED = rules.without_threshold("quantized state")
# By name alone: being wrong costs a word.
WITHOUT_THRESHOLD: dict[str, Rule] = {
    **dict.fromkeys(("Lion", "SignSGD", "Signum", "Lion8bit", "PagedLion8bit"), rules.SIGN_RULE),
    **dict.fromkeys(("Muon", "MuonWithAuxAdam", "SingleDeviceMuon"), rules.STEP_SIZE_FLOOR),
    **dict.fromkeys(("Shampoo", "DistributedShampoo", "SOAP", "Kron", "KFAC"), _DENSE),
    **dict.fromkeys(("LAMB", "Lamb", "FusedLAMB", "LARS", "Lars"), _TRUST),
    **dict.fromkeys(("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit", "AdamW4bit", "AdamWFp8"), _QUANTIZED),
}

_SAM_NOTE = "SAM: this is the edge of its base optimizer, with H at θ; SAM's own (neighbours.sam_edge) lies below it"
# Class -> attribute that holds the optimizer which steps, and what to say of it.
WRAPPERS: dict[str, tuple[str, str | None]] = {
    "LightningOptimizer": ("optimizer", None),
    "AcceleratedOptimizer": ("optimizer", None),
    "_FabricOptimizer": ("optimizer", None),
    "ZeroRedundancyOptimizer": ("optim", None),
    "SAM": ("base_optimizer", _SAM_NOTE),
}
_ELSEWHERE = rules.without_threshold("the optimizer inside does not step the same parameters")


def neighbour(optimizer: Optimizer) -> Source | None:
    """Recognize an optimizer of another library."""
    classes = type(optimizer).__mro__
    # The class whose step is in use: one that inherits it changed nothing, one that overrides it is a stranger.
    steps = next(cls for cls in classes if "step" in vars(cls))
    entry = NEIGHBOURS.get(steps.__name__)
    if entry is not None and steps.__module__.partition(".")[0] in entry.libraries and _understood(optimizer, entry):
        attributes = {name: getattr(optimizer, name) for name in entry.attributes}
        return Source(partial(_guarded, entry), optimizer.state, attributes)
    name = next((cls.__name__ for cls in classes if cls.__name__ in WITHOUT_THRESHOLD), None)
    return None if name is None else Source(WITHOUT_THRESHOLD[name], optimizer.state)


def _understood(optimizer: Optimizer, entry: Neighbour) -> bool:
    """Whether the settings are those of the formula: all that it needs, none that it does not know."""
    settings = set(optimizer.defaults)
    return (
        entry.needs <= settings <= entry.needs | entry.knows | entry.off
        and not any(group.get(key) for group in optimizer.param_groups for key in entry.off)
        and all(entry.needs <= set(group) for group in optimizer.param_groups)
        and all(hasattr(optimizer, name) for name in entry.attributes)
    )


def unwrapped(optimizer: Optimizer) -> Source | None:
    """Read a wrapper as the optimizer inside it, where that one steps the same parameters in the same groups."""
    name = next((cls.__name__ for cls in type(optimizer).__mro__ if cls.__name__ in WRAPPERS), None)
    if name is None:
        return None
    attribute, note = WRAPPERS[name]
    inner = getattr(optimizer, attribute, None)
    if not isinstance(inner, Optimizer) or inner is optimizer or not _same_parameters(optimizer, inner):
        return Source(_ELSEWHERE, optimizer.state)
    source = source_of(inner)
    return source._replace(note=note) if note else source


def _same_parameters(one: Optimizer, other: Optimizer) -> bool:
    mine, its = ([[id(p) for p in group["params"]] for group in o.param_groups] for o in (one, other))
    return mine == its


def sam_edge(c: float, *, rho: float, grad_norm: float) -> float:
    r"""Return the curvature at which sharpness-aware minimization meets its own edge.

    .. math:: h_{\mathrm{SAM}} = \frac{2c}{1 + \sqrt{1 + 4 \rho c / \lVert g\rVert}},

    the root of h + (ρ/‖g‖)·h² = c: with ‖g‖ frozen, SAM's gradient sees H + (ρ/‖g‖)·H². For plain steps, c = 2/η.
    It tends to 0 with the gradient: on a quadratic SAM ends on a stable 2-cycle where this edge equals h, however far h
    is below c. Divergence needs h > c; show both.

    Args:
        c: Critical curvature of the base optimizer, > 0.
        rho: Radius ρ of the ascent step, ≥ 0.
        grad_norm: Norm of the gradient at θ, > 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> round(sam_edge(20.0, rho=0.05, grad_norm=1.0), 4)  # lr = 0.1
        12.3607

    References:
        Long and Bartlett, "Sharpness-Aware Minimization and the Edge of Stability", 2023, arXiv 2309.12488.
    """
    if not (c > 0.0 and rho >= 0.0 and grad_norm > 0.0):
        raise ValueError(f"Expected `c` > 0, `rho` >= 0 and `grad_norm` > 0, got {c}, {rho} and {grad_norm}.")
    return 2 * c / (1 + math.sqrt(1 + 4 * rho * c / grad_norm))


def clipped_ratio(edge_ratio: float, *, clip_norm: float, grad_norm: float) -> float:
    r"""Return the edge ratio at the step that gradient clipping leaves: r·min(1, clip_norm/‖g‖).

    Clipping by norm is a learning rate that is smaller by that factor, for optimizers whose critical curvature goes
    like 1/lr and whose momentum remembers gradients clipped alike (the SGD family). Past the raw edge the divergence
    ends on a bounded 2-cycle with \|x_t\| + \|x_{t+1}\| = lr·clip_norm, on which the clipped ratio is 1: a raw ratio
    above 1 beside a clipped one near 1 is a restrained instability. In Adam a constant factor cancels between m and √v,
    and the raw ratio holds.

    Args:
        edge_ratio: Edge ratio r without clipping.
        clip_norm: Largest norm that clipping lets through, > 0.
        grad_norm: Norm of the gradient before clipping, ≥ 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> clipped_ratio(1.5, clip_norm=1.0, grad_norm=2.0)
        0.75
    """
    if not (clip_norm > 0.0 and grad_norm >= 0.0):
        raise ValueError(f"Expected `clip_norm` > 0 and `grad_norm` >= 0, got {clip_norm} and {grad_norm}.")
    return edge_ratio * min(1.0, clip_norm / grad_norm) if grad_norm else edge_ratio


register_finder(unwrapped)
register_finder(neighbour)
