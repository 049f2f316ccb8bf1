"""Comparison of a registered critical curvature with the optimizer itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from eos_monitor.isolation.sandbox import preserve_rng
from eos_monitor.isolation.twin import trained_parameters, twin_optimizer
from eos_monitor.limits.thresholds import CriticalCurvature, critical_curvature

# Two parameters: factories may put them into groups. The second system has shapes that factored moments need.
_SHAPES = (((1,), (1,)), ((3,), (2, 2)))
_PROBE = 1e-6  # of gradients and momentum, far below what the state has seen, so that no clip acts
_EXACT = 1e-6  # what counts as linear, odd or even
# λ_max(H) between which the edge is looked for.
_LEAST = 1e-12
_MOST = 1e12


@dataclass(frozen=True)
class ThresholdCheck:
    """Comparison of a registered critical curvature with the optimizer's own edge.

    Attributes:
        optimizer: Name of the optimizer's class.
        predicted: For each random quadratic, scaled as one, the λ_max(H) at which the formula puts the edge.
        measured: The λ_max(H) at which the optimizer's own step turns unstable; infinite if it never does.
        eigenvalues: The step's leading eigenvalue at each measured edge: −1 for a flip, NaN if there is no edge.
        linear: Names of the state that was found to be linear in the gradients: momentum.
        adaptive: Names of the state that was found to be even in the gradients, and held fixed: second moments.
        rtol: What counts as agreement.
    """

    optimizer: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    eigenvalues: tuple[complex, ...]
    linear: tuple[str, ...]
    adaptive: tuple[str, ...]
    rtol: float

    @property
    def relative_error(self) -> float:
        """Largest |predicted/measured − 1|; infinite if an edge was predicted where there is none."""
        return max(_relative_error(*pair) for pair in zip(self.predicted, self.measured, strict=True))

    @property
    def agrees(self) -> bool:
        """Whether the relative error is within ``rtol`` and every edge is a flip."""
        flips = all(abs(value + 1) <= 1e-4 for value in self.eigenvalues if value == value)
        return flips and self.relative_error <= self.rtol

    def __str__(self) -> str:
        """Say it in a line."""
        worst = max(
            zip(self.predicted, self.measured, self.eigenvalues, strict=True), key=lambda row: _relative_error(*row[:2])
        )
        edge = f", where its eigenvalue is {worst[2]:.6g}" if worst[1] < math.inf else ""
        return (
            f"{self.optimizer}: the formula is {'right' if self.agrees else 'wrong'}: predicted {worst[0]:.6g}, "
            f"measured {worst[1]:.6g} (off by {self.relative_error:.2g}){edge}"
        )


def check_critical_curvature(
    optimizer_factory: Callable[[list[nn.Parameter]], Optimizer],
    *,
    steps: int = 100,
    seeds: Sequence[int] = (0, 1, 2),
    rtol: float = 1e-6,
) -> ThresholdCheck:
    r"""Hold a registered critical curvature against the optimizer's own step on random quadratics.

    The optimizer takes ``steps`` real steps on ½ xᵀHx at random points. Then its next step is taken apart: each state
    tensor that answers a gradient g and −g by opposite changes is momentum, each that answers both alike is adaptive
    and is held at its value throughout the step. What remains is a linear map of parameters and momentum; its spectral
    radius as a function of the factor on H is bisected, and compared with the factor at which

    .. math:: \lambda_{\max}\bigl(C^{-1/2} (H + W) C^{-1/2}\bigr) = 1.

    Run it on every setting that the formula distinguishes, such as groups, decay and Nesterov momentum.

    Args:
        optimizer_factory: ``factory(params) -> optimizer``, given two float64 parameters on the CPU, of shape
            ``(1,)`` each or ``(3,)`` and ``(2, 2)``. State must be kept in ``optimizer.state`` and its groups.
        steps: Steps that age the state, ≥ 1: a young one tests bias corrections.
        seeds: Of the quadratics and of the gradients seen.
        rtol: Relative error that counts as agreement.

    Returns:
        Predicted and measured edges, and whether they agree.

    Raises:
        ValueError: If the optimizer has no rule, or an argument is out of range.
        RuntimeError: If the step is not linear with its adaptive state held (sign rules, trust ratios), or cannot be
            held (fused kernels).

    Example:
        >>> from torch.optim import SGD
        >>> check = check_critical_curvature(lambda params: SGD(params, lr=0.1, momentum=0.9))
        >>> check.agrees, round(check.measured[0], 4)
        (True, 38.0)
    """
    if steps < 1 or not seeds:
        raise ValueError(f"Expected `steps` >= 1 and at least one seed, got {steps} and {list(seeds)}.")
    rows = []
    for shapes in _SHAPES:
        for seed in seeds:
            with preserve_rng(), torch.inference_mode(False), torch.enable_grad():
                rows.append(_AgedOptimizer(optimizer_factory, shapes, steps, seed).check())
    return ThresholdCheck(
        optimizer=rows[0].optimizer,
        predicted=tuple(row.predicted for row in rows),
        measured=tuple(row.measured for row in rows),
        eigenvalues=tuple(row.eigenvalue for row in rows),
        linear=tuple(sorted(set(chain.from_iterable(row.linear for row in rows)))),
        adaptive=tuple(sorted(set(chain.from_iterable(row.adaptive for row in rows)))),
        rtol=rtol,
    )


class _Row(NamedTuple):
    optimizer: str
    predicted: float
    measured: float
    eigenvalue: complex
    linear: list[str]
    adaptive: list[str]


class _Place(NamedTuple):
    """A tensor in the state of a parameter."""

    param: int
    key: str


class _AgedOptimizer:
    """An optimizer with an aged state on a random quadratic, whose next step can be taken again and again."""

    def __init__(
        self,
        factory: Callable[[list[nn.Parameter]], Optimizer],
        shapes: Sequence[tuple[int, ...]],
        steps: int,
        seed: int,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.params = [nn.Parameter(torch.zeros(shape, dtype=torch.float64, device="cpu")) for shape in shapes]
        self.size = sum(p.numel() for p in self.params)
        self.hessian = _random_hessian(self.size, generator)
        self.optimizer = factory(self.params)
        if {id(p) for p in trained_parameters([self.optimizer])} != {id(p) for p in self.params}:
            raise ValueError("Expected `optimizer_factory` to train the parameters that it is given, got others.")
        self._curvature()
        # Gradients with a size of their own for each coordinate spread the second moments.
        self.spread = 10 ** (2 * torch.rand(self.size, generator=generator, dtype=torch.float64, device="cpu") - 1)
        for _ in range(steps):
            x = torch.randn(self.size, generator=generator, dtype=torch.float64, device="cpu")
            self._place_at(x, self.spread * (self.hessian @ x))
            self.optimizer.step()
        nothing = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        self._place_at(nothing, nothing)
        curvature = self._curvature()
        if curvature.c is None:
            raise ValueError(f"Expected a critical curvature after {steps} steps, got none: the rule returns None.")
        self.sign = curvature.sign
        self.momentum: list[_Place] = []
        self.adaptive: dict[_Place, Tensor] = {}  # what to start from, so that the step uses what is there
        self._tell_apart()
        self._settle()

    def check(self) -> _Row:
        """Return where the formula puts the edge, and where it is."""
        from_state, from_gradient = self._maps()
        gradient = torch.zeros(self.size, len(from_state), dtype=torch.float64, device="cpu")

        def multipliers(scale: float) -> Tensor:
            gradient[:, : self.size] = self.sign * scale * self.hessian
            values: Tensor = torch.linalg.eigvals(from_state + from_gradient @ gradient)
            return values

        measured = _first_unstable(lambda scale: float(multipliers(scale).abs().max()))
        leading = max(multipliers(measured).tolist(), key=abs) if measured < math.inf else math.nan
        return _Row(
            optimizer=type(self.optimizer).__name__,
            predicted=self._predicted(),
            measured=measured,
            eigenvalue=complex(leading),
            linear=[place.key for place in self.momentum],
            adaptive=[place.key for place in self.adaptive],
        )

    def _curvature(self) -> CriticalCurvature:
        curvature = critical_curvature(self.optimizer)
        if curvature.without_threshold:
            raise ValueError(
                f"Expected an optimizer with a threshold, got {', '.join(curvature.without_threshold)}. "
                "Teach it with register_critical_curvature."
            )
        return curvature

    def _predicted(self) -> float:
        """Solve λ_max(C^-½ (s·H + W) C^-½) = 1 for s: s·H touches C − W."""
        curvature = self._curvature()
        assert curvature.c is not None
        room = curvature.c.double() - curvature.l2.double()
        if bool((room <= 0.0).any()):
            raise ValueError("Expected weight decay that is stable by itself, got c − l2 <= 0.")
        places = {
            id(p): part for p, part in zip(self.params, self._cut(torch.arange(self.size, device="cpu")), strict=True)
        }
        order = torch.cat([places[id(p)].reshape(-1) for p in curvature.params])
        scale = room.rsqrt()
        largest = float(torch.linalg.eigvalsh(scale[:, None] * self.hessian[order][:, order] * scale)[-1])
        return 1.0 / largest if largest > 0.0 else math.inf

    def _tell_apart(self) -> None:
        """Find momentum, which answers g and −g by opposite changes, and adaptive state, which answers both alike."""
        gradient = 1e3 * self.spread  # above all that running maxima have seen
        for _ in range(2):  # again with momentum at 0, where also averages of (g − momentum)² are even
            up, down, none = (self._stepped(gradient=factor * gradient)[1] for factor in (1.0, -1.0, 0.0))
            kinds: dict[str, list[_Place]] = {"odd": [], "even": [], "mixed": []}
            for place, rest in none.items():
                odd = float((up[place] - down[place]).norm())
                even = float((up[place] + down[place] - 2 * rest).norm())
                if odd or even:
                    kind = "odd" if even <= _EXACT * odd else "even" if odd <= _EXACT * even else "mixed"
                    kinds[kind].append(place)
            for place in kinds["odd"]:
                self._tensor(self.optimizer, place).zero_()
        if kinds["mixed"]:
            raise RuntimeError(
                f"Expected state that is linear or even in the gradient, got {kinds['mixed'][0].key!r}, "
                "which is neither."
            )
        self.momentum = kinds["odd"]
        self.adaptive = {place: self._tensor(self.optimizer, place).clone() for place in kinds["even"]}

    def _settle(self) -> None:
        """Find what adaptive state must be before a step that replaces its tensors, to be what it is in the step."""
        for _ in range(3):
            after = self._stepped()[1]
            for place, start in self.adaptive.items():
                wanted = self._tensor(self.optimizer, place)
                start.mul_(torch.where(after[place] != 0.0, wanted / after[place], torch.ones_like(wanted)))
        after = self._stepped()[1]
        for place in self.adaptive:
            if not torch.allclose(after[place], self._tensor(self.optimizer, place), rtol=_EXACT, atol=0.0):
                raise RuntimeError(f"Expected adaptive state that can be held during a step, got {place.key!r}.")

    def _maps(self) -> tuple[Tensor, Tensor]:
        """Return the matrices of the step, from parameters and momentum and from the gradient."""
        rest = self._after()
        states = self.size + sum(self._tensor(self.optimizer, place).numel() for place in self.momentum)
        units = _PROBE * torch.eye(states + self.size, dtype=torch.float64, device="cpu")
        columns = [self._after(unit[:states], unit[states:]) - rest for unit in units]
        matrix = torch.stack(columns, dim=1) / _PROBE
        probe = torch.randn(len(units), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
        moved = (self._after(_PROBE * probe[:states], _PROBE * probe[states:]) - rest) / _PROBE
        off = float((moved - matrix @ probe).norm() / moved.norm())
        if not off <= _EXACT:
            raise RuntimeError(
                f"Expected a step that is linear while its adaptive state is held, got one that is off by {off:.1e}: "
                "it has no edge of this kind (sign rules, trust ratios, line searches)."
            )
        return matrix[:, :states], matrix[:, states:]

    def _after(self, state: Tensor | None = None, gradient: Tensor | None = None) -> Tensor:
        """Return parameters and momentum after a step, as one vector."""
        x, tensors = self._stepped(state, gradient)
        return torch.cat([x] + [tensors[place].reshape(-1) for place in self.momentum])

    def _stepped(
        self, state: Tensor | None = None, gradient: Tensor | None = None
    ) -> tuple[Tensor, dict[_Place, Tensor]]:
        """Take the next step on a copy; return its parameters and all tensors of its state.

        Args:
            state: Parameters and momentum to start from, ``(m,)``; those at hand when None.
            gradient: Gradient, ``(n,)``; 0 when None.
        """
        copies = [p.detach().clone().requires_grad_() for p in self.params]
        twin = twin_optimizer(self.optimizer, dict(zip(self.params, copies, strict=True)))
        tensors = {place: self._tensor(twin, place, copies) for place in self._places()}
        for place, start in self.adaptive.items():
            tensors[place].copy_(start)
        with torch.no_grad():
            if state is not None:
                targets = [*copies, *(tensors[place] for place in self.momentum)]
                for target, part in zip(targets, torch.split(state, [t.numel() for t in targets]), strict=True):
                    target.copy_(part.view(target.shape))
        zero = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        for copy, part in zip(copies, self._cut(zero if gradient is None else gradient), strict=True):
            copy.grad = part.clone()
        torch.manual_seed(0)  # of optimizers that draw noise
        with _Held([tensors[place] for place in self.adaptive]):
            twin.step()
        after = {place: self._tensor(twin, place, copies).clone() for place in tensors}
        return torch.cat([copy.detach().reshape(-1) for copy in copies]), after

    def _places(self) -> list[_Place]:
        return [
            _Place(i, key)
            for i, p in enumerate(self.params)
            for key, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        ]

    def _tensor(self, optimizer: Optimizer, place: _Place, params: Sequence[Tensor] | None = None) -> Tensor:
        tensor: Tensor = optimizer.state[(params or self.params)[place.param]][place.key]
        return tensor

    def _cut(self, x: Tensor) -> list[Tensor]:
        parts = torch.split(x, [p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]

    def _place_at(self, x: Tensor, gradient: Tensor) -> None:
        for p, part, slope in zip(self.params, self._cut(x), self._cut(gradient), strict=True):
            p.data.copy_(part)
            p.grad = slope.clone()


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tensors that keep their values whatever operations write into them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = [(tensor, tensor.clone()) for tensor in tensors]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if "_fused_" in str(func) and self._held:
            raise RuntimeError(
                f"Expected a step of separate operations, got the fused kernel {func}, whose adaptive state cannot be "
                "held. Pass fused=False."
            )
        result = func(*args, **(kwargs or {}))
        for tensor, value in self._held:
            tensor.copy_(value)
        return result


def _first_unstable(radius: Callable[[float], float]) -> float:
    """Bisect for the smallest scale at which the spectral radius passes 1; infinite if there is none."""

    def unstable(scale: float) -> bool:
        return radius(scale) > 1.0 + 1e-9  # its rounding

    low = _LEAST
    high = 4 * _LEAST
    while not unstable(high):
        low = high
        high = 4 * high
        if high > _MOST:
            return math.inf
    for _ in range(48):
        middle = math.sqrt(low * high)
        if unstable(middle):
            high = middle
        else:
            low = middle
    return high


def _random_hessian(n: int, generator: torch.Generator) -> Tensor:
    """Return a positive definite matrix with λ_max = 1 and eigenvalues over a decade."""
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64, device="cpu"))[0]
    hessian: Tensor = q @ torch.diag(10 ** torch.linspace(-1, 0, n, dtype=torch.float64, device="cpu")) @ q.T
    return hessian


def _relative_error(predicted: float, measured: float) -> float:
    if predicted == measured:
        return 0.0
    return abs(predicted / measured - 1) if measured < math.inf else math.inf
