"""Which layers a loss runs through, and which activation follows each, seen in one evaluation in the sandbox.

Layers are found by the identity of the weight that a linear or convolution function is called with, so that modules
and functional calls are alike. Only gradient edges of outputs are kept, not the outputs: operations in place do not
disturb them, and whoever wants the values looks at them while they pass (see `capture`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eos_monitor.cfl.calls import Capture, Observer
from eos_monitor.cfl.tracer import Tracer
from eos_monitor.isolation.sandbox import LossFn, Sandbox

WITHOUT_A_GRAPH = "computed without a graph (no_grad, or reentrant checkpointing)"
_HIDDEN: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "inside nn.MultiheadAttention, whose projections are out of sight",
    nn.RNNBase: "inside a recurrent layer, whose products are out of sight",
    nn.RNNCellBase: "inside a recurrent cell, whose products are out of sight",
}
# What torch.compile and Fabric call the module inside.
_WRAPPERS = ("_orig_mod", "_forward_module", "_original_module")
# What modules call their weights, weight_norm's among them.
_WEIGHTS = ("weight", "weight_g", "weight_v")


class NoLayerError(ValueError):
    """The loss runs through no layer that can be measured."""


def layer_names(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that can be weights of layers, trainable or not, by the name of the layer."""
    return {_owner(name): p for name, p in module.named_parameters() if nn.parameter.is_lazy(p) or p.ndim >= 2}


def capture(
    sandbox: Sandbox,
    module: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    *,
    parameters: Mapping[Tensor, Tensor],
    stream: int = 0,
    observers: Sequence[Observer] = (),
    previous: Mapping[Tensor, Tensor] | None = None,
    graph: bool = True,
) -> Capture:
    """Evaluate a loss once and record its layers and activations.

    To be called inside the entered sandbox. Inputs of layers are kept (autograd does so too), outputs are not.

    Args:
        sandbox: Sandbox of ``module``, entered.
        module: Module that the loss is evaluated on.
        loss_fn: ``loss_fn(module, batch)`` -> loss.
        batch: Any batch.
        parameters: Live parameter -> tensor to use in its place. Only layers whose weight is among them are recorded.
        stream: Number of the random stream.
        observers: Told of each pre-activation while it is there.
        previous: Live parameter -> its value before the last update, for the observers.
        graph: Whether a layer must have a part in the loss's graph.

    Raises:
        NoLayerError: If no layer with a weight among ``parameters`` was called.
    """
    tracers = []

    def traced(root: Any, copied: Any) -> Tensor:
        # Here, where the stand-ins are in their places, and afresh in each evaluation.
        tracer = Tracer(_measured(root, parameters), parameters, observers, previous, graph=graph)
        tracers.append(tracer)
        own = root.__dict__.get("forward")
        forward = root.forward
        # Not a hook: other threads would run a global one, and the module's own are the user's.
        root.__dict__["forward"] = lambda *args, **kwargs: tracer.returned(forward(*args, **kwargs))
        try:
            with tracer:
                return loss_fn(root, copied)
        finally:
            del root.__dict__["forward"]
            if own is not None:
                root.__dict__["forward"] = own

    loss = sandbox.evaluate(traced, batch, parameters, stream=stream)
    (tracer,) = tracers
    missing = _missing(module, parameters, tracer)
    if not tracer.layers:
        raise NoLayerError(
            "Expected a loss that runs through a Linear or convolution layer with a trainable weight, got none"
            f"{''.join(f'; {name}: {why}' for name, why in missing.items())}."
        )
    return Capture(tuple(tracer.layers), tuple(tracer.loss_calls), tracer.output, loss, missing)


def _measured(module: nn.Module, parameters: Mapping[Tensor, Tensor]) -> dict[int, str]:
    used = {id(stand_in) for stand_in in parameters.values()}
    return {id(p): name for name, p in layer_names(module).items() if id(p) in used}


def _owner(name: str) -> str:
    """Return the name of the layer that a parameter is the weight of."""
    name = ".".join(part for part in name.split(".") if part not in _WRAPPERS).partition(".parametrizations.")[0]
    owner, _, last = name.rpartition(".")
    return owner if owner and last in _WEIGHTS else name


def _missing(module: nn.Module, parameters: Mapping[Tensor, Tensor], tracer: Tracer) -> dict[str, str]:
    """Return why layers were not seen; to be called while the stand-ins are in their places."""
    seen = {call.name for call in tracer.layers}
    measured = set(_measured(module, parameters).values())
    hidden: dict[int, str] = {}
    for m in module.modules():
        for kind, reason in _HIDDEN.items():
            if isinstance(m, kind):
                hidden |= {id(p): reason for p in m.parameters()}
    missing = {}
    for name, p in layer_names(module).items():
        uses = ", ".join(sorted(tracer.uses.get(name, ())))
        if name in seen:
            continue
        if name not in measured:
            missing[name] = "frozen, or not among the parameters that are measured"
        elif name in tracer.graphless:
            missing[name] = WITHOUT_A_GRAPH
        elif id(p) in hidden:
            missing[name] = hidden[id(p)]
        elif uses:
            missing[name] = f"its weight goes into {uses}, not into a linear or convolution call"
        else:
            missing[name] = "not used in this batch"
    return missing
