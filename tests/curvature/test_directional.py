"""The directional ratio, against real optimizers that oscillate at their edge and dense Hessians."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eos_monitor.curvature.directional import directional_ratio
from eos_monitor.isolation.fingerprint import fingerprint
from tests.nets import Problem, dense_hessian, make, mean_loss

N = 6
BETA2 = 1 - 1e-9  # so that no gradient moves v while the mode settles
Build = Callable[[list[nn.Parameter]], list[torch.optim.Optimizer]]


class Quadratic(nn.Module):
    """½ (θ − centre)ᵀ A (θ − centre) + floor, with θ in two parameters."""

    def __init__(self, a: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(2, 2).to(a)), nn.Parameter(torch.zeros(2).to(a))
        self.a, self.centre = a, centre

    def forward(self) -> Tensor:
        away = torch.cat([self.first.reshape(-1), self.second]) - self.centre
        return 0.5 * away @ self.a @ away + 0.3


def quadratic_loss(module: Any, batch: Any) -> Tensor:
    return module()


ONE = [torch.zeros(1)]  # a batch that the quadratic does not look at


def seeded_matrix(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64))[0]
    a = basis @ torch.diag(torch.tensor([1.0, 0.55, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)) @ basis.T
    return (a + a.T) / 2, torch.randn(N, generator=g, dtype=torch.float64)


def one(cls: Any, **settings: Any) -> Build:
    return lambda params: [cls(params, **settings)]


def two_groups(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    groups = [{"params": params[:1], "lr": 0.1, "momentum": 0.9}, {"params": params[1:], "lr": 0.4}]
    return [torch.optim.SGD(groups, lr=0.1, weight_decay=0.3)]


def two_optimizers(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    decayed = torch.optim.SGD(params[:1], lr=0.1, weight_decay=0.5)
    return [decayed, torch.optim.Adam(params[1:], lr=0.05, betas=(0.8, BETA2), eps=0.0)]


P = torch.linspace(0.5, 2.0, N, dtype=torch.float64)  # Adam's frozen √v
BOTH = torch.cat([torch.ones(4), torch.zeros(2)]).double()  # the first parameter's coordinates
ADAM = 38 * P  # (2 + 2β1)/(1 − β1) for β1 = 0.9, times P; over lr

# optimizer(s), their critical curvature, their coupled decay; the thresholds are written out from theory
EDGES: dict[str, tuple[Build, Tensor, Tensor | float]] = {
    "sgd": (one(torch.optim.SGD, lr=0.1), torch.full((N,), 20.0).double(), 0.0),
    "heavy-ball": (one(torch.optim.SGD, lr=0.1, momentum=0.9), torch.full((N,), 38.0).double(), 0.0),
    "nesterov": (
        one(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        torch.full((N,), 38 / 2.8, dtype=torch.float64),
        0.0,
    ),
    "dampened": (one(torch.optim.SGD, lr=0.1, momentum=0.5, dampening=0.5), torch.full((N,), 60.0).double(), 0.0),
    "sgd-decay": (one(torch.optim.SGD, lr=0.1, weight_decay=5.0), torch.full((N,), 20.0).double(), 5.0),
    "heavy-ball-decay": (
        one(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5.0),
        torch.full((N,), 38.0).double(),
        5.0,
    ),
    "adam": (one(torch.optim.Adam, lr=0.1, betas=(0.9, BETA2), eps=0.0), 10 * ADAM, 0.0),
    "adam-decay": (one(torch.optim.Adam, lr=0.1, betas=(0.9, BETA2), eps=0.0, weight_decay=20.0), 10 * ADAM, 20.0),
    "two-groups": (two_groups, torch.where(BOTH > 0, 38.0, 5.0), 0.3),
    "two-optimizers": (two_optimizers, torch.where(BOTH > 0, 20.0, 18 / 0.05 * P), 0.5 * BOTH),
}


def freeze(optimizer: torch.optim.Optimizer, gradient: dict[nn.Parameter, Tensor], slots: dict[Any, Tensor]) -> None:
    """Set Adam's state so that its next step, at this gradient, has √v = P and no bias correction left."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    beta2 = optimizer.param_groups[0]["betas"][1]
    for p in optimizer.param_groups[0]["params"]:
        g = gradient[p]
        state = optimizer.state[p]
        state.setdefault("exp_avg", torch.zeros_like(p))
        state["step"] = torch.tensor(1e12)
        state["exp_avg_sq"] = (slots[p] ** 2 - (1 - beta2) * g**2) / beta2


