"""Following tensors from a layer's output to its activation, function call by function call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from eos_monitor.cfl.activations import Activation, is_activation, read_activation
from eos_monitor.cfl.calls import LAYER_FUNCTIONS, ActivationCall, BatchNormCall, LayerCall, LossCall, Observer
from eos_monitor.cfl.chains import ARITHMETIC, FOLLOWERS, Chain, extend
from eos_monitor.cfl.traces import Application, Outcome, Passage, Trace
from eos_monitor.isolation.sandbox import preserve_rng

_LOSSES = ("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "mse_loss")
_DROPOUTS = ("dropout", "alpha_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d")
# Functions that may stand between a layer and its activation -> what the path calls them; those with an empty name
# change neither values nor shape.
_BETWEEN = {
    **dict.fromkeys(("contiguous", "clone", "alias"), ""),
    **dict.fromkeys(("to", "type", "float", "double", "half", "bfloat16", "type_as"), "cast"),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "permute", "transpose", "T", "mT", "t"), "reshape"),
    **dict.fromkeys(("movedim", "swapaxes", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel"), "reshape"),
    **dict.fromkeys(("moveaxis", "swapdims", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), "reshape"),
    **dict.fromkeys(("getitem", "chunk", "split", "tensor_split", "unbind", "narrow", "select"), "slice"),
    **dict.fromkeys(_DROPOUTS, "dropout"),
    **{name: name for name in ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")},
    **dict.fromkeys(("add", "sub", "rsub"), "add"),
    **dict.fromkeys(("mul", "div", "neg"), "scale"),
    **{f"{kind}_pool{d}d": "pool" for d in (1, 2, 3) for kind in ("max", "avg", "adaptive_max", "adaptive_avg")},
    **dict.fromkeys(("interpolate", "upsample"), "interpolate"),
    "pad": "pad",
}
_SYNONYMS = {"multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div"}
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


class Tracer(TorchFunctionMode):
    """Function mode that records layer calls, what follows them, and calls of loss functions, while it is entered.

    Args:
        names: Id of a weight as it is used -> name of its layer.
        parameters: Live parameter -> tensor that is used for it.
        observers: Told of each pre-activation while it is there.
        previous: Live parameter -> its value before the last update.
        graph: Whether a layer without a graph is left out.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        parameters: Mapping[Tensor, Tensor],
        observers: Sequence[Observer],
        previous: Mapping[Tensor, Tensor] | None,
        *,
        graph: bool,
    ) -> None:
        super().__init__()
        self.loss_calls: list[LossCall] = []
        self.output: Tensor | None = None
        self.uses: dict[str, set[str]] = {}  # layer -> other functions that its weight went into
        self.graphless: set[str] = set()
        self._names = names
        self._observers = observers
        self._previous = previous
        self._live = {id(stand_in): live for live, stand_in in parameters.items()}
        self._calls: list[LayerCall] = []
        self._outcomes: list[Outcome] = []
        self._traces: Any = WeakTensorKeyDictionary()  # None of a tensor made of parameters and data alone
        self._number = 0
        self._graph = graph

    def returned(self, value: Any) -> Any:
        """Note what the root's forward returns."""
        self.output = value if isinstance(value, Tensor) else None
        for t in _tensors(value):
            if (trace := self._trace(t)) is not None:
                self._traces[t] = Trace(trace.passages)  # what the loss makes of it is no part of the activation
        return value

    @property
    def layers(self) -> list[LayerCall]:
        """The layer calls, with what followed them."""
        return [
            replace(
                call,
                activation=outcome.activation,
                batch_norm=outcome.batch_norm,
                reason=outcome.reason,
            )
            for call, outcome in zip(self._calls, self._outcomes, strict=True)
        ]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _function_name(func)
        given = _arguments(name, args, kwargs)
        if given is not None and id(given["weight"]) in self._names:
            return self._layer(name, func, args, kwargs, given)
        inputs = list(_tensors((args, kwargs)))
        traces = {id(t): trace for t in inputs if (trace := self._trace(t)) is not None}
        z = args[0] if args else kwargs.get("input")
        chain = self._chain(name, func, args, kwargs, traces)
        # All that looks at values comes first: the function may overwrite them.
        application = self._application(name, z, args[1:], kwargs, traces, chain)
        befores = self._befores(name, func, args, kwargs, traces)
        out = func(*args, **kwargs)
        outputs = [z] if name == "setitem" else list(_tensors(out))
        if not outputs:
            return out
        for t in inputs:
            if id(t) in self._names:
                self.uses.setdefault(self._names[id(t)], set()).add(name)
        if not traces:
            for o in outputs:
                self._traces[o] = None
            return out
        if application is not None:
            chain = self._settle(application, outputs[0], chain)
        if func is F.batch_norm:
            self._note_batch_norm(args, kwargs, traces.get(id(z)), outputs[0])
        label = _between(name, args, kwargs, traces) if application is None else None
        passed = label is not None or application is not None
        for t in inputs:
            self._consume(t, traces.get(id(t)), name, passed=passed, chained=chain is not None)
        # A function in place has written over what it would be a function of.
        chain = None if chain is not None and any(o is chain.source for o in outputs) else chain
        for k, o in enumerate(outputs):
            passages: tuple[Passage, ...] = ()
            if label is not None:
                passages = _passages(traces, label, {index: made[k] for index, made in befores.items()})
            self._traces[o] = Trace(passages, chain)
        if name in _LOSSES:
            self.loss_calls.append(LossCall(name, z, _edge(z), outputs[0]))
        return out

    def _layer(self, name: str, func: Any, args: Any, kwargs: Any, given: Mapping[str, Any]) -> Tensor:
        x = given["input"]
        weight = given["weight"]
        bias = given.get("bias")
        for t in (x, bias):
            if isinstance(t, Tensor):
                self._consume(t, self._trace(t), name, passed=False, chained=False)
        z: Tensor = func(*args, **kwargs)
        layer = self._names[id(weight)]
        if self._graph and not z.requires_grad:
            self.graphless.add(layer)
            return z
        options = {key: given[key] for key in LAYER_FUNCTIONS[name] if key in given}
        call = LayerCall(
            layer,
            len(self._calls),
            name,
            options,
            x,
            weight,
            bias,
            self._live[id(weight)],
            _edge(z),
            z.shape,
            z.dtype,
        )
        self._calls.append(call)
        self._outcomes.append(Outcome())
        self._traces[z] = Trace((Passage(call.index, (), self._before(call)),))
        return z

    def _before(self, call: LayerCall) -> Tensor | None:
        """Return the layer's output with its previous weight and bias."""
        if self._previous is None:
            return None

        def old(t: Tensor) -> Tensor:
            live = self._live.get(id(t))
            value = t if live is None or self._previous is None else self._previous.get(live, t)
            return value.detach().to(t)

        with torch.no_grad():
            return call.apply(old(call.weight), None if call.bias is None else old(call.bias))

    def _trace(self, t: Tensor) -> Trace | None:
        # One that was not seen before has been computed out of sight, by an autograd.Function.
        trace: Trace | None = self._traces.get(t, None if t.grad_fn is None else Trace())
        return trace

    def _chain(self, name: str, func: Any, args: Any, kwargs: Any, traces: Mapping[int, Trace]) -> Chain | None:
        """Return the result as an elementwise function of one tensor, if it is one."""
        if not (is_activation(name) or name in FOLLOWERS or name in ARITHMETIC):
            return None
        chains = {id(t): traces[id(t)].chain or Chain.identity(t) for t in _tensors((args, kwargs)) if id(t) in traces}
        return extend(name, func, args, kwargs, chains) if chains else None

    def _application(
        self, name: str, z: Any, args: Any, kwargs: Any, traces: Mapping[int, Trace], chain: Chain | None
    ) -> Application | None:
        """Tell the observers if an activation is about to run on the outputs of layers."""
        if chain is None:
            return None
        if chain.composed:
            source = self._trace(chain.source)
            passages = source.passages if source else ()
            value = chain.source
            activation: Activation | None = chain.activation()
        elif is_activation(name) and id(z) in traces:
            passages = traces[id(z)].passages
            value = z
            activation = read_activation(name, args, kwargs)
        else:
            return None
        instead_of = chain.applied if chain.composed else frozenset()
        passages = tuple(p for p in passages if self._outcomes[p.index].admits(p.via, instead_of))
        obstacle = _obstacle(name, activation, chain) if passages else ""
        if activation is not None and not obstacle:
            with torch.no_grad():
                for p in passages:
                    for observer in self._observers:
                        observer(self._calls[p.index], activation, value, p.before)
        return Application(passages, activation, instead_of, obstacle)

    def _settle(self, application: Application, out: Tensor, chain: Chain | None) -> Chain | None:
        self._number += 1
        for p in application.passages:
            outcome = self._outcomes[p.index]
            outcome.obstacle = application.obstacle or ("" if application.instead_of else outcome.obstacle)
            if application.activation is not None:
                call = ActivationCall(application.activation, p.via, _edge(out), out.shape)
                outcome.add(self._number, call, application.instead_of)
        return None if chain is None else replace(chain, applied=chain.applied | {self._number})

    def _consume(self, t: Tensor, trace: Trace | None, name: str, *, passed: bool, chained: bool) -> None:
        """Note that a function that leads no further took a tensor."""
        if trace is None:
            return
        if not passed:
            for p in trace.passages:
                self._outcomes[p.index].ends.append(name)
        if trace.chain is not None and not chained:
            self._traces[t] = Trace(trace.passages)  # the chain keeps its source alive

    def _befores(
        self, name: str, func: Any, args: Any, kwargs: Any, traces: Mapping[int, Trace]
    ) -> dict[int, list[Tensor]]:
        """Run a function that lies between once more for each layer, on what was there before the last update."""
        if self._previous is None or name not in _BETWEEN:
            return {}
        old: dict[int, dict[int, Tensor]] = {}  # call -> operand -> what it was
        for operand, trace in traces.items():
            for p in trace.passages:
                if p.before is not None:
                    old.setdefault(p.index, {})[operand] = p.before
        found = {}
        for index, operands in old.items():
            # The same dropout mask as in the call itself; copies, as it may write to its arguments.
            with preserve_rng(), torch.no_grad():
                replay = _replaced((args, kwargs), operands)
                found[index] = list(_tensors(func(*replay[0], **replay[1])))
        return found

    def _note_batch_norm(self, args: Any, kwargs: Any, trace: Trace | None, out: Tensor) -> None:
        given = dict(zip(_BATCH_NORM, args, strict=False)) | kwargs
        for p in trace.passages if trace is not None and given.get("training") else ():
            if p.via == ():
                note = BatchNormCall(given.get("weight"), given.get("eps", 1e-5), _edge(out))
                self._outcomes[p.index].batch_norm = note


