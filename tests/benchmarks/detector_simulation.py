"""Many training runs at once: batched optimizers, batched edge ratios, and what a monitor would see of each run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from tests.benchmarks.detector_nets import Net

BATCH = 32  # of the minibatch optimizers
DATA = {False: 256, True: 128}  # samples of a run: minibatches, full batch
_PROBE = 128
_GAUGE_BATCHES = 8  # batches of a reading of batch sharpness
_GIVE_UP = 1e8  # times the first loss


@dataclass(frozen=True)
class Optimizer:
    """One of torch's optimizers, for many runs at once (tests compare them with torch's)."""

    name: str
    full_batch: bool
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] | None = None  # of Adam
    decay: float = 0.0  # decoupled

    @property
    def family(self) -> str:
        return "adam" if self.betas else "nesterov" if self.nesterov else "sgd"

    @property
    def beta(self) -> float:
        return self.betas[0] if self.betas else self.momentum

    def start(self, weights: Tensor) -> dict[str, Tensor]:
        return (
            {"m": torch.zeros_like(weights), "v": torch.zeros_like(weights)}
            if self.betas
            else {"m": torch.zeros_like(weights)}
        )

    def update(self, weights: Tensor, g: Tensor, lr: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """Return the new weights ``(R, n)``; ``lr`` is ``(R, 1)`` and ``step`` begins at 0."""
        m = state["m"]
        if self.betas is None:
            if not self.momentum:
                return weights - lr * g
            m.mul_(self.momentum).add_(g)
            return weights - lr * (g + self.momentum * m if self.nesterov else m)
        beta1, beta2 = self.betas
        m.lerp_(g, 1 - beta1)
        state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = (state["v"] / (1 - beta2 ** (step + 1))).sqrt_().add_(1e-8)
        return weights * (1 - lr * self.decay) - lr / (1 - beta1 ** (step + 1)) * m / root

    def critical_curvature(self, lr: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """Critical curvature before ``step``, ``(R, 1)`` or ``(R, n)``, written out from theory."""
        if self.betas is None:
            slope = (1 + self.momentum) / (1 + 2 * self.momentum) if self.nesterov else 1 + self.momentum
            return 2 * slope / lr
        beta1, beta2 = self.betas
        root = (state["v"] / (1 - beta2 ** max(step, 1))).sqrt_().add_(1e-8)
        return (1 + beta1) * (2 - lr * self.decay) / (1 - beta1) * (1 - beta1 ** (step + 1)) / lr * root


OPTIMIZERS: dict[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        Optimizer("GD", True),
        Optimizer("heavy ball", True, momentum=0.9),
        Optimizer("Nesterov", True, momentum=0.9, nesterov=True),
        Optimizer("Adam", True, betas=(0.9, 0.99)),
        Optimizer("AdamW", True, betas=(0.9, 0.999), decay=0.01),
        Optimizer("SGD, batches", False),
        Optimizer("heavy ball, batches", False, momentum=0.9),
    )
}


@dataclass
class Plan:
    """What happens to one run.

    Attributes:
        seed: Seed of weights, data and order.
        lr: Learning rate of every step, ``(T,)``.
        inputs: Factor on the inputs of every step, ``(T,)``.
        noise: Share of random labels from the start.
        shift_at: Step from which on the labels are permuted; None for never.
        jump_at: Step from which on the learning rate is multiplied; None for never.
    """

    seed: int
    lr: np.ndarray
    inputs: np.ndarray
    noise: float = 0.0
    shift_at: int | None = None
    jump_at: int | None = None


def top_eigenpair(matvec: Callable[[Tensor], Tensor], start: Tensor, products: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lanczos for many symmetric operators at once: largest Ritz values ``(R,)``, vectors ``(R, n)``, residuals."""
    basis = [start / start.norm(dim=1, keepdim=True).clamp_min(1e-30)]
    alphas, betas = [], []
    for _ in range(products):
        w = matvec(basis[-1])
        alphas.append((w * basis[-1]).sum(1))
        for _ in range(2):
            for b in basis:
                w = w - (w * b).sum(1, keepdim=True) * b
        betas.append(w.norm(dim=1))
        basis.append(w / betas[-1][:, None].clamp_min(1e-30))
    t = torch.diag_embed(torch.stack(alphas, 1))
    off = torch.stack(betas[:-1], 1)
    t = t + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    sane = torch.isfinite(t).all(-1).all(-1)
    values, vectors = torch.linalg.eigh(torch.where(sane[:, None, None], t, torch.eye(products)).double())
    s = vectors[:, :, -1].to(start.dtype)
    vector = sum(s[:, i : i + 1] * basis[i] for i in range(products))
    value = torch.where(sane, values[:, -1].to(start.dtype), torch.nan)
    return value, vector, betas[-1] * s[:, -1].abs()