def oscillating(name: str) -> tuple[Quadratic, list[torch.optim.Optimizer], Tensor]:
    """A quadratic, scaled so that the optimizers are at their edge, after the other modes have died out."""
    build, c, decay = EDGES[name]
    a, centre = seeded_matrix()
    root = c.double().rsqrt()
    w = torch.diag(torch.zeros(N).double() + decay)
    low, high = 0.0, 1e6
    for _ in range(200):  # λ_max(C^-½ (s A + W) C^-½) = 1
        s = (low + high) / 2
        top = float(torch.linalg.eigvalsh(root[:, None] * (s * a + w) * root)[-1])
        low, high = (s, high) if top < 1 else (low, s)
    module = Quadratic(low * a, centre)
    params = [module.first, module.second]
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for p in params:
            p.copy_(1e-2 * torch.randn(p.shape, generator=g, dtype=torch.float64))
        params[0].add_(centre[:4].view(2, 2))
        params[1].add_(centre[4:])
    optimizers = build(params)
    slots = {params[0]: P[:4].view(2, 2), params[1]: P[4:]}
    for step in range(701):
        for p in params:
            p.grad = None
        module().backward()
        # Adam with coupled decay sees the gradient with the decay in it.
        seen = {p: p.grad + o.param_groups[0].get("weight_decay", 0.0) * p.detach() for o in optimizers
                for p in o.param_groups[0]["params"]}  # fmt: skip
        for optimizer in optimizers:
            freeze(optimizer, seen, slots)
            if step < 700:
                optimizer.step()
    for p in params:
        p.grad = None
    return module, optimizers, low * a


@pytest.mark.parametrize("method", ["product", "forward"])
@pytest.mark.parametrize("name", EDGES)
def test_ratio_is_one_in_a_period_two_mode(name: str, method: str) -> None:
    module, optimizers, _ = oscillating(name)
    found = directional_ratio(module, quadratic_loss, ONE, optimizers, method=method)
    # At the edge the mode neither grows nor shrinks; the others have decayed as 0.95^700 or faster. The losses of
    # "forward" differ by 1e-4 or so of 1 to 1e3, with u = 1e-16.
    assert found == pytest.approx(1.0, abs=1e-8 if method == "product" else 1e-7)


@pytest.mark.parametrize("name", ["sgd-decay", "heavy-ball-decay", "adam-decay"])
def test_without_the_decay_the_ratio_would_not_be_one(name: str) -> None:
    """What the decay is worth in these cases, with the 1e-7 that the test above allows."""
    module, optimizers, a = oscillating(name)
    (optimizer,) = optimizers
    theta = torch.cat([module.first.detach().reshape(-1), module.second.detach()])
    plain = a @ (theta - module.centre)
    module().backward()
    optimizer.step()
    u = torch.cat([module.first.detach().reshape(-1), module.second.detach()]) - theta
    assert abs(float(u @ a @ u / (-2 * plain @ u)) - 1) > 1e-2


def test_decoupled_decay_is_left_out() -> None:
    """The decay of AdamW is in u, not in H and g; around a centre of zero the mode has ratio one all the same."""
    lr, decay = 0.1, 0.5
    a, _ = seeded_matrix()
    c = 19 * (2 - lr * decay) / lr * P
    top = float(torch.linalg.eigvalsh(c.rsqrt()[:, None] * a * c.rsqrt())[-1])
    module = Quadratic(a / top, torch.zeros(N).double())
    with torch.no_grad():
        module.first.add_(torch.linspace(-1e-2, 2e-2, 4).view(2, 2))
        module.second.add_(1e-2)
    params = [module.first, module.second]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, BETA2), eps=0.0, weight_decay=decay)
    slots = {module.first: P[:4].view(2, 2), module.second: P[4:]}
    for step in range(701):
        optimizer.zero_grad()
        module().backward()
        freeze(optimizer, {p: p.grad for p in params}, slots)
        if step < 700:
            optimizer.step()
    assert directional_ratio(module, quadratic_loss, ONE, optimizer) == pytest.approx(1.0, abs=1e-8)


NETS = ["unequal-batches", "dict-batches", "tied", "frozen", "batch-norm", "dropout", "lstm", "partly-used",
        "sparse-embedding", "checkpointed", "causal-attention"]  # fmt: skip


