"""What the optimizers on a smoothed loss share: a step of several evaluations around the weights."""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from eos_monitor.optim.checked_optimizer import CheckedOptimizer

Closure = Callable[[], Any]
Group = dict[str, Any]

# setting -> what it has to be, in words and as a test that NaN fails
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "lr": ("a number >= 0", lambda v: 0 <= v < math.inf),
    "inner_lr": ("a number >= 0", lambda v: 0 <= v < math.inf),
    "gamma": ("a number > 0", lambda v: 0 < v < math.inf),
    "averaging": ("a number in [0, 1)", lambda v: 0 <= v < 1),
    "momentum": ("a number in [0, 1)", lambda v: 0 <= v < 1),
    "inner_momentum": ("a number in [0, 1)", lambda v: 0 <= v < 1),
    "moving_rate": ("a number in [0, 1]", lambda v: 0 <= v <= 1),
    "scoping": ("a number in [0, 1)", lambda v: 0 <= v < 1),
    "temperature": ("a number >= 0", lambda v: 0 <= v < math.inf),
    "viscosity": ("a number >= 0", lambda v: 0 <= v < math.inf),
    "weight_decay": ("a number >= 0", lambda v: 0 <= v < math.inf),
    "evaluations": ("a whole number >= 1", lambda v: isinstance(v, int) and v >= 1),
    "workers": ("a whole number >= 1", lambda v: isinstance(v, int) and v >= 1),
}
# One evaluation moves all groups at once.
_COMMON = ("evaluations", "workers", "distributed")


class Part(NamedTuple):
    """A parameter group during a step: its trainable parameters, and the weights x around which it evaluates."""

    group: Group
    params: list[Tensor]
    anchors: list[Tensor]


