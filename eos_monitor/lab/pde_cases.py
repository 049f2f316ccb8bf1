"""Three gradient flows whose edge is known: a one-layer net as a PDE, the heat equation, Beltrami smoothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from eos_monitor.readings.reading import StabilityReading
from eos_monitor.verdicts.detector import InstabilityDetector, Verdict

Array = NDArray[np.float64]

_SIDE = 32
_IMAGE = 256
_DECAY = 20.0  # α of the one-layer net
_NODES = 31
_DELTA = 1e-3
_FIDELITY = 5.0
_POINTS = 200
BELTRAMI_STEP = _DELTA / 2  # the largest step at which the diffusion alone is stable


@dataclass(frozen=True)
class Moment:
    """A flow before one of its steps.

    Attributes:
        state: What flows.
        loss: Its energy.
        step_size: Size of the explicit step.
        sharpness: Largest algebraic eigenvalue of the energy's Hessian, exact.
        mode: Its eigenvector, of norm 1.
    """

    state: Array  # (n,)
    loss: float
    step_size: float
    sharpness: float
    mode: Array  # (n,)

    @property
    def edge_ratio(self) -> float:
        """Step size · sharpness / 2."""
        return self.step_size * self.sharpness / 2


def one_layer_pde(lr: float, seed: int = 7) -> Iterator[Moment]:
    r"""Train one 32 × 32 kernel K on one 256 × 256 checkerboard by gradient descent.

    The loss is softplus(−f) + 10 ‖K‖² with f the mean of swish over the valid correlation of K and the image. Its
    patches are ±c only, so that f depends on z = ⟨c, K⟩ alone and one step is exact at the cost of two patches. Stable
    below lr = 2 / 62.0 = 0.0323; restrained from there to 2/20 = 0.1, where all directions but c lose stability.

    Args:
        lr: Learning rate, > 0.
        seed: Seed of the kernel.

    References:
        Y. Sun et al., "A PDE-based Explanation of Extreme Numerical Sensitivities and Edge of Stability in Training
        Neural Networks", 2022, arXiv 2206.02001, equation 9 and figures 5, 6.
    """
    kernel: Array = np.random.RandomState(seed).randn(_SIDE**2)  # the recipe's own generator
    rows, columns = np.divmod(np.arange(_SIDE**2), _SIDE)
    patch = np.where((rows + columns) % 2 == 0, -1.0, 1.0)
    places = (_IMAGE - _SIDE + 1) ** 2
    plus = (places + 1) // 2 / places  # share of the patches that begin with −1
    while True:
        with np.errstate(over="ignore", invalid="ignore"):
            z = float(patch @ kernel)
            s, s1, s2 = _swish(z)
            t, t1, t2 = _swish(-z)
            f = plus * s + (1 - plus) * t
            f1 = plus * s1 - (1 - plus) * t1
            f2 = plus * s2 + (1 - plus) * t2
            wrong = _sigmoid(-f)
            bend = wrong * (1 - wrong) * f1**2 - wrong * f2
            loss = float(np.logaddexp(0.0, -f) + _DECAY / 2 * (kernel @ kernel))
            sharpness = _DECAY + bend * len(patch) if bend > 0.0 else _DECAY
            mode = patch / _SIDE
            if not bend > 0.0:  # all directions but c have the curvature α
                across = kernel - z / len(patch) * patch
                mode = across / max(float(np.linalg.norm(across)), 1e-300)
            yield Moment(kernel, loss, lr, sharpness, mode)
            kernel = kernel - lr * (-wrong * f1 * patch + _DECAY * kernel)


def heat(dt: float, seed: int | None = None) -> Iterator[Moment]:
    """Diffuse a triangle on 31 nodes by explicit steps; the energy is half the sum of squared differences.

    Unstable above dt = 1 / (2 sin²(29π/60)) = 0.5014.

    Args:
        dt: Time step, with unit spacing and diffusivity.
        seed: Seed of a perturbation of 1 %; None for none.
    """
    nodes = np.arange(_NODES)
    u: Array = np.minimum(nodes, _NODES - 1 - nodes) / 10.0
    if seed is not None:
        u[1:-1] *= 1 + 0.01 * np.random.default_rng(seed).standard_normal(_NODES - 2)
    last = _NODES - 2
    mode = np.sin(np.pi * last * nodes / (_NODES - 1))
    mode /= np.linalg.norm(mode)
    sharpness = 4 * math.sin(math.pi * last / (2 * (_NODES - 1))) ** 2
    while True:
        with np.errstate(over="ignore", invalid="ignore"):
            yield Moment(u, float(np.square(np.diff(u)).sum() / 2), dt, sharpness, mode)
            step = np.zeros_like(u)
            step[1:-1] = dt * np.diff(u, 2)
            u = u + step


def beltrami(multiple: float, seed: int = 0) -> Iterator[Moment]:
    """Smooth a noisy box and wave on 200 points by Beltrami flow, the energy Σ √(u_x² + δ²) + λ/2 Σ (u − I)².

    δ = 1e-3, λ = 5. The flux is at most 1, so that the flow is bounded, whatever its local stability, as long as
    λ dt < 2: up to 800 times the stable step.

    Args:
        multiple: Time step in units of ``BELTRAMI_STEP``.
        seed: Seed of the noise.
    """
    x = np.arange(_POINTS)
    image = np.where((x > 50) & (x < 100), 1.0, 0.0) + np.where(x >= 100, 0.5 * np.sin(2 * np.pi * (x - 100) / 50), 0.0)
    image = image + 0.05 * np.random.default_rng(seed).standard_normal(_POINTS)
    u: Array = image
    dt = multiple * BELTRAMI_STEP
    while True:
        with np.errstate(over="ignore", invalid="ignore"):
            slope = np.diff(u)
            length = np.sqrt(slope**2 + _DELTA**2)
            loss = float(length.sum() + _FIDELITY / 2 * np.square(u - image).sum())
            stiffness = _DELTA**2 / length**3
            diagonal = _FIDELITY + np.r_[stiffness, 0.0] + np.r_[0.0, stiffness]
            sharpness, mode = _top(diagonal, -stiffness)
            yield Moment(u, loss, dt, sharpness, mode)
            flux = slope / length
            u = u + dt * (np.r_[flux, 0.0] - np.r_[0.0, flux] - _FIDELITY * (u - image))


def watch(
    moments: Iterator[Moment],
    steps: int,
    *,
    every: int = 10,
    seed: int = 0,
    tell: Callable[[InstabilityDetector], None] | None = None,
) -> list[Verdict]:
    """Run a flow under an :class:`InstabilityDetector` and return the verdict of every step.

    Args:
        moments: The flow.
        steps: Steps to take; a state that is not finite ends it sooner.
        every: Steps between readings, on average; they are jittered by a fifth.
        seed: Seed of the jitter and of the random projection.
        tell: Called with the detector after every step.

    Example:
        >>> watch(heat(0.4), 100)[-1], watch(heat(0.8), 100)[-1]
        (<Verdict.STABLE: 1>, <Verdict.DIVERGING: 5>)
    """
    rng = np.random.default_rng(seed)
    detector = InstabilityDetector(full_batch=True)
    verdicts: list[Verdict] = []
    before: Moment | None = None
    z = None
    mode = None
    next_reading = 0.0
    for step, now in enumerate(islice(moments, steps)):
        reading = None
        update = None if before is None else now.state - before.state
        z = rng.standard_normal(len(now.state)) if z is None else z
        sizes: dict[str, float] = {}
        if update is not None and mode is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                norm = max(float(np.linalg.norm(now.state)), 1e-300)
                sizes = {
                    "projection": float(mode @ update),
                    "random_projection": float(z @ update),
                    "relative_update": float(np.linalg.norm(update)) / norm,
                }
        if step >= next_reading and math.isfinite(now.loss):
            next_reading = step + every * rng.uniform(0.8, 1.2)
            mode = now.mode if mode is None or mode @ now.mode >= 0 else -now.mode
            reading = StabilityReading(
                step=step,
                loss=now.loss,
                lr=(now.step_size,),
                edge_ratio=now.edge_ratio,
                error=0.0,
                full_batch=True,
                converged=True,
            )
        verdicts.append(detector.update(step, loss=now.loss, lr=now.step_size, reading=reading, **sizes))
        if tell is not None:
            tell(detector)
        if not math.isfinite(now.loss):
            break
        before = now
    return verdicts


def _top(diagonal: Array, off: Array) -> tuple[float, Array]:
    """Return the largest eigenvalue of a symmetric tridiagonal matrix, and its vector; NaN where it is not finite."""
    if not (np.isfinite(diagonal).all() and np.isfinite(off).all()):
        return math.nan, np.full_like(diagonal, math.nan)
    last = len(diagonal) - 1
    values, vectors = eigh_tridiagonal(diagonal, off, select="i", select_range=(last, last))
    return float(values[0]), np.asarray(vectors[:, 0], dtype=np.float64)


def _sigmoid(x: float) -> float:
    return float(0.5 * (1 + math.tanh(x / 2)))


def _swish(x: float) -> tuple[float, float, float]:
    """Return x·σ(x) and its first two derivatives."""
    s = _sigmoid(x)
    slope = s * (1 - s)
    return x * s, s + x * slope, slope * (2 + x * (1 - 2 * s))