def stepped(problem: Problem, build: Callable[[Any], torch.optim.Optimizer]) -> tuple[Any, Tensor, Tensor]:
    """An optimizer after two steps, the gradient of the mean loss, and the update of its third step."""
    trained = list(problem.trained().values())
    optimizer = build(trained)

    def step(target: Any, params: list[Any]) -> Tensor:
        loss = mean_loss(problem, problem.trained())
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        # A parameter that the loss does not use has a gradient of zero, as on a full optimizer step after zero_grad
        # (set_to_none=False).
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(grads, trained, strict=True)]
        for p, g in zip(params, dense, strict=True):
            p.grad = g.clone()
        before = [p.detach().clone() for p in params]
        target.step()
        moves = [(p.detach() - b).reshape(-1) for p, b in zip(params, before, strict=True)]
        for p in params:
            p.grad = None
        return torch.cat([g.reshape(-1) for g in dense]), torch.cat(moves)

    with torch.random.fork_rng():
        for _ in range(2):
            step(optimizer, trained)
        # The copy of a list keeps what it shares: here, the optimizer with its parameters.
        twin, params = copy.deepcopy((optimizer, trained))
        gradient, update = step(twin, params)
    return optimizer, gradient, update


@pytest.mark.parametrize("name", NETS)
def test_nets_agree_with_a_dense_hessian(name: str) -> None:
    problem = make(name)
    sizes = {id(batch): size for batch, size in zip(problem.batches, problem.sizes, strict=False)}
    count = (lambda batch: sizes[id(batch)]) if sizes else None
    build = lambda ps: torch.optim.Adam(ps, lr=0.003)  # noqa: E731
    optimizer, gradient, update = stepped(problem, build)
    twin = make(name.removeprefix("sparse-"))
    twin.module.load_state_dict(problem.module.state_dict())
    with torch.random.fork_rng():
        exact = float(update @ dense_hessian(twin) @ update / (-2 * gradient @ update))
    found = directional_ratio(problem.module, problem.loss_fn, problem.batches, optimizer, batch_size_fn=count)
    # Both are exact but for rounding, here up to 1e-10 of the terms that cancel in uᵀHu.
    assert found == pytest.approx(exact, rel=1e-7)
    given = directional_ratio(
        problem.module, problem.loss_fn, problem.batches, optimizer, update=update, batch_size_fn=count
    )
    assert given == pytest.approx(exact, rel=1e-7)


def test_forward_is_the_loss_at_the_end_of_the_step() -> None:
    problem = make("batch-norm")
    optimizer, gradient, update = stepped(problem, lambda ps: torch.optim.RMSprop(ps, lr=0.02))
    found = directional_ratio(problem.module, problem.loss_fn, problem.batches, optimizer, method="forward")
    trained = problem.trained()
    parts = zip(trained.items(), update.split([p.numel() for p in trained.values()]), strict=True)
    end = {name: p.detach() + part.view(p.shape) for (name, p), part in parts}
    with torch.random.fork_rng():
        change = float((mean_loss(problem, end) - mean_loss(problem, trained)).detach())
    assert found == pytest.approx(1 - change / float(gradient @ update), rel=1e-9)


