"""Taking a net apart: T + GN of every layer, from one or two evaluations of the loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from eos_monitor.cfl.activations import Activation
from eos_monitor.cfl.capture import Capture, LayerCall, Observer, capture
from eos_monitor.cfl.coupling import Surroundings, reaches_around, surroundings
from eos_monitor.cfl.cut_graph import CutMode
from eos_monitor.cfl.gauss_newton import NotSeparableError, output_probes
from eos_monitor.cfl.layer_pieces import BatchStatistics, LayerPieces, Use
from eos_monitor.cfl.linear_maps import WeightMap
from eos_monitor.cfl.paper_bound import PaperBound, paper_bound
from eos_monitor.cfl.regimes import RegimeCounter, row_slices
from eos_monitor.isolation.sandbox import LossFn, Sandbox

_LAST = "last layer"
_LEAK = 1e-6  # of a gradient that is where none should be; batched kernels leave exact zeros


@dataclass(eq=False)
class Pieces:
    """The layers of a net, taken apart.

    Attributes:
        layers: Name -> T + GN of the layer.
        not_attributed: Name -> why there is none.
        regimes: Name -> counts of entries that are not activated, transitioning, activated, ``(3,)``.
        bounds: Name -> the papers' bound, where it was asked for and there is an activation to have one.
        coupled: Names of the layers behind which samples are coupled.
    """

    layers: dict[str, LayerPieces] = field(default_factory=dict)
    not_attributed: dict[str, str] = field(default_factory=dict)
    regimes: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, PaperBound] = field(default_factory=dict)
    coupled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Request:
    """What is to be taken apart, and how.

    Attributes:
        loss_fn: ``loss_fn(module, batch)`` -> mean loss.
        parameters: Trained parameters.
        wanted: Whether a layer of a name is wanted.
        probes: Probes of the loss's curvature.
        generator: Source of their signs.
        paper_bound: Whether the papers' bound is wanted.
        coupled: Names of the layers behind which samples are known to be coupled; None to find out.
    """

    loss_fn: LossFn
    parameters: Sequence[Tensor]
    wanted: Callable[[str], bool]
    probes: int
    generator: torch.Generator
    paper_bound: bool = False
    coupled: frozenset[str] | None = None


def take_apart(
    sandbox: Sandbox, module: nn.Module, batches: Sequence[Any], samples: Sequence[int], request: Request
) -> Pieces:
    """Take every wanted layer apart; to be called inside the entered sandbox.

    Keeps about 3 + ``probes`` activation tensors a layer and batch.

    Raises:
        ValueError: If the loss runs through no layer.
        RuntimeError: If the loss is not a finite scalar.
    """
    pieces, missing = Pieces(), dict[str, str]()
    bounded: dict[str, list[tuple[LayerCall, Tensor]]] = defaultdict(list)
    for i, (batch, size) in enumerate(zip(batches, samples, strict=True)):
        share = size / sum(samples)
        part = _Pass(sandbox, module, batch, i, size, request)
        pieces.coupled |= part.coupled
        # The first batch's, because later evaluations in a sandbox cannot tell why a layer is not among them.
        missing = {name: why for name, why in part.missing.items() if request.wanted(name)} | missing
        for name, uses in part.uses.items():
            if name not in pieces.layers:
                parameter = part.calls[name][0].parameter
                pieces.layers[name] = LayerPieces(
                    name, parameter, _warned(part.surroundings[name], name in part.coupled)
                )
            pieces.layers[name].add(share, uses)
        for name, counts in part.regimes.items():
            pieces.regimes[name] = pieces.regimes.get(name, 0) + counts
        for call, gradient in part.behind_activations:
            bounded[call.name].append((call, share * gradient))
    for name, pairs in bounded.items():
        calls, gradients = zip(*pairs, strict=True)
        if calls[0].activation is not None:
            pieces.bounds[name] = paper_bound(calls, gradients, calls[0].activation.activation)
    # A layer that some batches do not use has no curvature from them.
    pieces.not_attributed = {name: why for name, why in missing.items() if name not in pieces.layers}
    return pieces


def _warned(found: Surroundings, coupled: bool) -> Surroundings:
    """Call a layer weak whose samples meet before the loss (batch statistics have been noticed already)."""
    if not coupled or found.form == "weak":
        return found
    return replace(found, form="weak", reason="samples are coupled between it and the loss")


class _Pass:
    """One batch: evaluated, and where needed evaluated again with the graph cut."""

    def __init__(
        self, sandbox: Sandbox, module: nn.Module, batch: Any, stream: int, size: int, request: Request
    ) -> None:
        self._size, self._parameters = size, request.parameters

        def evaluate(stand_ins: Mapping[Tensor, Tensor], observers: Sequence[Observer]) -> Capture:
            return capture(
                sandbox, module, request.loss_fn, batch, parameters=stand_ins, stream=stream, observers=observers
            )

        self._evaluate = evaluate
        second: dict[int, Tensor] = {}

        def watch(call: LayerCall, activation: Activation, z: Tensor, before: Tensor | None) -> None:
            second.pop(call.index, None)
            if not activation.piecewise_linear:
                second[call.index] = torch.cat([activation.second_derivative(z[i]) for i in row_slices(activation, z)])

        counter = RegimeCounter()
        seen = evaluate({p: p.detach().requires_grad_() for p in request.parameters}, (counter, watch))
        loss = _checked(seen.loss)
        self.missing = dict(seen.not_attributed)
        self.regimes = {name: n for name, n in counter.counts(seen).items() if request.wanted(name)}
        self.uses: dict[str, list[Use]] = {}
        self.calls: dict[str, list[LayerCall]] = defaultdict(list)
        self.behind_activations: list[tuple[LayerCall, Tensor]] = []
        self.coupled = request.coupled or frozenset()
        for call in seen.layers:
            if request.wanted(call.name):
                self._admit(call)
        try:
            which, edge, out = _output(seen)
            vectors = output_probes(loss, edge, out, request.probes, request.generator)
        except NotSeparableError as error:
            self.missing |= dict.fromkeys(self.calls, str(error))
            return
        nodes: dict[str, list[Any]] = defaultdict(list)
        for call in seen.layers:
            nodes[call.name].append(_edge(call).node)
        self.surroundings = surroundings(edge.node, nodes)
        bends = self._bends(loss, second)
        self._build(edge, vectors, bends)
        if request.coupled is None:
            self.coupled = self._find_coupled(edge, vectors[0])
        if request.paper_bound:
            self._note_gradients(loss)
        needed = {call.index: use for call, use in self._pairs() if use.bend is None and self._curved(call)}
        if needed:
            self._cut(seen, loss, which, edge, needed)

    def _admit(self, call: LayerCall) -> None:
        if call.shape[0] % self._size or len(call.shape) < 2:
            self.missing[call.name] = "the first axis of its output is not the samples'"
        elif call.name not in self.missing:
            self.calls[call.name].append(call)

    def _curved(self, call: LayerCall) -> bool:
        return bool(self.surroundings[call.name].curved)

    def _pairs(self) -> list[tuple[LayerCall, Use]]:
        return [pair for name, uses in self.uses.items() for pair in zip(self.calls[name], uses, strict=True)]

    def _find_coupled(self, edge: GradientEdge, v: Tensor) -> frozenset[str]:
        """Return the layers in which the outputs of every other sample depend on the rest."""
        if v.numel() % self._size or v.shape[0] % self._size:
            return frozenset(self.calls)
        half = v.reshape(self._size, -1).clone()
        half[1::2] = 0.0
        calls = [call for calls in self.calls.values() for call in calls]
        ends = [_end(call) for call in calls]
        found = torch.autograd.grad([edge], ends, [half.view_as(v)], retain_graph=True, allow_unused=True)
        rows = {
            call: g.reshape(self._size, -1).abs().amax(1) for call, g in zip(calls, found, strict=True) if g is not None
        }
        return frozenset(call.name for call, row in rows.items() if float(row[1::2].sum()) > _LEAK * float(row.sum()))

    def _note_gradients(self, loss: Tensor) -> None:
        """Keep the gradients behind activations, for the papers' bound."""
        follow = [(call, call.activation) for calls in self.calls.values() for call in calls if call.activation]
        edges = [activation.edge for _, activation in follow if activation.edge is not None]
        found = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        self.behind_activations = [(call, g) for (call, _), g in zip(follow, found, strict=True) if g is not None]

    def _bends(self, loss: Tensor, second: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return r″ ∂L/∂h of the calls whose own activation is the only curved thing before the next layers."""
        plain: dict[int, GradientEdge] = {}
        for name, calls in self.calls.items():
            follow = {call.index: call.activation for call in calls if call.activation and not call.activation.via}
            edges = {index: activation.edge for index, activation in follow.items() if activation.edge is not None}
            curved = self.surroundings[name].curved
            if curved and len(edges) == len(calls) and curved <= {edge.node for edge in edges.values()}:
                plain |= {index: edge for index, edge in edges.items() if index in second}
        if not plain:
            return {}
        gradients = torch.autograd.grad(loss, list(plain.values()), retain_graph=True, allow_unused=True)
        return {i: second[i].mul_(g) for i, g in zip(plain, gradients, strict=True) if g is not None}

    def _build(self, edge: GradientEdge, vectors: Sequence[Tensor], bends: Mapping[int, Tensor]) -> None:
        calls = [call for calls in self.calls.values() for call in calls]
        ends = [_end(call) for call in calls]
        maps = [WeightMap(call) for call in calls]
        probes = [call.weight.new_empty(self._size, len(vectors), call.shape.numel() // self._size) for call in calls]
        for r, v in enumerate(vectors):
            found = torch.autograd.grad([edge], ends, [v], retain_graph=True, allow_unused=True)
            for at_call, g in zip(probes, found, strict=True):
                at_call[:, r] = 0.0 if g is None else g.reshape(self._size, -1)
        for call, weight_map, at_call in zip(calls, maps, probes, strict=True):
            self.uses.setdefault(call.name, []).append(
                Use(
                    weight_map,
                    at_call,
                    call.shape,
                    bends.get(call.index),
                    None if call.batch_norm is None else BatchStatistics.of(call, weight_map),
                )
            )

    def _cut(self, seen: Capture, loss: Tensor, which: str, edge: GradientEdge, needed: Mapping[int, Use]) -> None:
        edges = [edge, *(_edge(call) for call in seen.layers)]
        gradients = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        at_calls = {call.index: g for call, g in zip(seen.layers, gradients[1:], strict=True) if g is not None}
        stand_ins = {p: p.detach() for p in self._parameters}
        with CutMode({id(p) for p in stand_ins.values()}, at_calls) as mode:
            again = self._evaluate(stand_ins, ())
        # The last layer's output is an end already, as every layer's is.
        out = () if which == _LAST else ((_ends_of_loss(again)[which][0], gradients[0]),)
        for index, segment in mode.segments(out, set(needed)).items():
            needed[index].segment = segment


def _output(seen: Capture) -> tuple[str, GradientEdge, Tensor]:
    """Return the tensor that the loss is a function of: which, where it is, its values up to a constant in each row."""
    layers = [_edge(call).node for call in seen.layers]
    last = seen.layers[-1]
    candidates = _ends_of_loss(seen)
    for which, edge in [*((which, edge) for which, (edge, _) in candidates.items()), (_LAST, _edge(last))]:
        if not reaches_around(seen.loss.grad_fn, edge.node, layers):
            # What a layer returned is not kept.
            values = last.apply(last.weight, last.bias) if which == _LAST else candidates[which][1]
            return which, edge, values.detach()
    raise NotSeparableError(
        "the loss is not a function of one output tensor alone; exact=True measures it all the same"
    )


def _ends_of_loss(seen: Capture) -> dict[str, tuple[GradientEdge, Tensor]]:
    """Return what the loss may be a function of: what it was called with, and what the root returned."""
    found: dict[str, tuple[GradientEdge, Tensor]] = {}
    edge = seen.loss_calls[0].edge if len(seen.loss_calls) == 1 else None
    if edge is not None:
        call = seen.loss_calls[0]
        # The curvature of a log-softmax belongs to the loss.
        if call.name == "nll_loss" and edge.node.name().startswith("LogSoftmax"):
            node, number = edge.node.next_functions[0]
            assert node is not None
            edge = GradientEdge(node, number)
        found["loss"] = edge, call.input
    if seen.output is not None and seen.output.requires_grad:
        found["root"] = get_gradient_edge(seen.output), seen.output
    return found


def _edge(call: LayerCall) -> GradientEdge:
    assert call.edge is not None
    return call.edge


def _end(call: LayerCall) -> GradientEdge:
    """Return where the pieces of a layer are taken: behind a batch normalization that follows it."""
    behind = None if call.batch_norm is None else call.batch_norm.edge
    return _edge(call) if behind is None else behind


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise RuntimeError(f"Expected the loss to be a scalar tensor that depends on the parameters, got {loss!r:.80}.")
    if not bool(torch.isfinite(loss.detach())):
        raise RuntimeError(f"Expected a finite loss, got {float(loss.detach())}.")
    return loss.reshape(())
