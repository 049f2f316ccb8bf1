"""The real step of an optimizer on a quadratic, with its second moments held: a linear map, and when it is unstable.

The matrix of the step is read off column by column from ``optimizer.step()`` itself. What is written down here of an
optimizer is only what its adaptive state must be *before* a step so that the step uses given values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor import critical_curvature

Build = Callable[[list[nn.Parameter]], list[Optimizer]]
Size = int | tuple[int, ...]
BUFFERS = ("momentum_buffer", "exp_avg", "z")
DECOUPLED = ("AdamW", "NAdamW", "AdamWScheduleFree")


class Quadratic(nn.Module):
    """½ (x − x₀)ᵀ H (x − x₀) with x cut into parameters, and optimizers whose second moments are frozen."""

    def __init__(
        self,
        hessian: Tensor,
        sizes: Sequence[Size],
        build: Build,
        steps: int,
        seed: int = 0,
        center: float = 0.0,
        probe: float = 1e-12,
    ) -> None:
        super().__init__()
        # Small, so that gradients are small beside the frozen moments at any scale of H that is tried.
        self.hessian, self.steps, self.probe = hessian, steps, probe
        self.center = torch.full((len(hessian),), center, dtype=torch.float64)
        self.pieces = nn.ParameterList(nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in sizes)
        self.optimizers = build(list(self.pieces))
        self.apply_gradient(torch.ones(len(hessian), dtype=torch.float64))
        for optimizer in self.optimizers:
            optimizer.step()  # creates the state
        g = torch.Generator().manual_seed(seed)
        self.frozen = {p: self.moments(p, g) for p in self.pieces}
        self.momenta = [(self.state(p), key) for p in self.pieces for key in BUFFERS if key in self.state(p)]
        self.momenta = [(state, key) for state, key in self.momenta if state[key] is not None]
        self.settle()

    def moments(self, p: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        """Second moments over four orders of magnitude, a running maximum above them, a mean below their roots."""

        def spread(like: Tensor) -> Tensor:
            return 10 ** (4 * torch.rand(like.shape, generator=g, dtype=torch.float64) - 4)

        state = self.state(p)
        found = {
            key: spread(state[key])
            for key in ("exp_avg_sq", "square_avg", "exp_inf", "sum", "acc_delta", "variance", "row_var", "col_var")
            if key in state
        }
        second_moment = found.get("exp_avg_sq", found.get("square_avg"))
        if state.get("max_exp_avg_sq") is not None:
            found["max_exp_avg_sq"] = second_moment * (1 + torch.rand(p.shape, generator=g, dtype=torch.float64))
        if state.get("grad_avg") is not None:
            found["grad_avg"] = second_moment.sqrt() * (torch.rand(p.shape, generator=g, dtype=torch.float64) - 0.5)
        return found

    def forward(self, _: Any = None) -> Tensor:
        x = torch.cat([p.reshape(-1) for p in self.pieces]) - self.center
        return 0.5 * x @ self.hessian @ x

    def optimizer_of(self, p: Tensor) -> Optimizer:
        return next(o for o in self.optimizers for g in o.param_groups for q in g["params"] if q is p)

    def state(self, p: Tensor) -> Any:
        return self.optimizer_of(p).state.get(p, {})

    def group(self, p: Tensor) -> Any:
        return next(g for g in self.optimizer_of(p).param_groups if any(p is q for q in g["params"]))

    def apply_gradient(self, x: Tensor) -> None:
        for p, part in zip(self.pieces, self.cut(self.hessian @ (x - self.center)), strict=True):
            p.grad = part.clone()
            if type(self.optimizer_of(p)).__name__ == "SparseAdam":
                every = torch.arange(p.numel())[None]  # .to_sparse() would leave the zeros out
                p.grad = torch.sparse_coo_tensor(every, part.clone(), p.shape, is_coalesced=True, check_invariants=True)

    def freeze(self, x: Tensor) -> None:
        """Set the adaptive state so that the step from ``x`` uses the frozen moments at the frozen time."""
        for p, g, at in zip(self.pieces, self.cut(self.hessian @ (x - self.center)), self.cut(x), strict=True):
            group, optimizer = self.group(p), self.optimizer_of(p)
            if group.get("maximize"):
                g = -g
            decoupled = group.get("decoupled_weight_decay") or group.get("decoupled_decay")
            if not (decoupled or getattr(optimizer, "adam_w_mode", False) or type(optimizer).__name__ in DECOUPLED):
                g = g + group.get("weight_decay", 0.0) * at
            self.write(p, {key: before(key, value, g, group, self.steps) for key, value in self.frozen[p].items()})

    def settle(self) -> None:
        """Set the state to what is to be read: the frozen moments, before the step to come."""
        for p, part in zip(self.pieces, self.cut(self.center), strict=True):
            p.data.copy_(part)
            self.write(p, self.frozen[p])

    def write(self, p: Tensor, moments: dict[str, Tensor]) -> None:
        state, group, steps = self.state(p), self.group(p), self.steps
        for key, value in moments.items():
            state[key].copy_(value)
        for place in (state, group):  # a tensor, a number, or a number in the group
            if isinstance(place.get("step"), Tensor):
                place["step"].fill_(steps)
            elif "step" in place:
                place["step"] = steps
        if "mu_product" in state:
            product = 1.0
            for k in range(1, steps + 1):
                product *= group["betas"][0] * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"]))
            state["mu_product"].fill_(product)
        if "eta" in state:
            state["eta"].fill_(group["lr"] / (1 + group["lambd"] * group["lr"] * steps) ** group["alpha"])
            state["ax"].zero_()
        if "weight_sum" in group:
            group.update(k=steps, weight_sum=steps * group["lr"] ** 2, lr_max=group["lr"])

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = x.split([p.numel() for p in self.pieces])
        return tuple(part.view(p.shape) for part, p in zip(parts, self.pieces, strict=True))

    def jacobian(self) -> Tensor:
        n = len(self.hessian)
        sizes = [state[key].numel() for state, key in self.momenta]
        columns = []
        for unit in self.probe * torch.eye(n + sum(sizes), dtype=torch.float64):
            x, rest = unit[:n] + self.center, unit[n:]
            with torch.no_grad():
                for p, part in zip(self.pieces, self.cut(x), strict=True):
                    p.copy_(part)
                for (state, key), part in zip(self.momenta, rest.split(sizes), strict=True):
                    state[key].copy_(part.view(state[key].shape))
            self.freeze(x)
            self.apply_gradient(x)
            for optimizer in self.optimizers:
                optimizer.step()
            moved = torch.cat([p.detach().reshape(-1) for p in self.pieces]) - self.center
            columns.append(torch.cat([moved] + [state[key].reshape(-1) for state, key in self.momenta]))
        self.settle()
        return torch.stack(columns, dim=1) / self.probe

    def multipliers(self) -> Tensor:
        return torch.linalg.eigvals(self.jacobian())

    def radius(self) -> float:
        return float(self.multipliers().abs().max())

    def critical_scale(self, near: float) -> float:
        """Factor on H at which the real step turns unstable, looked for from a tenth of ``near``; H is left there."""
        unit = self.hessian

        def radius(factor: float) -> float:
            self.hessian = factor * unit
            return self.radius()

        measured = crossing(radius, near / 10)
        self.hessian = measured * unit
        return measured

    def leading(self) -> complex:
        """Eigenvalue of the step that is largest in magnitude."""
        return max(self.multipliers().tolist(), key=abs)


def before(key: str, value: Tensor, g: Tensor, group: Any, steps: int) -> Tensor:
    """Return what a state must be before a step with gradient ``g`` so that the step uses ``value``."""
    if key in ("exp_avg_sq", "square_avg"):
        beta = float(group["betas"][1] if "betas" in group else group.get("alpha", group.get("rho")))
        return (value - (1 - beta) * g * g) / beta
    if key == "grad_avg":
        return (value - (1 - group["alpha"]) * g) / group["alpha"]
    if key == "exp_inf":
        return value / group["betas"][1]
    if key == "sum":
        return value - g * g
    if key in ("variance", "row_var", "col_var"):
        weight = (steps + 1) ** group["beta2_decay"]
        squares = {"variance": g * g}.get(key)
        if squares is None:
            squares = (g * g).mean(dim=-1 if key == "row_var" else -2, keepdim=True)
        return (value - weight * squares) / (1 - weight)
    return value  # acc_delta is used before it is updated; the running maximum stays


def crossing(value: Callable[[float], float], start: float = 1e-6) -> float:
    """Smallest factor, to 1e-9 of itself, at which a growing ``value`` passes 1 (up to its rounding)."""
    high = start
    while value(high) <= 1.0 + 1e-12:
        high *= 16
        assert high < 1e12, "never unstable"
    low = high / 16
    return float(brentq(lambda factor: value(factor) - 1.0 - 1e-12, low, high, xtol=1e-9 * low, rtol=1e-9))


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


def quadratic(build: Build, sizes: Sequence[Size], steps: int, seed: int = 1, **options: Any) -> Quadratic:
    n = sum(torch.Size([size] if isinstance(size, int) else size).numel() for size in sizes)
    hessian = random_hessian(n, seed) if n > 1 else torch.ones(1, 1, dtype=torch.float64)
    system = Quadratic(hessian, sizes, build, steps, **options)
    if system.optimizers[0].param_groups[0].get("maximize"):
        system.hessian = -hessian  # a loss to be maximized has its bowl upside down
    return system


def one(cls: Callable[..., Optimizer], **settings: Any) -> Build:
    return lambda ps: [cls(ps, **settings)]


def split(first: type[Optimizer], second: type[Optimizer], a: dict[str, Any], b: dict[str, Any]) -> Build:
    """Two optimizers, the first parameter with one and the rest with the other."""
    return lambda ps: [first(ps[:1], **a), second(ps[1:], **b)]


def groups(cls: Callable[..., Optimizer], a: dict[str, Any], b: dict[str, Any], **common: Any) -> Build:
    return lambda ps: [cls([{"params": ps[:1], **a}, {"params": ps[1:], **b}], **common)]
