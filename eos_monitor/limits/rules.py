"""The critical curvature of every optimizer of torch.optim.

To a gradient that changes sign at every step, the optimizer's momentum answers by T times that gradient. A coordinate
with curvature h, preconditioner P and decoupled decay wd then flips for ever where ``2 − lr·wd = lr·T·h/P``, hence
``c = (2 − lr·wd)·P/(lr·T)``; coupled decay adds to h. A positive semi-definite H, scaled up, loses stability there
first, whatever the mix of groups: on |z| = 1 the imaginary part of each optimizer's inverse transfer function is sin θ
times something positive.

The first line of each rule's docstring is its formula; ``Source:`` and ``Experimental:`` follow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eos_monitor.limits.thresholds import Group, Limit, Rule, State, register_critical_curvature


def flip(
    group: Group, response: float, preconditioner: float | Tensor = 1.0, *, decoupled: float = 0.0, ready: bool = True
) -> Limit:
    """Return c = (2 − lr·wd)·P/(lr·T), without coupled decay.

    Args:
        group: Settings, of which ``lr`` is read.
        response: T, the response of the momentum to a gradient that changes sign at every step.
        preconditioner: P, what the step divides by.
        decoupled: Weight decay wd that shrinks the parameters beside the step.
        ready: Whether the state means something.
    """
    lr = group["lr"]
    shrinking = 2.0 - lr * decoupled
    note = None
    if shrinking <= 0.0:
        note = f"weight decay alone is unstable: lr · weight_decay = {lr * decoupled:.3g} is past its limit of 2"
        shrinking = min(shrinking, -torch.finfo(torch.float64).eps)
    threshold = shrinking / response if response > 0.0 else math.inf
    if response <= 0.0:
        note = "momentum with a dampening of 1 or more takes no gradient in"
    c = threshold / lr * preconditioner if lr > 0.0 else math.inf
    return Limit(c, 0.0, threshold, ready, note)


def averaged(beta: float) -> float:
    """Return (1−β)/(1+β), the response of an average of gradients with weight β."""
    return (1.0 - beta) / (1.0 + beta)


def old_enough(steps: float, beta: float = 0.0) -> bool:
    """Whether more than max(10, 3/(1−β)) steps lie behind.

    Bias-corrected averages change by O(1) a step before three memories of the momentum have passed. Sums and averages
    without a bias correction (Adagrad, Adadelta, RMSprop) are what the next step divides by, whatever their age, but
    their roots still grow like √t, by 5 % a step at t = 10; their own long memory need not have passed.
    """
    return steps > max(10.0, 3.0 / (1.0 - beta))


def with_decay(group: Group, limit: Limit) -> Limit:
    """Return the limit with the group's coupled weight decay."""
    return limit._replace(l2=group["weight_decay"]) if group["weight_decay"] else limit


def root(second_moment: Tensor) -> Tensor:
    """Return the square root in double precision."""
    return second_moment.double().sqrt()


def squared_average(group: Group, state: State) -> Tensor:
    """Return RMSprop's average of squared gradients, less the square of their average where it is centered."""
    second_moment: Tensor = state["square_avg"].double()
    if group["centered"]:
        second_moment = (second_moment - state["grad_avg"].double().square()).clamp(min=0.0)
    return second_moment


@register_critical_curvature(torch.optim.SGD)
def sgd(group: Group, param: Tensor, state: State) -> Limit:
    """2/η; heavy ball γ with dampening d: 2(1+γ)/((1−d)η); Nesterov: (2+2γ)/((1+2γ)η); on h + wd.

    Source: Cohen et al. 2021, arXiv 2103.00065; dampening derived here.
    """
    return with_decay(group, flip(group, sgd_response(group)))


def sgd_response(group: Group) -> float:
    """Return the response of SGD's momentum, in all its forms."""
    momentum: float = group["momentum"]
    if group["nesterov"]:
        return (1 + 2 * momentum) / (1 + momentum)
    return (1 - group["dampening"]) / (1 + momentum) if momentum else 1.0  # without momentum no dampening


@register_critical_curvature(torch.optim.ASGD)
def asgd(group: Group, param: Tensor, state: State) -> Limit:
    """2/η_t − λ with η_t = η/(1+λη(t−1))^α, on h + wd; the averaged weights do not feed back.

    Source: derived here. Experimental: a changed lr counts at once; ASGD itself applies it one step late.
    """
    lr = group["lr"]
    eta = lr / (1 + group["lambd"] * lr * float(state.get("step", 0))) ** group["alpha"]
    return with_decay(group, flip({"lr": eta}, 1.0, decoupled=group["lambd"]))


