"""Whether a loss reaches the parameters that are trained: what autograd does not see has no curvature in a reading."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

_NAMED = 3  # parameters that an error names
_SINGLE_ONLY = ("mps",)  # devices on which sums cannot be taken in double precision


def check_paths(loss: Tensor, aliases: Sequence[Tensor], params: Sequence[Tensor], names: Mapping[int, str]) -> None:
    """Refuse a loss that depends on parameters in a way that its graph does not show.

    Two such ways: a function with a backward of its own that closes over parameters instead of taking them as inputs
    (reentrant checkpointing is one), so that the path to them ends in it; and code that holds the parameters themselves
    where the sandbox cannot put stand-ins for them.

    Args:
        loss: The loss, a scalar with a graph.
        aliases: Tensors that stand for the parameters in it.
        params: The parameters.
        names: Their names, by ``id``.

    Raises:
        RuntimeError: If it is one of these.
    """
    if loss.grad_fn is None:
        return
    users, leaves, opaque = _graph(loss.grad_fn)
    live = {id(p) for p in params}
    held = [p for p in map(_variable, leaves) if p is not None and id(p) in live]
    if held:
        raise RuntimeError(
            f"Expected a loss that takes its parameters from the module, got one that holds {len(held)} of them itself "
            f"({_told(held, names)}): their share of the curvature would be "
            "missing. Look them up inside the loss, or hold them in an attribute of the module."
        )
    stand_ins = {id(alias) for alias in aliases}
    reached = {id(_variable(leaf)) for leaf in leaves} & stand_ins
    if len(reached) == len(stand_ins) or not opaque:
        return
    leading = _ancestors([leaf for leaf in leaves if id(_variable(leaf)) in stand_ins], users)
    ends = sorted({node.name() for node in opaque if node not in leading})
    if ends:
        missing = [p for p, alias in zip(params, aliases, strict=True) if id(alias) not in reached]
        raise unreached(missing, len(params), names, f"the path to them ends in {', '.join(ends)}")


def check_parameters(params: Sequence[Tensor]) -> None:
    """Refuse parameters that cannot be differentiated."""
    if not params:
        raise ValueError("Expected at least one trainable parameter, got none.")
    for p in params:
        if not p.is_floating_point():
            raise TypeError(f"Expected real floating-point parameters, got {p.dtype}.")
        if p.device.type in _SINGLE_ONLY:
            raise TypeError(
                f"Expected parameters on a device with double precision, got {p.device.type!r}, which has none. "
                "Measure a copy on the CPU with measure_stability."
            )


def unreached(missing: Sequence[Tensor], total: int, names: Mapping[int, str], why: str) -> RuntimeError:
    """Return the error of a loss without a path to parameters that are trained.

    Args:
        missing: These parameters.
        total: Number of parameters that are measured.
        names: Their names, by ``id``.
        why: What is known of the cause, in words.
    """
    return RuntimeError(
        f"Expected a loss with a path to every parameter that is trained, got none to {len(missing)} of {total} "
        f"({_told(missing, names)}): {why}. Reentrant activation checkpointing hides parameters (pass "
        "use_reentrant=False), and so do no_grad, detach, and functions that close over parameters."
    )


def trained_but_unreached(
    reached: Sequence[bool],
    params: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    draws: Iterable[Sequence[bool]],
) -> list[Tensor]:
    """Return the parameters that training has given a gradient and that a loss reaches in no draw.

    Args:
        reached: For each parameter, whether the loss depends on it.
        params: The parameters.
        gradients: Their gradients from training.
        draws: The same with other random numbers, looked at if need be.
    """
    missing = [not one and _is_nonzero(gradient) for one, gradient in zip(reached, gradients, strict=True)]
    for drawn in draws if any(missing) else ():
        missing = [one and not there for one, there in zip(missing, drawn, strict=True)]
    return [p for one, p in zip(missing, params, strict=True) if one]


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.detach().abs().sum() > 0)


def _told(params: Sequence[Tensor], names: Mapping[int, str]) -> str:
    first = [names.get(id(p), "one that is not the module's") for p in params[:_NAMED]]
    return ", ".join(first) + (", ..." if len(params) > _NAMED else "")


def _graph(root: Node) -> tuple[dict[Node, list[Node]], list[Node], list[Node]]:
    """Return who uses each node of a graph, the leaves, and the nodes with a backward of their own."""
    users: dict[Node, list[Node]] = {root: []}
    leaves = []
    opaque = []
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if issubclass(type(node), BackwardCFunction):
            opaque.append(node)
        if _variable(node) is not None:
            leaves.append(node)
        for after, _ in node.next_functions:
            if after is None:
                continue
            if after not in users:
                users[after] = []
                waiting.append(after)
            users[after].append(node)
    return users, leaves, opaque


def _ancestors(nodes: Sequence[Node], users: dict[Node, list[Node]]) -> set[Node]:
    found = set(nodes)
    waiting = list(nodes)
    while waiting:
        for user in users[waiting.pop()]:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _variable(node: Node) -> Tensor | None:
    """Return the leaf that a node accumulates gradients for; None for other nodes."""
    return getattr(node, "variable", None)
