"""The checker of critical curvatures finds right formulas right and wrong ones wrong."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from eos_monitor.limits import rules
from eos_monitor.limits.threshold_check import ThresholdCheck, check_critical_curvature
from eos_monitor.limits.thresholds import register_critical_curvature

Factory = Callable[[list[nn.Parameter]], Optimizer]

# optimizer -> (how to build it, state that is momentum, state that adapts)
RIGHT: dict[str, tuple[Factory, set[str], set[str]]] = {
    "sgd": (lambda ps: SGD(ps, lr=0.1), set(), set()),
    "heavy-ball-l2": (lambda ps: SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.3), {"momentum_buffer"}, set()),
    "nesterov-maximize": (
        lambda ps: SGD(ps, lr=0.1, momentum=0.9, nesterov=True, maximize=True),
        {"momentum_buffer"},
        set(),
    ),
    "asgd": (lambda ps: torch.optim.ASGD(ps, lr=0.1), {"ax"}, set()),
    "adamw-amsgrad": (
        lambda ps: AdamW(ps, lr=0.01, weight_decay=5.0, amsgrad=True),
        {"exp_avg"},
        {"exp_avg_sq", "max_exp_avg_sq"},
    ),
    "adam-foreach": (lambda ps: Adam(ps, foreach=True), {"exp_avg"}, {"exp_avg_sq"}),
    "nadam": (lambda ps: torch.optim.NAdam(ps), {"exp_avg"}, {"exp_avg_sq"}),
    "radam": (lambda ps: torch.optim.RAdam(ps), {"exp_avg"}, {"exp_avg_sq"}),
    "adamax": (lambda ps: torch.optim.Adamax(ps), {"exp_avg"}, {"exp_inf"}),
    "rmsprop": (
        lambda ps: torch.optim.RMSprop(ps, momentum=0.9, centered=True),
        {"grad_avg", "momentum_buffer"},
        {"square_avg"},
    ),
    "adagrad": (lambda ps: torch.optim.Adagrad(ps), set(), {"sum"}),
    "adadelta": (lambda ps: torch.optim.Adadelta(ps), set(), {"square_avg", "acc_delta"}),
    "adafactor": (lambda ps: torch.optim.Adafactor(ps), set(), {"row_var", "col_var", "variance"}),
    "two-groups-in-another-order": (
        lambda ps: AdamW([{"params": ps[1:]}, {"params": ps[:1], "lr": 0.1, "betas": (0.5, 0.9)}], lr=0.01),
        {"exp_avg"},
        {"exp_avg_sq"},
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_rules_of_torch_are_right_and_their_state_is_told_apart(name: str) -> None:
    """To 1e-6, the default; ASGD keeps its learning rate in single precision."""
    factory, linear, adaptive = RIGHT[name]
    check = check_critical_curvature(factory, seeds=(0, 1))
    assert check.agrees, str(check)
    assert len(check.predicted) == len(check.measured) == len(check.eigenvalues) == 4
    assert set(check.linear) == linear
    assert set(check.adaptive) == adaptive
    assert all(value == pytest.approx(-1.0, abs=1e-6) for value in check.eigenvalues)


@pytest.mark.parametrize("name", ["adamw-amsgrad", "radam", "nadam", "adafactor"])
@pytest.mark.parametrize("steps", [1, 7])
def test_rules_are_right_for_young_states(name: str, steps: int) -> None:
    """Bias corrections are far from 1, and RAdam has no preconditioner before its seventh step."""
    check = check_critical_curvature(RIGHT[name][0], steps=steps, seeds=(0,))
    assert check.agrees, str(check)


class Own(Optimizer):
    """Adam with eps inside the root, an int for a step count, and state that is replaced, not written into."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, beta2: float = 0.99) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "beta2": beta2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                t = state["t"] = state.get("t", 0) + 1
                zero = torch.zeros_like(p)
                m = state["m"] = group["beta"] * state.get("m", zero) + (1 - group["beta"]) * p.grad
                v = state["v"] = group["beta2"] * state.get("v", zero) + (1 - group["beta2"]) * p.grad**2
                corrected = v / (1 - group["beta2"] ** t)
                p -= group["lr"] * m / (1 - group["beta"] ** t) / (corrected + 1e-6).sqrt()