class Relaxation(CheckedOptimizer):
    """Base of the optimizers whose step calls its closure several times, with other weights in place each time.

    After the step the parameters hold x again, and ``.grad`` the gradient of the last evaluation. A closure that
    raises leaves x as it was.

    Attributes:
        generator: Source of the noise; None is torch's global one. Its state is part of ``state_dict``.
        evaluation: Number of the evaluation that is running, from 0; None outside a step.
    """

    generator: torch.Generator | None
    # On the class, because copies and pickles of an optimizer leave out what is neither state nor group.
    evaluation: int | None = None
    _warned = False
    _ranges: Mapping[str, tuple[str, Callable[[Any], bool]]] = {}  # where a subclass differs from _RANGES
    _noise_settings: tuple[str, ...] = ()
    _remedy = "Lower inner_lr or raise gamma."

    def __init__(self, params: Any, defaults: dict[str, Any], generator: torch.Generator | None = None) -> None:
        self.generator = generator
        super().__init__(params, defaults)

    @property
    def closure_calls(self) -> int:
        """How often one step calls its closure."""
        return cast(int, self.param_groups[0]["evaluations"])

    @property
    def draws_noise(self) -> bool:
        """Whether a step draws random numbers."""
        return any(group[name] for group in self.param_groups for name in self._noise_settings)

    def inner_limit(self, group: Mapping[str, Any]) -> float:
        """Return the largest curvature of the loss (weight decay included) at which the inner loop is stable."""
        return math.inf

    @abstractmethod
    def _relax(self, closure: Closure, parts: Sequence[Part]) -> None:
        """Move the parameters from x to where the step leads."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Make one step, of ``closure_calls`` evaluations.

        Args:
            closure: Clears the gradients, computes loss and gradients on a fresh mini-batch, and returns the loss.

        Returns:
            The loss of the first evaluation.

        Raises:
            ValueError: If there is no closure.
        """
        if closure is None:
            raise ValueError(
                f"Expected a closure, got None: {type(self).__name__} evaluates loss and gradient "
                f"{self.closure_calls} times a step. Pass step(closure)."
            )
        if not self._warned:
            self._warned = not self.check_inner_stability()
        parts = [
            Part(group, trainable, [p.clone() for p in trainable])
            for group in self.param_groups
            if (trainable := [p for p in group["params"] if p.requires_grad])
        ]
        first: list[Any] = []

        def noted() -> None:
            loss = closure()
            if not first:
                first.append(loss)

        try:
            self._relax(noted, parts)
        except BaseException:
            for part in parts:
                put(part.params, part.anchors)
            raise
        for group in self.param_groups:
            group["gamma"] *= 1 - group["scoping"]
        return first[0]

    def check_inner_stability(self, sharpness: float = 0.0) -> bool:
        """Warn where the inner loop cannot be stable on a loss of this sharpness; return whether it can everywhere.

        Each step checks it at sharpness 0, which no inner loop may fail, until it has warned once.

        Args:
            sharpness: Largest eigenvalue λ of the loss's Hessian.
        """
        stable = True
        for number, group in enumerate(self.param_groups):
            curvature = sharpness + group["weight_decay"]
            limit = self.inner_limit(group)
            if not curvature < limit:
                stable = False
                shown = ("inner_lr", "lr", "gamma", "averaging", "inner_momentum", "momentum")
                settings = ", ".join(f"{name}={group[name]:g}" for name in shown if name in group)
                warnings.warn(
                    f"{type(self).__name__}: expected a curvature below {limit:.4g}, where the inner loop of group "
                    f"{number} ({settings}) turns unstable, got {curvature:.4g}. {self._remedy}",
                    stacklevel=3,
                )
        return stable

    def _check(self, group: Group) -> None:
        for name, (words, holds) in {**_RANGES, **self._ranges}.items():
            if name in group and not holds(group[name]):
                raise ValueError(f"Expected {name} to be {words}, got {group[name]!r}.")
        for name in _COMMON:
            if name in group and group[name] != self.param_groups[0][name]:
                raise ValueError(f"Expected {name} to be the same in all groups, got {group[name]!r} in one.")
        if group.get("nesterov") and not group["momentum"]:
            raise ValueError(f"Expected momentum > 0 with nesterov=True, got {group['momentum']!r}.")
        if any(p.is_complex() for p in group["params"]):
            raise ValueError("Expected real parameters, got complex ones. Train their torch.view_as_real.")

    def _evaluate(self, closure: Closure, number: int) -> None:
        """Call the closure, as the evaluation of this number in the step."""
        self.evaluation = number
        try:
            with torch.enable_grad():
                closure()
        finally:
            self.evaluation = None

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def _buffers(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        return [self.state[p].get("momentum_buffer") if p in self.state else None for p in params]

    def _sgd(self, group: Group, params: list[Tensor], gradients: list[Tensor], weight_decay: float) -> None:
        """Make torch's SGD step, with the momentum buffers in the state."""
        buffers = self._buffers(params)
        sgd(
            params,
            gradients,
            buffers,
            foreach=group["foreach"],
            lr=float(group["lr"]),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            weight_decay=weight_decay,
            dampening=0.0,
            maximize=False,
        )
        if group["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    # Optimizer's own versions keep state and groups only: without the generator a copy would draw other noise.
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}

    def state_dict(self) -> dict[str, Any]:
        """Return state, groups, and the state of the generator if there is one."""
        state = super().state_dict()
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "generator"})
        if self.generator is not None and "generator" in state_dict:
            self.generator.set_state(state_dict["generator"].cpu())


def put(params: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Write values into parameters."""
    for p, value in zip(params, values, strict=True):
        p.copy_(value)


def gradient(p: Tensor, weight_decay: float) -> Tensor:
    """Return the gradient at the weights in place, of the loss with its weight decay; never ``p.grad`` changed.

    Raises:
        RuntimeError: If the gradient is sparse.
    """
    assert p.grad is not None
    if p.grad.is_sparse:
        raise RuntimeError("Expected dense gradients, got sparse ones. Build the embedding with sparse=False.")
    return p.grad.add(p, alpha=weight_decay) if weight_decay else p.grad


def descend(part: Part, buffers: list[Tensor | None], *, lr: float, momentum: float, nesterov: bool = False) -> None:
    """Make one step of SGD on f(y) + |y − x|²/(2γ), from the y in place and with the gradients in place."""
    group = part.group
    moved = [i for i, p in enumerate(part.params) if p.grad is not None]
    params = [part.params[i] for i in moved]
    held = [buffers[i] for i in moved]
    # At y = x the spring adds an exact zero, so that one evaluation is bit for bit a step of SGD.
    gradients = [
        gradient(p, group["weight_decay"]).add(p - part.anchors[i], alpha=1 / group["gamma"])
        for i, p in zip(moved, params, strict=True)
    ]
    sgd(
        params,
        gradients,
        held,
        foreach=group["foreach"],
        lr=float(lr),
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.0,
        dampening=0.0,
        maximize=False,
    )
    for i, buffer in zip(moved, held, strict=True):
        buffers[i] = buffer
