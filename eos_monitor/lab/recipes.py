"""The runs of the demo: which optimizer, on what, with which settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

# Odd, because at the edge the weights flip with period 2: an even cadence would always see the same side.
READ_EVERY = 15
SAMPLES = 1000
_GD_LR = 0.1
_ADAMW_LR = 2e-3
# torch's defaults, repeated because the theory's threshold needs them.
_ADAMW_BETAS = (0.9, 0.999)
_ADAMW_DECAY = 1e-2
# Tuned: at 0.4 this net stays further below its edge (lr·BS/2 = 0.6); at 0.7 it diverged.
_SGD_LR = 0.65
_SGD_WARM_UP = 300
_SGD_BATCH = 8


@dataclass(frozen=True)
class Recipe:
    """One run of the demo.

    Attributes:
        name: Optimizer, in words.
        settings: Its settings, in words.
        theory: Its threshold of lr·λ_max(P⁻¹H), by the formula.
        optimizer: Makes it from parameters.
        batch_size: Samples in a step; None is all of them.
        centred: Whether each pixel is centred by itself.
        warm_up: Steps of linear warm-up.
        read_every: Steps between readings.
        probe_samples: Samples of the probe.
        rtol: Relative residual of a reading.
    """

    name: str
    settings: str
    theory: float
    optimizer: Callable[[Iterator[nn.Parameter]], Optimizer]
    batch_size: int | None = None
    centred: bool = False
    warm_up: int = 1
    read_every: int = READ_EVERY
    probe_samples: int = SAMPLES
    rtol: float = 1e-2


# The thresholds are written out from theory, so that the table does not compare the package with itself.
RECIPES = (
    Recipe("gradient descent", f"lr {_GD_LR:g}", 2.0, lambda params: torch.optim.SGD(params, lr=_GD_LR)),
    Recipe(
        "AdamW",
        f"lr {_ADAMW_LR:g}",
        (2 + 2 * _ADAMW_BETAS[0]) / (1 - _ADAMW_BETAS[0]) * (1 - _ADAMW_LR * _ADAMW_DECAY / 2),
        lambda params: torch.optim.AdamW(params, lr=_ADAMW_LR, betas=_ADAMW_BETAS, weight_decay=_ADAMW_DECAY),
    ),
    Recipe(
        "minibatch SGD",
        f"lr {_SGD_LR:g}, B {_SGD_BATCH}",
        2.0,
        lambda params: torch.optim.SGD(params, lr=_SGD_LR),
        batch_size=_SGD_BATCH,
        # Pixels that are never negative share one direction of large curvature, which hides the part of the noise.
        centred=True,
        warm_up=_SGD_WARM_UP,
        # A reading takes each of the probe's 32 batches on its own, and costs many times as much.
        read_every=95,
        probe_samples=256,
        rtol=3e-2,  # of r; its sampling error on this probe is more
    ),
)