@register_critical_curvature(torch.optim.AdamW)
@register_critical_curvature(torch.optim.Adam)
def adam(group: Group, param: Tensor, state: State) -> Limit | None:
    """(2−η·wd)(1+β1)/(1−β1)·(1−β1ᵗ)·P/η, P = √v/√(1−β2ᵗ) + ε (AMSGrad: max v); coupled decay: on h + wd instead.

    Source: Cohen et al. 2022, arXiv 2207.14484; bias corrections and decay derived here.
    """
    if "exp_avg_sq" not in state:
        return None
    t = float(state["step"]) + 1  # the step to come, with v as it stands
    second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    preconditioner = root(second_moment) / math.sqrt(1 - group["betas"][1] ** t) + group["eps"]
    return adam_like(group, t, preconditioner, decoupled=bool(group.get("decoupled_weight_decay")))


def adam_like(
    group: Group, t: float, preconditioner: Tensor | float, *, decoupled: bool, response: float | None = None
) -> Limit:
    """Return the limit of an average of gradients with its bias correction at step t, over a preconditioner."""
    beta1 = group["betas"][0]
    if response is None:
        response = averaged(beta1) / (1 - beta1**t)
    ready = old_enough(t - 1, beta1)
    if decoupled:
        return flip(group, response, preconditioner, decoupled=group["weight_decay"], ready=ready)
    return with_decay(group, flip(group, response, preconditioner, ready=ready))


@register_critical_curvature(torch.optim.SparseAdam)
def sparse_adam(group: Group, param: Tensor, state: State) -> Limit | None:
    """Adam's, with P = (√v + ε)/√(1−β2ᵗ).

    Source: derived here. Experimental: speaks of rows that every step touches; v of the others is an older one.
    """
    if "exp_avg_sq" not in state:
        return None
    t = float(state["step"]) + 1
    preconditioner = (root(state["exp_avg_sq"]) + group["eps"]) / math.sqrt(1 - group["betas"][1] ** t)
    return adam_like({**group, "weight_decay": 0.0}, t, preconditioner, decoupled=False)


@register_critical_curvature(torch.optim.Adamax)
def adamax(group: Group, param: Tensor, state: State) -> Limit | None:
    """(2+2β1)/(1−β1)·(1−β1ᵗ)·P/η, P = u, the decayed maximum of |g| + ε; on h + wd.

    Source: derived here.
    """
    if "exp_inf" not in state:
        return None
    return adam_like(group, float(state["step"]) + 1, state["exp_inf"].double(), decoupled=False)


@register_critical_curvature(torch.optim.NAdam)
def nadam(group: Group, param: Tensor, state: State) -> Limit | None:
    """(2−η·wd)/(c_g+c_m(1−β1)/(1+β1))·P/η, c_g = (1−μ_t)/(1−Πμ), c_m = μ_{t+1}/(1−Πμ·μ_{t+1}); or on h + wd.

    P is Adam's and μ_k = β1(1 − ½·0.96^{k·momentum_decay}), so that the threshold creeps from 2 to its last value over
    some 20,000 steps with the default ``momentum_decay``.

    Source: derived here.
    """
    if "exp_avg_sq" not in state:
        return None
    beta1, beta2 = group["betas"]
    t = float(state["step"]) + 1
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (t, t + 1))
    product = float(state["mu_product"]) * mu
    response = (1 - mu) / (1 - product) + mu_next / (1 - product * mu_next) * averaged(beta1)
    preconditioner = root(state["exp_avg_sq"]) / math.sqrt(1 - beta2**t) + group["eps"]
    return adam_like(group, t, preconditioner, decoupled=bool(group.get("decoupled_weight_decay")), response=response)