def _passages(traces: Mapping[int, Trace], label: str, before: Mapping[int, Tensor]) -> tuple[Passage, ...]:
    """Return the layers' outputs that operands hold, after a function that the path calls ``label``."""
    found: dict[int, Passage] = {}
    for trace in traces.values():
        for p in trace.passages:
            found.setdefault(p.index, Passage(p.index, (*p.via, label) if label else p.via, before.get(p.index)))
    return tuple(found.values())


def _obstacle(name: str, activation: Activation | None, chain: Chain) -> str:
    """Return why the regimes of an activation cannot be told, or nothing."""
    if activation is None:
        return f"the regimes of this {name} cannot be told"
    if chain.composed and chain.source._version != chain.version:
        return f"its activation ends in {name}, when the values it began with are overwritten"
    try:
        _ = activation.partition
    except ValueError as error:
        return f"the regimes of its activation cannot be told ({error})"
    return ""


def _arguments(name: str, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of a layer's function by name; None for other functions."""
    if name not in LAYER_FUNCTIONS:
        return None
    given = dict(zip(("input", "weight", "bias", *LAYER_FUNCTIONS[name]), args, strict=False)) | dict(kwargs)
    return given if "weight" in given else None


def _between(name: str, args: Any, kwargs: Mapping[str, Any], traces: Mapping[int, Trace]) -> str | None:
    """Return what a path through a function calls it; None if no path leads through it."""
    if name in ("mul", "div"):
        computed = [t for t in _tensors((args, kwargs)) if id(t) in traces]
        # A gate; a reciprocal is none of a layer's output either.
        if len(computed) > 1 or (name == "div" and computed[0] is not args[0]):
            return None
    if name in _DROPOUTS:
        given = dict(zip(("input", "p", "training"), args, strict=False)) | dict(kwargs)
        if not given.get("training", True) or given.get("p", 0.5) == 0.0:
            return ""
    return _BETWEEN.get(name)


def _function_name(func: Any) -> str:
    """Return the name that a function, its method, its form in place and its operator have in common."""
    name: str = getattr(func, "__name__", "")
    if name == "__get__":  # of an attribute of tensors, such as T
        name = getattr(func.__self__, "__name__", "")
    name = name.partition(".")[0].strip("_")
    return _SYNONYMS.get(name, name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _replaced(value: Any, instead: Mapping[int, Tensor]) -> Any:
    """Copy arguments, with other tensors in the place of some, by their ids."""
    if isinstance(value, Tensor):
        return instead.get(id(value), value).detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, instead) for item in value)
    if isinstance(value, dict):
        return {key: _replaced(item, instead) for key, item in value.items()}
    return value


def _edge(t: Tensor) -> GradientEdge | None:
    return get_gradient_edge(t) if t.requires_grad else None
