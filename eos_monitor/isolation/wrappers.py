"""What Fabric, Accelerate and data parallelism put around modules and optimizers, recognized without importing them.

A reading is of what is inside: it needs neither the mixed precision of a wrapper's forward nor its exchange between
processes, and a backward of its own would trip over the wrapper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.isolation.batches import map_batch
from eos_monitor.isolation.copies import cast

# Class -> attribute with what is inside. Those that only pass on:
_OPTIMIZERS = {"_FabricOptimizer": "optimizer", "LightningOptimizer": "optimizer", "AcceleratedOptimizer": "optimizer"}
# The module itself, and not what it may be compiled or distributed by:
_MODULES = {"_FabricModule": "_original_module", "DistributedDataParallel": "module", "DataParallel": "module"}


def bare_optimizer(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that steps, inside of wrappers that only pass on."""
    while True:
        inner = _inside(optimizer, _OPTIMIZERS)
        if not isinstance(inner, Optimizer) or inner is optimizer or not _same_groups(optimizer, inner):
            return optimizer
        optimizer = inner


def direct_forward(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """Return the ``forward`` that a wrapped module has without its wrapper, as an attribute to set; none for others."""
    held = vars(module)
    if "_original_forward" in held and hasattr(held.get("forward"), "__wrapped__"):
        return {"forward": held["_original_forward"]}  # Accelerate's autocast around it
    inner = _inside(module, _MODULES)
    if not isinstance(inner, nn.Module):
        return {}
    if type(module).__name__ != "_FabricModule":
        return {"forward": inner.__call__}

    def forward(*args: Any, **kwargs: Any) -> Any:
        # Fabric converts what goes in to the precision of the parameters, and half precision that comes out back.
        dtype = next((p.dtype for p in inner.parameters() if p.is_floating_point()), None)
        args, kwargs = map_batch((args, kwargs), lambda x: cast(x, dtype))
        return map_batch(inner(*args, **kwargs), lambda x: cast(x, torch.float32) if _is_half(x) else x)

    return {"forward": forward}


def _inside(wrapper: Any, kinds: dict[str, str]) -> Any:
    attribute = next((kinds[cls.__name__] for cls in type(wrapper).__mro__ if cls.__name__ in kinds), None)
    return None if attribute is None else getattr(wrapper, attribute, None)


def _same_groups(one: Optimizer, other: Optimizer) -> bool:
    mine, its = ([[id(p) for p in group["params"]] for group in o.param_groups] for o in (one, other))
    return mine == its


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