class Simulation:
    """Trains ``plans`` of one net under one optimizer and records, at every step, what a monitor could know.

    The order inside a step is that of a callback: loss, learning rate and reading come before the update; the update's
    size and projections are known from the step after it.
    """

    def __init__(self, net: Net, optimizer: Optimizer, plans: list[Plan], *, read_every: float = 10.0) -> None:
        self.net, self.optimizer, self.plans, self.read_every = net, optimizer, plans, read_every
        runs = len(plans)
        self.steps = len(plans[0].lr)
        self.lr = torch.as_tensor(np.stack([p.lr for p in plans])).float()
        self.inputs = torch.as_tensor(np.stack([p.inputs for p in plans])).float()
        generators = [torch.Generator().manual_seed(p.seed) for p in plans]
        self.weights = torch.stack([net.init(g) for g in generators])
        samples = DATA[optimizer.full_batch]
        pairs = [net.data(samples, g) for g in generators]
        self.x, self.y = torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
        self.shifted = self.y.clone()
        for i, (plan, g) in enumerate(zip(plans, generators, strict=True)):
            wrong = torch.rand(samples, generator=g) < plan.noise
            self.y[i, wrong] = self.y[i, torch.randperm(samples, generator=g)][wrong]
            self.shifted[i] = (self.y[i] + 1) % net.classes if net.classes else -self.y[i]
        self.order = generators
        self.random = torch.Generator().manual_seed(plans[0].seed + 1)
        self.z = torch.randn(self.weights.shape[1], generator=self.random)
        self._losses = vmap(net.loss)
        self._grads = vmap(grad(net.loss))
        self._values = vmap(torch.func.grad_and_value(net.loss))
        self._products = vmap(lambda w, x, y, v: jvp(lambda u: grad(net.loss)(u, x, y), (w,), (v,))[1])
        names = ("loss", "trial", "gradient", "relative_update", "projection", "random_projection")
        self.series = {name: np.full((runs, self.steps), np.nan, np.float32) for name in names}
        self.readings: list[tuple[int, np.ndarray]] = []  # step, (runs, 4): r, its error, batch sharpness, its error
        self.checks: list[tuple[int, np.ndarray]] = []  # step, (runs,): r of all data, by another solve
        self._epoch: Tensor | None = None

    def run(self, check_every: int = 25) -> Simulation:
        """Go through all steps."""
        state = self.optimizer.start(self.weights)
        warm, aim = torch.randn(self.weights.shape, generator=self.random), None
        checked = torch.randn(self.weights.shape, generator=self.random)
        alive = torch.ones(len(self.plans), dtype=torch.bool)
        first: Tensor | None = None
        next_reading = 0.0
        for step in range(self.steps):
            lr = self.lr[:, step : step + 1]
            labels = self._labels(step)
            x, y = self._batch(step, labels)
            g, loss = self._values(self.weights, x, y)
            first = loss.clone() if first is None else first
            self._note("loss", step, loss, alive)
            self._note("gradient", step, g.norm(dim=1), alive)
            # A run that is not finite any more, or beyond all bounds, stays where it is.
            alive = alive & torch.isfinite(loss) & torch.isfinite(g).all(1) & (loss <= _GIVE_UP * first)
            if not alive.any():
                break
            c = None
            if step >= next_reading:
                c = self.optimizer.critical_curvature(lr, state, step)
                warm = self._read(step, c, labels, warm, alive, 8 if not self.readings else 5)
                aim = c.sqrt() * warm
                next_reading = step + self.read_every * float(0.8 + 0.4 * torch.rand((), generator=self.random))
            if step % check_every == 0:
                c = self.optimizer.critical_curvature(lr, state, step) if c is None else c
                checked = self._check(step, c, labels, checked, alive)
            new = self.optimizer.update(self.weights, g, lr, state, step)
            new = torch.where((alive & torch.isfinite(new).all(1))[:, None], new, self.weights)
            update = new - self.weights
            self._note("relative_update", step, update.norm(dim=1) / new.norm(dim=1), alive)
            self._note("random_projection", step, update @ self.z, alive)
            if aim is not None:
                self._note("projection", step, (update * aim).sum(1), alive)
            self.weights = new
            if not self.optimizer.full_batch:  # with the full batch it is the loss of the next step
                self._note("trial", step, self._losses(new, x, y), alive)
        return self

    def _note(self, name: str, step: int, values: Tensor, alive: Tensor) -> None:
        self.series[name][:, step] = torch.where(alive, values, torch.nan).numpy()

    def _labels(self, step: int) -> Tensor:
        after = torch.tensor([p.shift_at is not None and step >= p.shift_at for p in self.plans])
        if not after.any():
            return self.y
        return torch.where(after.view(-1, *[1] * (self.y.dim() - 1)), self.shifted, self.y)

    def _batch(self, step: int, labels: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.inputs[:, step].view(-1, 1, 1)
        if self.optimizer.full_batch:
            return self.x * scale, labels
        per_epoch = self.x.shape[1] // BATCH
        if step % per_epoch == 0:  # without replacement, a new order each epoch
            self._epoch = torch.stack([torch.randperm(self.x.shape[1], generator=g) for g in self.order])
        assert self._epoch is not None
        part = self._epoch[:, step % per_epoch * BATCH :][:, :BATCH]
        x, y = self._pick(part, labels)
        return x * scale, y

    def _pick(self, rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        runs = torch.arange(len(rows))[:, None]
        return self.x[runs, rows], labels[runs, rows]

    def _scaled(self, c: Tensor, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
        root = c.sqrt()
        return lambda v: self._products(self.weights, x, y, v / root) / root

    def _read(self, step: int, c: Tensor, labels: Tensor, warm: Tensor, alive: Tensor, products: int) -> Tensor:
        """A warm reading on the fixed probe, as the monitor takes it."""
        noise = torch.randn(warm.shape, generator=self.random)
        start = torch.nan_to_num(warm / warm.norm(dim=1, keepdim=True)) + 0.1 * noise / math.sqrt(warm.shape[1])
        r, vector, residual = top_eigenpair(self._scaled(c, self.x[:, :_PROBE], labels[:, :_PROBE]), start, products)
        error = residual if self.optimizer.full_batch else torch.hypot(residual, 0.1 * r)
        sharpness, spread = self._batch_sharpness(labels)
        row = torch.stack([r, error, sharpness, spread], 1)
        self.readings.append((step, torch.where(alive[:, None], row, torch.nan).numpy().astype(np.float32)))
        # Its sign is free; the projections of updates need one that stays.
        return torch.nan_to_num(vector * (vector * warm).sum(1, keepdim=True).sign())

    def _batch_sharpness(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over batches of gᵀHg / gᵀg, and its standard error; NaN with the full batch."""
        if self.optimizer.full_batch:
            nothing = torch.full((len(self.plans),), torch.nan)
            return nothing, nothing
        quotients = []
        for _ in range(_GAUGE_BATCHES):
            rows = torch.stack([torch.randperm(self.x.shape[1], generator=self.random)[:BATCH] for _ in self.plans])
            x, y = self._pick(rows, labels)
            g = self._grads(self.weights, x, y)
            quotients.append((g * self._products(self.weights, x, y, g)).sum(1) / g.square().sum(1).clamp_min(1e-30))
        values = torch.stack(quotients)
        return values.mean(0), values.std(0) / math.sqrt(_GAUGE_BATCHES)

    def _check(self, step: int, c: Tensor, labels: Tensor, start: Tensor, alive: Tensor) -> Tensor:
        """The edge ratio of all data by a chain of its own, for the labels only."""
        noise = torch.randn(start.shape, generator=self.random)
        start = torch.nan_to_num(start / start.norm(dim=1, keepdim=True)) + 0.5 * noise / math.sqrt(start.shape[1])
        r, vector, _ = top_eigenpair(self._scaled(c, self.x, labels), start, 8)
        self.checks.append((step, torch.where(alive, r, torch.nan).numpy().astype(np.float32)))
        return torch.nan_to_num(vector)
