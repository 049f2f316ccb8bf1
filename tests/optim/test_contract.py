"""What every optimizer of the room that steps on given gradients must do; a new one is one row."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eos_monitor import critical_curvature
from eos_monitor.optim import APDE, LinearDiffusion, PerturbedSGD, perturbed
from tests.optim.relaxed import Step, make_net, same, stream, weights

# name -> builder of an optimizer from parameters and changes of its settings
ROWS: dict[str, Callable[..., Any]] = {
    "apde-plain": lambda params, **s: APDE(params, **{"lr": 0.1, "weight_decay": 1e-2, **s}),
    "apde": lambda params, **s: APDE(params, **{"lr": 0.1, "diffusion": 0.95, "weight_decay": 1e-2, **s}),
    "apde-foreach": lambda params, **s: APDE(params, **{"lr": 0.1, "diffusion": 0.95, "foreach": True, **s}),
    "apde-last-axis": lambda params, **s: APDE(
        params, **{"lr": 0.1, "diffusion": 0.5, "axes": -1, "boundary": "periodic", "time_step_reduction": 2.0, **s}
    ),
    "perturbed-sgd": lambda params, **s: PerturbedSGD(params, **{"lr": 0.1, "weight_decay": 1e-2, **s}),
    "perturbed-nesterov": lambda params, **s: PerturbedSGD(
        params, **{"lr": 0.1, "momentum": 0.9, "nesterov": True, "k": 5, **s}
    ),
    "perturbed-adam": lambda params, **s: perturbed(torch.optim.Adam(params, **{"lr": 0.1, **s}), 3),
}
every = pytest.mark.parametrize("name", ROWS)
# Not Adam, whose own ways are torch's; torch also drops the hooks of an optimizer that is copied.
ours = pytest.mark.parametrize("name", [name for name in ROWS if name != "perturbed-adam"])


def run(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Step:
    net = make_net(dtype=dtype)
    return Step(net, ROWS[name](net.parameters(), **changes), stream(dtype=dtype))


@every
def test_closure_is_called_once_and_its_loss_returned(name: str) -> None:
    step = run(name)
    losses: list[Tensor] = []
    closure = step.closure
    step.closure = lambda: (losses.append(closure()), losses[-1])[1]  # type: ignore[method-assign]
    loss = step(3)
    assert len(losses) == 3
    assert loss is losses[-1]


@every
def test_closure_and_gradients_given_are_the_same(name: str) -> None:
    by_closure = run(name)
    given = run(name)
    by_closure(4)
    for _ in range(4):
        given.closure()
        assert given.optimizer.step() is None
    assert same(weights(by_closure.net), weights(given.net))


@every
def test_no_learning_rate_no_step(name: str) -> None:
    step = run(name, lr=0.0)
    before = weights(step.net)
    step(3)
    assert same(weights(step.net), before)


@every
def test_quadratic_decreases(name: str) -> None:
    x = nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    scale = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)
    optimizer = ROWS[name]([x])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (scale * x * x).sum()
        loss.backward()
        return loss

    start = closure().item()
    for _ in range(100):
        optimizer.step(closure)
    assert closure().item() < 0.01 * start


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
    second = run(name, lr=0.5)  # the checkpoint has to bring the settings back
    second.net.load_state_dict(net_state)
    second.optimizer.load_state_dict(optimizer_state)
    second.batches = first.batches
    second(3)
    assert same(weights(second.net), weights(straight.net))


@ours
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
    step = Step(
        net, ROWS[name]([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}]), stream()
    )
    before = weights(net)
    step(2)
    after = weights(net)
    assert not torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert same(after[2:], before[2:])


@every
def test_groups_with_equal_settings_are_one(name: str) -> None:
    whole = run(name)
    net = make_net()
    split = Step(net, ROWS[name]([{"params": net[0].parameters()}, {"params": net[2].parameters()}]), stream())
    whole(3), split(3)
    assert same(weights(whole.net), weights(split.net))


@every
def test_scheduler(name: str) -> None:
    step = run(name)
    scheduler = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda epoch: 0.0 if epoch == 1 else 1.0)
    step()
    scheduler.step()
    before = weights(step.net)
    step()
    assert same(weights(step.net), before)
    scheduler.step()
    step()
    assert not same(weights(step.net), before)


@ours
def test_tensor_learning_rate_is_its_value(name: str) -> None:
    # 2^-3 is the same number in single precision.
    number = run(name, lr=0.125)
    tensor = run(name, lr=torch.tensor(0.125))
    number(3), tensor(3)
    assert same(weights(number.net), weights(tensor.net))


@ours
def test_clipped_gradients_make_small_steps(name: str) -> None:
    step = run(name, weight_decay=0.0, **({"time_step_reduction": 1.0} if "apde" in name else {}))
    step.after = lambda: nn.utils.clip_grad_norm_(step.net.parameters(), 1e-3)
    before = torch.cat([w.flatten() for w in weights(step.net)])
    step()
    moved = torch.cat([w.flatten() for w in weights(step.net)]) - before
    # lr · (‖g‖ + ‖(γ + β∇²) v‖) with v = g: the modes of γ + β∇² are between −1 and γ.
    assert 0 < float(moved.norm()) <= 0.1 * 2 * 1e-3


@every
def test_gradients_set_to_none_or_zero(name: str) -> None:
    to_none = run(name)
    to_zero = run(name)
    to_zero.set_to_none = False
    to_none(3), to_zero(3)
    assert same(weights(to_none.net), weights(to_zero.net))


@every
def test_frozen_and_unused_parameters_stay(name: str) -> None:
    net = make_net()
    net[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.full((3,), 0.1, dtype=torch.float64))
    step = Step(net, ROWS[name]([*net.parameters(), unused]), stream())
    before = net[0].bias.clone()
    weight = net[0].weight.detach().clone()
    step(3)
    assert torch.equal(net[0].bias, before)
    assert torch.equal(unused.detach(), torch.full((3,), 0.1, dtype=torch.float64))
    assert not torch.equal(net[0].weight, weight)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_precision_is_the_parameters(name: str, dtype: torch.dtype) -> None:
    step = run(name, dtype)
    net = make_net()
    net.load_state_dict(step.net.state_dict())
    exact = Step(net, ROWS[name](net.parameters()), ((x.double(), y) for x, y in stream(dtype=dtype)))
    step(3), exact(3)
    for p in step.net.parameters():
        assert p.dtype == dtype
        # Adam's step count is no velocity.
        assert all(value.dtype == dtype for key, value in step.optimizer.state[p].items() if key != "step")
    if "adam" not in name:  # which divides by gradients that rounding can make or break
        for low, high in zip(weights(step.net), weights(exact.net), strict=True):
            # Three roundings of weights of about 1, by half an eps each; the rest is smaller by the learning rate.
            assert torch.allclose(low.double(), high, atol=2 * torch.finfo(dtype).eps, rtol=0)


@every
def test_complex_parameters_step_as_their_parts(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    values = torch.randn(5, generator=g, dtype=torch.complex128)
    targets = torch.randn(5, generator=g, dtype=torch.complex128)
    whole = nn.Parameter(values.clone())
    parts = [nn.Parameter(values.real.clone()), nn.Parameter(values.imag.clone())]
    one = ROWS[name]([whole])
    two = ROWS[name](parts)
    for _ in range(5):
        one.zero_grad(), two.zero_grad()
        (whole - targets).abs().pow(4).sum().backward()
        (torch.complex(*parts) - targets).abs().pow(4).sum().backward()
        one.step(), two.step()
    # Equal but for the order of a few operations.
    assert torch.allclose(whole.detach(), torch.complex(*parts).detach(), rtol=1e-12, atol=1e-12)


@every
def test_edge_is_known_and_falls_with_the_learning_rate(name: str) -> None:
    step = run(name)
    faster = run(name, lr=0.2)
    step(), faster()
    slow, fast = (critical_curvature(s.optimizer) for s in (step, faster))
    assert slow.c is not None
    assert slow.without_threshold == ()
    assert slow.threshold == pytest.approx(fast.threshold, rel=1e-12)
    if "adam" not in name:
        assert torch.allclose(slow.c, 2 * fast.c, rtol=1e-12)
        assert float(slow.c[0] * 0.1) == pytest.approx(slow.threshold, rel=1e-12)


INVALID: list[tuple[Any, str, Any]] = [
    *((APDE, setting, -0.1) for setting in ("lr", "momentum", "weight_decay", "diffusion", "time_step_reduction")),
    *((APDE, setting, math.nan) for setting in ("lr", "momentum", "weight_decay", "diffusion", "time_step_reduction")),
    *((APDE, setting, 1.5) for setting in ("momentum", "diffusion")),
    (APDE, "time_step_reduction", 0.5),
    (APDE, "boundary", "dirichlet"),
    (APDE, "limit", "half"),
    *((PerturbedSGD, setting, bad) for setting in ("lr", "momentum", "weight_decay") for bad in (-0.1, math.nan)),
    *((PerturbedSGD, "k", bad) for bad in (0, -1, 1.5)),
]


@pytest.mark.parametrize(("cls", "setting", "value"), INVALID)
def test_invalid_setting_is_named(cls: Any, setting: str, value: Any) -> None:
    message = f"^Expected {setting} .*got {value!r}"
    with pytest.raises(ValueError, match=message):
        cls([nn.Parameter(torch.ones(3))], **{setting: value})
    optimizer = cls([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], setting: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("factor", [0, -3, 2.0])
def test_invalid_factor_is_named(factor: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected k to be an integer ≥ 1, got {factor}"):
        perturbed(torch.optim.SGD([nn.Parameter(torch.ones(3))]), factor)


def test_nesterov_without_momentum_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected momentum > 0 with nesterov=True, got 0"):
        PerturbedSGD([nn.Parameter(torch.ones(3))], nesterov=True)


def test_schedule_of_the_diffusion_needs_a_diffusion() -> None:
    with pytest.raises(ValueError, match="Expected an optimizer whose groups have a diffusion, got SGD"):
        LinearDiffusion(torch.optim.SGD([nn.Parameter(torch.ones(3))]), 3)
    with pytest.raises(ValueError, match="Expected total_iters > 0, got 0"):
        LinearDiffusion(APDE([nn.Parameter(torch.ones(3))], diffusion=1.0), 0)