def own_rule(factor: float) -> Callable[[Any, Tensor, Any], Any]:
    def rule(group: Any, param: Tensor, state: Any) -> Any:
        if "v" not in state:
            return None
        t, beta = state["t"] + 1, group["beta"]
        corrected = state["v"] / (1 - group["beta2"] ** t)
        return factor * 2 * (1 + beta) / (1 - beta) * (1 - beta**t) * (corrected + 1e-6).sqrt() / group["lr"]

    return rule


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.5, 1.01, 0.99, 1 + 3e-6])
def test_formula_of_a_users_own_class_is_measured(factor: float) -> None:
    register_critical_curvature(Own)(own_rule(factor))
    check = check_critical_curvature(Own)
    assert check.agrees is (factor == 1.0)
    # Replaced state is found by division, to rounding; the search stops at 1e-9.
    assert check.relative_error == pytest.approx(abs(factor - 1), abs=1e-8)
    for predicted, measured in zip(check.predicted, check.measured, strict=True):
        assert predicted / measured == pytest.approx(factor, abs=1e-8)
    assert (check.linear, check.adaptive) == (("m",), ("v",))


@pytest.mark.usefixtures("registry")
def test_missing_bias_correction_is_found() -> None:
    register_critical_curvature(Adam)(lambda g, p, s: rules.adam(g, p, {**s, "step": math.inf}))
    young = check_critical_curvature(lambda ps: Adam(ps), steps=20, seeds=(0,))
    assert not young.agrees
    assert young.relative_error > 0.01


@pytest.mark.usefixtures("registry")
def test_decay_of_the_wrong_kind_is_found() -> None:
    register_critical_curvature(AdamW)(lambda g, p, s: rules.adam({**g, "decoupled_weight_decay": False}, p, s))
    check = check_critical_curvature(lambda ps: AdamW(ps, lr=0.1, weight_decay=1.0), seeds=(0,))
    assert not check.agrees


class Belief(Optimizer):
    """The second moment is that of g − m, which is even in g only where m is 0."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                s = state.setdefault("s", torch.zeros_like(p))
                m.mul_(0.9).add_(p.grad, alpha=0.1)
                s.mul_(0.99).addcmul_(p.grad - m, p.grad - m, value=0.01)
                p.addcdiv_(m, s.sqrt(), value=-group["lr"])


class Noisy(SGD):
    """SGD with Langevin noise, drawn from the global generator."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p), alpha=1e-3)


