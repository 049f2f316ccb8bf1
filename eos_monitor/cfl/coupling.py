"""What lies between a layer and the loss, read from the autograd graph and its gradients.

The cheap tier leaves out D, the curvature of what comes behind the next layers. Where nothing there is curved, D = 0;
where samples are coupled there, or two quantities that both depend on the layer are multiplied, D can be most of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from eos_monitor.cfl.calls import LayerCall

Form = Literal["exact-form", "approximate", "weak"]

# Linear or piecewise linear in the tensors that carry the gradient.
_STRAIGHT = (
    "Add", "Sub", "Neg", "Sum", "Mean", "Cumsum", "View", "UnsafeView", "Reshape", "Permute", "Transpose", "T",
    "Expand", "Repeat", "Squeeze", "Unsqueeze", "Cat", "Stack", "Split", "SplitWithSizes", "Chunk", "Unbind", "Select",
    "Slice", "Index", "IndexSelect", "Gather", "Narrow", "AsStrided", "Alias", "Clone", "Copy", "CopySlices", "ToCopy",
    "Flip", "Roll", "ConstantPadNd", "ReflectionPad", "ReplicationPad", "Relu", "LeakyRelu", "Prelu", "PreluKernel",
    "Rrelu", "Threshold", "Hardtanh", "Abs", "Max", "Min", "Amax", "Maximum", "Minimum", "MaxPool", "AvgPool",
    "AdaptiveAvgPool", "AdaptiveMaxPool", "Upsample", "NativeDropout", "Where", "MaskedFill", "Convolution", "Addmm",
    "Mm", "Mv", "Bmm", "Baddbmm", "Mul", "Div", "AccumulateGrad", "MkldnnConvolution", "CudnnConvolution",
    "PixelShuffle",
)  # fmt: skip
_LEAK = 1e-6  # of a gradient that is where none should be; batched kernels leave exact zeros
_PRODUCTS = ("Mul", "Bmm", "Mm", "Mv", "Baddbmm", "Addmm", "Convolution", "Div", "Prelu", "PreluKernel", "Where")
_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeLayerNorm", "NativeGroupNorm", "FusedRmsNorm")


@dataclass(frozen=True)
class Surroundings:
    """What the autograd graph says of one layer.

    Attributes:
        form: ``"exact-form"`` if nothing curved lies between the next layers and the loss, ``"weak"`` if something
            there is known to make the cheap tier miss most of it, else ``"approximate"``.
        reason: Why, in words.
        curved: Nodes with curvature between the layer and the next ones.
    """

    form: Form
    reason: str
    curved: frozenset[Any]


def surroundings(root: Any, layers: Mapping[str, Sequence[Any]]) -> dict[str, Surroundings]:
    """Classify layers by the operations behind them.

    Args:
        root: Node of the tensor that the loss is a function of.
        layers: Name -> nodes of the layer's outputs, one for each use.
    """
    walk = _Walk(root, layers)
    walk.run()
    return {name: walk.surroundings(i, len(nodes)) for i, (name, nodes) in enumerate(layers.items())}


def reaches_around(start: Any, out: Any, layers: Sequence[Any]) -> bool:
    """Whether the graph behind ``start`` has a layer that is not behind ``out``: the loss sees more than ``out``."""
    seen = {out}
    stack = [start]
    wanted = set(layers)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        if node in wanted:
            return True
        seen.add(node)
        stack += _inputs(node)
    return False


def coupled_layers(edge: GradientEdge, v: Tensor, calls: Sequence[LayerCall], samples: int) -> frozenset[str]:
    """Return the layers in which the outputs of every other sample depend on the rest.

    Args:
        edge: Where the net's output is in the graph, which is kept.
        v: Vector of the output's shape, anything but zero in most samples.
        calls: Calls of the layers.
        samples: Samples in the batch.
    """
    if v.numel() % samples or v.shape[0] % samples:
        return frozenset(call.name for call in calls)
    half = v.reshape(samples, -1).clone()
    half[1::2] = 0.0
    ends = [call.normalized_edge for call in calls]
    found = torch.autograd.grad([edge], ends, [half.view_as(v)], retain_graph=True, allow_unused=True)
    coupled = set()
    for call, g in zip(calls, found, strict=True):
        if g is not None:
            rows = g.reshape(samples, -1).abs().amax(1)
            if float(rows[1::2].sum()) > _LEAK * float(rows.sum()):
                coupled.add(call.name)
    return frozenset(coupled)


class _Walk:
    """One pass over the graph; sets of layers are the bits of integers."""

    def __init__(self, root: Any, layers: Mapping[str, Sequence[Any]]) -> None:
        self._root = root
        self._starts: dict[Any, int] = {}
        for i, nodes in enumerate(layers.values()):
            for node in nodes:
                self._starts[node] = self._starts.get(node, 0) | 1 << i
        self._reasons: dict[int, str] = {}
        self._far = 0  # layers with something curved behind the next layers
        self._near: list[tuple[Any, int]] = []  # curved nodes, and the layers that reach them directly

    def run(self) -> None:
        """Classify every node by the layers whose outputs reach it, directly and through another layer."""
        own: dict[Any, int] = {}
        later: dict[Any, int] = {}
        for node in _inputs_first(self._root):
            parents = _inputs(node)
            direct = _union(own[p] for p in parents)
            through = _union(later[p] for p in parents)
            self._classify(node, direct, through, _twice(own[p] | later[p] for p in parents))
            start = self._starts.get(node)
            own[node] = direct if start is None else start
            later[node] = through if start is None else direct | through

    def surroundings(self, i: int, uses: int) -> Surroundings:
        """Return what was found of layer ``i``."""
        curved = frozenset(node for node, bits in self._near if bits >> i & 1)
        if uses > 1:
            return Surroundings("weak", f"its weight is used {uses} times", curved)
        if i in self._reasons:
            return Surroundings("weak", self._reasons[i], curved)
        if self._far >> i & 1:
            return Surroundings("approximate", "curvature behind the next layers is left out", curved)
        return Surroundings("exact-form", "nothing curved behind the next layers", curved)

    def _classify(self, node: Any, direct: int, through: int, both: int) -> None:
        kind = _kind(node)
        norm = _is(kind, _NORMS)
        if norm and getattr(node, "_saved_training", True):
            curved = direct | through
            if "BatchNorm" in kind:
                self._note(through, "batch statistics behind the next layer")
            elif through & ~direct:
                self._note(through & ~direct & ~self._bypassing(node), "a normalisation behind the next layer")
        elif _is(kind, _PRODUCTS):
            curved = both
            if both & through:
                coupled = both & through
                # A product in a branch (attention on a residual stream) is only part of what there is.
                coupled &= -1 if kind == "Mul" else ~self._bypassing(node)
                self._note(coupled, "a product of two computed tensors behind the next layer")
        else:
            curved = 0 if norm or _is(kind, _STRAIGHT) else direct | through
        self._far |= curved & through
        if curved & direct:
            self._near.append((node, curved & direct))

    def _note(self, bits: int, reason: str) -> None:
        for i in range(bits.bit_length()):
            if bits >> i & 1:
                self._reasons.setdefault(i, reason)

    def _bypassing(self, without: Any) -> int:
        """Return the layers with a path to the root that avoids a node."""
        seen = {without}
        stack = [self._root]
        found = 0
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            found |= self._starts.get(node, 0)
            stack += _inputs(node)
        return found


def _inputs(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _inputs_first(root: Any) -> list[Any]:
    """Return the nodes behind ``root``, each after those that it takes its inputs from."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(parent, False) for parent in _inputs(node)]
    return order


def _kind(node: Any) -> str:
    return str(node.name()).rpartition("::")[2].partition("Backward")[0]


def _is(kind: str, names: Sequence[str]) -> bool:
    # "MaxPool2DWithIndices" is one of "MaxPool".
    return kind in names or any(kind.startswith(name) and len(name) > 6 for name in names)


def _union(masks: Iterable[int]) -> int:
    total = 0
    for mask in masks:
        total |= mask
    return total


def _twice(masks: Iterable[int]) -> int:
    once = 0
    again = 0
    for mask in masks:
        again |= once & mask
        once |= mask
    return again
