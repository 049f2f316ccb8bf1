"""Optimizers built from partial differential equations, as ``torch.optim`` citizens."""

from eos_monitor.optim.apde import APDE, from_physical, to_physical
from eos_monitor.optim.batch_norm import recompute_batch_norm
from eos_monitor.optim.burgers import BurgersSGD
from eos_monitor.optim.diffusion import stable_diffusion
from eos_monitor.optim.elastic import ElasticSGD
from eos_monitor.optim.entropy_sgd import EntropySGD
from eos_monitor.optim.hamilton_jacobi import HamiltonJacobi
from eos_monitor.optim.heat_smoothing import HeatSmoothing
from eos_monitor.optim.perturbed import PerturbedSGD, perturbed
from eos_monitor.optim.placement import LinearDiffusion, diffusion_groups

__all__ = [
    "APDE",
    "BurgersSGD",
    "ElasticSGD",
    "EntropySGD",
    "HamiltonJacobi",
    "HeatSmoothing",
    "LinearDiffusion",
    "PerturbedSGD",
    "diffusion_groups",
    "from_physical",
    "perturbed",
    "recompute_batch_norm",
    "stable_diffusion",
    "to_physical",
]