def test_forward_works_where_double_backward_does_not() -> None:
    """The backward pass of CTC has no derivative."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, batch = nn.Linear(4, 3).double(), torch.randn(6, 2, 4).double()
    labels, lengths = torch.tensor([[1, 2], [2, 1]]), (torch.full((2,), 6), torch.full((2,), 2))

    def loss(module: Any, x: Any) -> Tensor:
        return F.ctc_loss(module(x).log_softmax(-1), labels, *lengths)

    sgd = torch.optim.SGD(net.parameters(), lr=1e-2)
    with pytest.raises(RuntimeError, match="not implemented"):
        directional_ratio(net, loss, [batch], sgd)
    found = directional_ratio(net, loss, [batch], sgd, method="forward")
    before = loss(net, batch)
    before.backward()
    squared = sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None)
    sgd.step()
    change = float((loss(net, batch) - before).detach())
    # A difference of losses of order 1, over gᵀu = 1e-2 ‖g‖².
    assert found == pytest.approx(1 + change / (1e-2 * squared), abs=1e-10)


@pytest.mark.parametrize("method", ["product", "forward"])
@pytest.mark.parametrize("name", ["batch-norm", "dropout", "unequal-batches"])
def test_nothing_changes(name: str, method: str) -> None:
    problem = make(name)
    optimizer, _, _ = stepped(problem, lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1))
    for p in problem.module.parameters():
        p.grad = torch.ones_like(p)
    before = fingerprint(problem.module, [optimizer], also={"batches": problem.batches})
    state = copy.deepcopy((problem.module.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    directional_ratio(problem.module, problem.loss_fn, problem.batches, optimizer, method=method)
    after = fingerprint(problem.module, [optimizer], also={"batches": problem.batches})
    assert before.changes(after) == []
    now = (problem.module.state_dict(), optimizer.state_dict(), torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(flat(state), flat(now), strict=True))
    assert all(bool((p.grad == 1).all()) for p in problem.module.parameters())


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in flat(item)]


def simple(lr: float = 0.1, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Any, torch.optim.Optimizer]:
    a, centre = seeded_matrix()
    module = Quadratic(a.to(dtype), centre.to(dtype))
    return module, torch.optim.SGD(module.parameters(), lr=lr, **settings)


@pytest.mark.parametrize("method", ["product", "forward"])
def test_no_descent_has_no_ratio(method: str) -> None:
    module, sgd = simple()
    ascent = 0.1 * module.a @ -module.centre
    assert directional_ratio(module, quadratic_loss, ONE, sgd, update=ascent, method=method) is None
    with torch.no_grad():  # zero gradient
        module.first.copy_(module.centre[:4].view(2, 2))
        module.second.copy_(module.centre[4:])
    assert directional_ratio(module, quadratic_loss, ONE, sgd, method=method) is None


def test_forward_has_no_ratio_below_rounding() -> None:
    module, sgd = simple(lr=1e-9, dtype=torch.float32)
    assert directional_ratio(module, quadratic_loss, ONE, sgd, method="forward") is None
    assert directional_ratio(module, quadratic_loss, ONE, sgd) == pytest.approx(0.0, abs=1e-8)


def test_forward_is_infinite_where_the_step_ends_beyond_numbers() -> None:
    module, sgd = simple(lr=1e200)
    assert directional_ratio(module, quadratic_loss, ONE, sgd, method="forward") == math.inf


def test_maximize_turns_the_loss_over() -> None:
    module, sgd = simple(weight_decay=0.2)
    other, ascent = simple(weight_decay=0.2, maximize=True)
    exact = directional_ratio(module, quadratic_loss, ONE, sgd)
    for method in ("product", "forward"):
        found = directional_ratio(other, lambda m, b: -m(), ONE, ascent, method=method)
        assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("method", ["product", "forward"])
def test_nan_loss_is_an_error(method: str) -> None:
    module, sgd = simple()
    with pytest.raises(RuntimeError, match="Expected a finite loss, got nan"):
        directional_ratio(module, lambda m, b: m() * math.nan, ONE, sgd, method=method)


def test_wrong_arguments_are_errors() -> None:
    module, sgd = simple()
    with pytest.raises(ValueError, match="Expected `method`"):
        directional_ratio(module, quadratic_loss, ONE, sgd, method="backward")
    with pytest.raises(ValueError, match=r"Expected `update` of shape \(6,\), got \(5,\)"):
        directional_ratio(module, quadratic_loss, ONE, sgd, update=torch.ones(5))
    with pytest.raises(ValueError, match="at least one batch"):
        directional_ratio(module, quadratic_loss, [], sgd)
    with pytest.raises(ValueError, match="at least one sample"):
        directional_ratio(module, quadratic_loss, [torch.zeros(0, 3)], sgd)
    with pytest.raises(ValueError, match="both"):
        directional_ratio(module, quadratic_loss, ONE, [sgd, simple(maximize=True)[1]])
    with pytest.raises(ValueError, match="one place"):
        directional_ratio(module, quadratic_loss, ONE, [sgd, sgd])
    with pytest.raises(RuntimeError, match="finite update"):
        directional_ratio(module, quadratic_loss, ONE, sgd, update=torch.full((6,), math.nan))
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameter"):
        directional_ratio(module, quadratic_loss, ONE, sgd)


def test_a_step_that_needs_a_closure_is_taken_on_the_copy() -> None:
    """Against the step that LBFGS itself then takes, and the ratio written out."""
    module, _ = simple()
    lbfgs = torch.optim.LBFGS(module.parameters(), lr=0.3, max_iter=3)
    found = directional_ratio(module, quadratic_loss, ONE, lbfgs)

    def loss() -> Tensor:
        lbfgs.zero_grad()
        value = quadratic_loss(module, ONE[0])
        value.backward()
        return value

    start = torch.cat([p.detach().reshape(-1).clone() for p in module.parameters()])
    gradient = module.a @ (start - module.centre)
    lbfgs.step(loss)
    update = torch.cat([p.detach().reshape(-1) for p in module.parameters()]) - start
    assert found == pytest.approx(float(update @ module.a @ update) / float(-2 * gradient @ update), rel=1e-9)


def test_other_steps_than_the_proposed_can_be_judged() -> None:
    module, _ = simple()
    newton = module.centre.clone()  # from 0 to the lowest point
    lbfgs = torch.optim.LBFGS(module.parameters())
    assert directional_ratio(module, quadratic_loss, ONE, lbfgs, update=newton) == pytest.approx(0.5)
