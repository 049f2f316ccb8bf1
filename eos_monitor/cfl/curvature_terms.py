"""The terms T and GN of every layer's curvature, from one or two evaluations of the loss a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from eos_monitor.cfl.activation_term import SecondDerivatives, activation_terms
from eos_monitor.cfl.calls import Capture, LayerCall
from eos_monitor.cfl.coupling import Surroundings, coupled_layers, surroundings
from eos_monitor.cfl.cut_graph import cut_graph_segments
from eos_monitor.cfl.gauss_newton import NotSeparableError, output_probes, probe_gradients
from eos_monitor.cfl.layer_curvature import CallTerms, LayerCurvature
from eos_monitor.cfl.linear_maps import BatchNormJacobian, WeightMap
from eos_monitor.cfl.loss_input import LossInput, loss_input
from eos_monitor.cfl.objective import Objective
from eos_monitor.cfl.paper_bound import PaperBound, activation_gradients, paper_bound
from eos_monitor.cfl.regimes import RegimeCounter
from eos_monitor.isolation.sandbox import check_loss


@dataclass(eq=False)
class CurvatureTerms:
    """T + GN of a net's layers, and what was seen of them on the way.

    Attributes:
        layers: Name -> T + GN of the layer.
        not_attributed: Name -> why there is none.
        regimes: Name -> counts of entries that are not activated, transitioning, activated, ``(3,)``.
        bounds: Name -> the papers' bound, where it was asked for and there is an activation to have one.
        coupled: Names of the layers behind which samples are coupled.
    """

    layers: dict[str, LayerCurvature] = field(default_factory=dict)
    not_attributed: dict[str, str] = field(default_factory=dict)
    regimes: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, PaperBound] = field(default_factory=dict)
    coupled: frozenset[str] = frozenset()


def curvature_terms(
    objective: Objective,
    parameters: Sequence[Tensor],
    *,
    wanted: Callable[[str], bool],
    probes: int,
    generator: torch.Generator,
    bounded: bool = False,
    coupled: frozenset[str] | None = None,
) -> CurvatureTerms:
    """Return T + GN of every wanted layer; to be called inside the entered sandbox.

    Keeps about 3 + ``probes`` activation tensors a layer and batch.

    Args:
        objective: The mean loss.
        parameters: Trained parameters.
        wanted: Whether a layer of a name is wanted.
        probes: Probes of the loss's curvature.
        generator: Source of their signs.
        bounded: Whether the papers' bound is wanted.
        coupled: Names of the layers behind which samples are known to be coupled; None to find out.

    Raises:
        ValueError: If the loss runs through no layer.
        RuntimeError: If the loss is not a finite scalar.
    """
    terms = CurvatureTerms(coupled=coupled or frozenset())
    missing: dict[str, str] = {}
    gradients: dict[str, list[tuple[LayerCall, Tensor]]] = defaultdict(list)
    for i, share in enumerate(objective.shares):
        batch = _evaluated(objective, i, parameters, wanted)
        # The first batch's, because later evaluations in a sandbox cannot tell why a layer is not among them.
        missing = batch.missing | missing
        for name, counts in batch.regimes.items():
            terms.regimes[name] = terms.regimes.get(name, 0) + counts
        if not batch.layers:
            continue  # all that are wanted are among the missing
        try:
            out = loss_input(batch.captured)
            vectors = output_probes(batch.loss, out.edge, out.values, probes, generator)
        except NotSeparableError as error:
            missing = dict.fromkeys(batch.layers, str(error)) | missing
            continue
        around = surroundings(out.edge.node, batch.nodes)
        found = _call_terms(objective, i, parameters, batch, out, vectors, around)
        if coupled is None:
            terms.coupled |= coupled_layers(out.edge, vectors[0], batch.calls, batch.samples)
        for name, calls in found.items():
            if name not in terms.layers:
                known = _warned(around[name], name in terms.coupled)
                terms.layers[name] = LayerCurvature(name, batch.layers[name][0].parameter, known)
            terms.layers[name].add(share, calls)
        for call, gradient in activation_gradients(batch.loss, batch.calls) if bounded else ():
            gradients[call.name].append((call, share * gradient))
    terms.bounds = _bounds(gradients)
    # A layer that some batches do not use has no curvature from them.
    terms.not_attributed = {name: why for name, why in missing.items() if name not in terms.layers}
    return terms


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """One batch, evaluated once.

    Attributes:
        captured: What the loss went through.
        loss: The loss as a scalar.
        samples: Samples in the batch.
        layers: Name of each wanted layer that can be attributed -> its calls.
        second: Number of the call -> r″ of its pre-activation.
        regimes: Name of each wanted layer -> counts of its regimes.
        missing: Name of the other wanted layers -> why they cannot be attributed.
    """

    captured: Capture
    loss: Tensor
    samples: int
    layers: dict[str, list[LayerCall]]
    second: dict[int, Tensor]
    regimes: dict[str, Tensor]
    missing: dict[str, str]

    @property
    def calls(self) -> list[LayerCall]:
        return list(chain.from_iterable(self.layers.values()))

    @property
    def nodes(self) -> dict[str, list[Any]]:
        """Name of every layer, wanted or not -> nodes of its outputs."""
        nodes: dict[str, list[Any]] = defaultdict(list)
        for call in self.captured.layers:
            nodes[call.name].append(call.output_edge.node)
        return nodes


def _evaluated(
    objective: Objective, i: int, parameters: Sequence[Tensor], wanted: Callable[[str], bool]
) -> _Evaluation:
    counter = RegimeCounter()
    second = SecondDerivatives()
    captured = objective.capture(i, {p: p.detach().requires_grad_() for p in parameters}, (counter, second))
    loss = check_loss(captured.loss)
    samples = objective.samples[i]
    missing = {name: why for name, why in captured.not_attributed.items() if wanted(name)}
    layers: dict[str, list[LayerCall]] = defaultdict(list)
    for call in captured.layers:
        if not wanted(call.name):
            continue
        if call.shape[0] % samples or len(call.shape) < 2:
            missing[call.name] = "the first axis of its output is not the samples'"
        elif call.name not in missing:
            layers[call.name].append(call)
    regimes = {name: counts for name, counts in counter.counts(captured).items() if wanted(name)}
    return _Evaluation(captured, loss, samples, layers, second.by_call, regimes, missing)


def _call_terms(
    objective: Objective,
    i: int,
    parameters: Sequence[Tensor],
    batch: _Evaluation,
    out: LossInput,
    probes: Sequence[Tensor],
    around: Mapping[str, Surroundings],
) -> dict[str, list[CallTerms]]:
    """Return the terms of every call by the name of the layer."""
    activation = activation_terms(batch.loss, batch.layers.values(), around, batch.second)
    gradients = probe_gradients(out.edge, probes, batch.calls, batch.samples)
    needed = {call.index for call in batch.calls if call.index not in activation and around[call.name].curved}
    segments = cut_graph_segments(objective, i, parameters, batch.captured, out, needed) if needed else {}
    terms: dict[str, list[CallTerms]] = defaultdict(list)
    for call, g in zip(batch.calls, gradients, strict=True):
        weight_map = WeightMap(call)
        jacobian = BatchNormJacobian.behind(call, weight_map)
        found = CallTerms(weight_map, g, call.shape, jacobian, activation.get(call.index), segments.get(call.index))
        terms[call.name].append(found)
    return terms


def _bounds(gradients: Mapping[str, Sequence[tuple[LayerCall, Tensor]]]) -> dict[str, PaperBound]:
    """Return the papers' bounds, from the gradients behind the activations of each layer's calls."""
    bounds = {}
    for name, pairs in gradients.items():
        calls, behind = zip(*pairs, strict=True)
        if calls[0].activation is not None:
            bounds[name] = paper_bound(calls, behind, calls[0].activation.activation)
    return bounds


def _warned(found: Surroundings, coupled: bool) -> Surroundings:
    """Call a layer weak whose samples meet before the loss (batch statistics have been noticed already)."""
    if not coupled or found.form == "weak":
        return found
    return replace(found, form="weak", reason="samples are coupled between it and the loss")