class Normalized(SGD):
    """Steps of unit length."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm().clamp(min=1e-30), alpha=group["lr"])


@pytest.mark.usefixtures("registry")
def test_second_moments_about_the_momentum_are_adaptive() -> None:
    register_critical_curvature(Belief)(lambda g, p, s: 38 * s["s"].sqrt() / g["lr"] if "s" in s else None)
    check = check_critical_curvature(Belief)
    assert check.agrees, str(check)
    assert (check.linear, check.adaptive) == (("m",), ("s",))


@pytest.mark.usefixtures("registry")
def test_noise_is_drawn_alike_and_drops_out() -> None:
    """To 1e-6: the probes of 1e-6 are differences of steps of 1e-3, so that rounding is 1e-13 over 1e-6."""
    register_critical_curvature(Noisy)(lambda g, p, s: 2 / g["lr"])
    check = check_critical_curvature(lambda ps: Noisy(ps, lr=0.1))
    assert check.agrees, str(check)


@pytest.mark.usefixtures("registry")
def test_step_that_is_not_linear_has_no_such_edge() -> None:
    register_critical_curvature(Normalized)(lambda g, p, s: 2 / g["lr"])
    with pytest.raises(RuntimeError, match="Expected a step that is linear while its adaptive state is held"):
        check_critical_curvature(lambda ps: Normalized(ps, lr=0.1))


@pytest.mark.usefixtures("registry")
def test_edge_where_there_is_none_is_found() -> None:
    """Dampening of 1 takes no gradient in; the rule of torch says so, another does not."""

    def factory(ps: list[nn.Parameter]) -> Optimizer:
        return SGD(ps, lr=0.1, momentum=0.9, dampening=1.0)

    right = check_critical_curvature(factory, seeds=(0,))
    assert right.agrees
    assert right.measured == (math.inf, math.inf)
    assert "eigenvalue" not in str(right)
    register_critical_curvature(SGD)(lambda g, p, s: 38.0)
    wrong = check_critical_curvature(factory, seeds=(0,))
    assert not wrong.agrees
    assert wrong.relative_error == math.inf


def test_edge_that_is_no_flip_is_no_agreement() -> None:
    check = ThresholdCheck("X", (1.0,), (1.0,), (complex(0.6, 0.8),), (), (), 1e-6)
    assert check.relative_error == 0.0
    assert not check.agrees


def test_verdict_in_a_line() -> None:
    check = ThresholdCheck("X", (1.0, 3.0), (1.0, 2.0), (-1 + 0j, -1 + 0j), (), (), 1e-6)
    assert str(check) == (
        "X: the formula is wrong: predicted 3, measured 2 (off by 0.5), where its eigenvalue is -1+0j"
    )


REFUSED: dict[str, tuple[Factory, dict[str, Any], type[Exception], str]] = {
    "no-rule": (lambda ps: Own(ps), {}, ValueError, r"Expected an optimizer with a threshold, got Own\. Teach it"),
    "no-threshold": (lambda ps: torch.optim.Rprop(ps), {}, ValueError, r"got Rprop \(sign rule\)"),
    "needs-a-closure": (lambda ps: torch.optim.LBFGS(ps), {}, ValueError, "got LBFGS"),
    "fused": (lambda ps: Adam(ps, fused=True), {}, RuntimeError, r"fused kernel .* Pass fused=False"),
    "others-parameters": (
        lambda ps: SGD([nn.Parameter(torch.ones(2))], lr=0.1),
        {},
        ValueError,
        "to train the parameters that it is given",
    ),
    "unstable-decay": (
        lambda ps: AdamW(ps, lr=1.0, weight_decay=3.0),
        {},
        ValueError,
        "decay that is stable by itself",
    ),
    "no-steps": (lambda ps: SGD(ps, lr=0.1), {"steps": 0}, ValueError, "Expected `steps` >= 1"),
    "no-seeds": (lambda ps: SGD(ps, lr=0.1), {"seeds": ()}, ValueError, "at least one seed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    factory, settings, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        check_critical_curvature(factory, **settings)


def test_nothing_global_is_touched() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        check_critical_curvature(lambda ps: SGD(ps, lr=0.1), seeds=(0,))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


# The worked example of the docs.

DOCUMENTED = '''
import torch
from eos_monitor import critical_curvature, register_critical_curvature

class AveragedSGD(torch.optim.Optimizer):
    """Steps by lr times an average of gradients, and shrinks the parameters by lr * decay."""

    def __init__(self, params, lr=0.1, beta=0.9, decay=0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["decay"]).sub_(average, alpha=group["lr"])

@register_critical_curvature(AveragedSGD)
def averaged_sgd(group, param, state):
    response = (1 - group["beta"]) / (1 + group["beta"])  # of the average, to a gradient that alternates in sign
    return (2 - group["lr"] * group["decay"]) / (group["lr"] * response)
'''


@pytest.mark.usefixtures("registry")
def test_worked_example() -> None:
    space: dict[str, Any] = {}
    exec(DOCUMENTED, space)
    check = check_critical_curvature(lambda params: space["AveragedSGD"](params, lr=0.1, decay=0.5))
    assert check.agrees
    assert check.linear == ("average",)
    net = nn.Linear(2, 1)
    c = space["critical_curvature"](space["AveragedSGD"](net.parameters())).c
    torch.testing.assert_close(c, torch.full((3,), 380.0))