@register_critical_curvature(torch.optim.RAdam)
def radam(group: Group, param: Tensor, state: State) -> Limit | None:
    """Adam's, with P = (√v + ε)/(√(1−β2ᵗ)·rect_t) where ρ_t > 5, before that P = 1.

    Source: derived here.
    """
    if "exp_avg_sq" not in state:
        return None
    beta2 = group["betas"][1]
    t = float(state["step"]) + 1
    correction = 1 - beta2**t
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * t * beta2**t / correction
    decoupled = bool(group.get("decoupled_weight_decay"))
    if length <= 5.0:
        # A step without P is a phase that passes, unless β2 is so small that it stays.
        limit = adam_like(group, t, 1.0, decoupled=decoupled)
        return limit._replace(ready=limit.ready and longest <= 5.0)
    rectification = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    preconditioner = (root(state["exp_avg_sq"]) + group["eps"]) / (math.sqrt(correction) * rectification)
    return adam_like(group, t, preconditioner, decoupled=decoupled)


@register_critical_curvature(torch.optim.RMSprop)
def rmsprop(group: Group, param: Tensor, state: State) -> Limit | None:
    """(2+2μ)/η·P, P = √v + ε, centered: √(v − ḡ²) + ε; no bias correction; on h + wd.

    Source: Cohen et al. 2022, arXiv 2207.14484; momentum derived here.
    """
    if "square_avg" not in state:
        return None
    preconditioner = squared_average(group, state).sqrt() + group["eps"]
    momentum = group["momentum"]
    ready = old_enough(float(state["step"]), momentum)
    return with_decay(group, flip(group, 1 / (1 + momentum), preconditioner, ready=ready))


@register_critical_curvature(torch.optim.Adagrad)
def adagrad(group: Group, param: Tensor, state: State) -> Limit | None:
    """2/η_t·P, P = √Σg² + ε, η_t = η/(1+(t−1)·lr_decay); on h + wd.

    Source: derived here.
    """
    if "sum" not in state:
        return None
    steps = float(state["step"])
    preconditioner = (root(state["sum"]) + group["eps"]) * (1 + steps * group["lr_decay"])
    return with_decay(group, flip(group, 1.0, preconditioner, ready=old_enough(steps)))


@register_critical_curvature(torch.optim.Adadelta)
def adadelta(group: Group, param: Tensor, state: State) -> Limit | None:
    """2/η·P, P = √((v + ε)/(a + ε)) with a the average of squared updates; on h + wd.

    Source: derived here.
    """
    if "square_avg" not in state:
        return None
    ratio = (state["square_avg"].double() + group["eps"]) / (state["acc_delta"].double() + group["eps"])
    preconditioner = ratio.sqrt()
    return with_decay(group, flip(group, 1.0, preconditioner, ready=old_enough(float(state["step"]))))


@register_critical_curvature(torch.optim.Adafactor)
def adafactor(group: Group, param: Tensor, state: State) -> Limit | None:
    """(2−η·wd)/α·√v̂, α = max(ε2, RMS(p))·min(η, t^−½), v̂ = R·C/mean(R) for matrices.

    Source: derived here. Experimental: without the clip of updates whose RMS is over ``d``, which the next gradient
    decides; where it acts the edge is farther away.
    """
    if "step" not in state:
        return None
    floor, least_rms = group["eps"]
    floor = torch.finfo(param.dtype).eps if floor is None else floor
    steps = float(state["step"])
    lr = group["lr"]
    if "row_var" in state:
        rows = state["row_var"].double()
        columns = state["col_var"].double()
        second_moment = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=floor)
    else:
        second_moment = state["variance"].double()
    rms = float(param.detach().norm(2)) / math.sqrt(param.numel())
    # α/η, which is part of the preconditioner.
    relative = max(least_rms, rms) * (min(1.0, 1.0 / (lr * math.sqrt(steps + 1))) if lr > 0.0 else 1.0)
    preconditioner = second_moment.clamp(min=floor**2).sqrt() / relative
    return flip(group, 1.0, preconditioner, decoupled=group["weight_decay"], ready=old_enough(steps))


def without_threshold(why: str) -> Rule:
    """Return the rule of optimizers that no curvature makes unstable, or of which none is known."""

    def rule(group: Group, param: Tensor, state: State) -> str:
        return why

    rule.__doc__ = f"None: {why}."
    return rule


SIGN_RULE = without_threshold("sign rule")
STEP_SIZE_FLOOR = without_threshold("step-size floor: see the directional ratio")
register_critical_curvature(torch.optim.Rprop)(SIGN_RULE)
register_critical_curvature(torch.optim.LBFGS)(without_threshold("quasi-Newton or line search"))
if hasattr(torch.optim, "Muon"):  # torch 2.9
    register_critical_curvature(torch.optim.Muon)(STEP_SIZE_FLOOR)
