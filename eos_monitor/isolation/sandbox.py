"""Run a module's loss and leave no trace.

Nothing that is live gets written. References are swapped: every sub-module's attributes are replaced by copies for the
time of an evaluation and the original objects are put back, never copied back (a copy would bump the version counters
that a live autograd graph checks). Parameters are replaced by detached tensors that share their storage, so that
neither ``.grad`` nor any gradient hook of the user is reached; backward hooks of modules are left out.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eos_monitor.isolation.batches import clone_batch, map_batch
from eos_monitor.isolation.copies import Copies, cast
from eos_monitor.isolation.counters import Counters
from eos_monitor.isolation.exchange import without_exchange
from eos_monitor.isolation.parted_loss import PartedLoss
from eos_monitor.isolation.wrappers import direct_forward

LossFn = Callable[[Any, Any], Tensor]  # loss_fn(module, batch) -> scalar mean loss
Stage = list[tuple[nn.Module, dict[str, Any]]]


class Sandbox:
    """Context in which a module's loss can be evaluated again and again from one and the same state.

    Each evaluation starts from the module's state at that moment: buffers, attributes, metric states and counters
    (small objects of the user's own classes) are fresh copies, and the generators of torch, NumPy and Python are
    re-seeded, so that dropout masks agree between evaluations. On exit all of them are as they were. Attention runs on
    the math kernel and compiled functions run eagerly, because fused and compiled backwards cannot be differentiated
    twice; autocast is off, but where parameters are of several floating-point types, which meet under the caller's
    autocast only. The wrappers of data parallelism, Fabric and Accelerate are passed by.

    What cannot be isolated: other objects behind attributes, such as iterators and objects of libraries, and what hangs
    on functions, compiled classes and globals. Parameters that a function holds are replaced all the same.

    Args:
        module: Module whose sub-modules are isolated.
        overrides: Attributes set on sub-modules during an evaluation (a no-op ``log``, say), as a function of the
            sub-module.
        seed: Seed of every evaluation.
        alone: Whether, of several processes, this one evaluates while the others are elsewhere: a loss that exchanges
            with them is then an error, and not a wait for ever.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        overrides: Callable[[nn.Module], Mapping[str, Any]] | None = None,
        seed: int = 0,
        alone: bool = True,
    ) -> None:
        scripted = [name for name, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        if scripted:
            raise TypeError(
                f"Expected eager sub-modules, got TorchScript in {scripted[0] or 'the root'!r}, whose parameters "
                "cannot be swapped. Pass the module from before scripting."
            )
        self._module = module
        self._overrides = overrides
        self._seed = seed
        self._alone = alone
        self._originals: list[tuple[nn.Module, dict[str, Any]]] = []
        self._forwards: list[tuple[nn.Module, dict[str, Callable[..., Any]]]] = []
        self._counters = Counters()
        self._parameters: list[Tensor] = []  # the live ones: during an evaluation the module holds stand-ins
        self._autocast: list[tuple[str, torch.dtype]] = []  # the caller's, where the loss needs it
        self._stage: Stage = []  # that of the last evaluation, if anybody asked for it
        self._stack = ExitStack()

    @property
    def is_mixed(self) -> bool:
        """Whether the parameters are of several floating-point types, as those of adapters on a shorter base are."""
        return len({p.dtype for p in self._module.parameters() if p.is_floating_point()}) > 1

    def __enter__(self) -> Sandbox:
        with ExitStack() as stack:
            # An inference-mode caller could not record a graph at all.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            kinds = {p.device.type for p in self._module.parameters()} | {"cpu"}
            outside = [(kind, torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)]
            self._autocast = outside if self.is_mixed else []
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_eager())
            if any(isinstance(m, nn.RNNBase) for m in self._module.modules()):
                stack.enter_context(_without_cudnn())
            stack.enter_context(preserve_rng())
            self._originals = [(m, dict(m.__dict__)) for m in self._module.modules()]
            self._forwards = [(m, direct_forward(m)) for m, _ in self._originals]
            self._counters = Counters()
            self._parameters = list(self._module.parameters())
            stack.callback(self._restore)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def evaluate(
        self,
        loss_fn: LossFn,
        batch: Any,
        parameters: Mapping[Tensor, Tensor],
        *,
        stream: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return ``loss_fn(module, batch)`` with ``parameters`` in the place of the module's own.

        Args:
            loss_fn: Function of the module and a batch.
            batch: Any batch; a copy of it is passed.
            parameters: Live parameter -> tensor to use. Those that are not named enter detached, as constants.
            stream: Number of the random stream (one per micro-batch, so that their dropout masks differ).
            dtype: Floating-point type that buffers, attributes and the batch are cast to; None leaves them.
        """
        if isinstance(loss_fn, PartedLoss):
            parts = loss_fn.parts(parameters)
            losses = [Sandbox.evaluate(self, loss, batch, own, stream=stream, dtype=dtype) for loss, own in parts]
            return torch.stack([check_loss(loss, finite=False, constant=True) for loss in losses]).sum()
        self._stage = []
        memo: dict[int, Any] = {id(p): cast(p.detach(), dtype) for p in self._parameters}
        memo |= {id(live): stand_in for live, stand_in in parameters.items()}
        for live in {*self._parameters, *parameters}:
            vars(memo[id(live)]).update(vars(live))  # muP's shapes, and whatever else hangs on a parameter
        copies = Copies(memo, dtype, self._counters, put_off=True)
        for module, original in self._originals:
            _replace_attributes(module, {name: copies.of(value) for name, value in original.items()})
        for module, _ in self._originals:
            # Backward hooks watch training's own backward passes, and a reading is full of others.
            module.__dict__.update(_backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict())
            module.__dict__.update(self._overrides(module) if self._overrides else {})
        for module, forward in self._forwards:
            module.__dict__.update(forward)
        seed_everything(self._seed + stream)
        inputs = map_batch(clone_batch(batch), lambda x: cast(x, dtype))
        function = copies.where_needed(loss_fn)  # its own journals, if any, too
        with ExitStack() as stack:
            stack.enter_context(without_exchange() if self._alone else nullcontext())
            stack.enter_context(copies.in_use())
            for kind, short in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=short))
            loss: Tensor = function(self._module, inputs)
        return loss

    def stage(self) -> Stage:
        """Return what the module holds after an evaluation, which a backward that recomputes needs again."""
        self._stage = [(module, dict(module.__dict__)) for module, _ in self._originals]
        return self._stage

    def restage(self, stage: Stage) -> None:
        """Let the module hold again what it held after an earlier evaluation."""
        if stage is not self._stage:
            self._stage = stage
            for module, attributes in stage:
                _replace_attributes(module, attributes)

    def _restore(self) -> None:
        for module, original in self._originals:
            _replace_attributes(module, original)
        self._originals = []
        self._forwards = []
        self._stage = []


def check_loss(loss: Any, *, finite: bool = True, constant: bool = False) -> Tensor:
    """Return a loss as a scalar, or say why it is none.

    Args:
        loss: What a loss function returned.
        finite: Whether it has to be finite.
        constant: Whether it may be independent of all parameters.
    """
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise RuntimeError(f"Expected the loss to be a scalar tensor, got {got}.")
    if finite and not bool(torch.isfinite(loss.detach())):
        raise RuntimeError(f"Expected a finite loss, got {float(loss.detach())}.")
    if not constant and torch.is_grad_enabled() and not loss.requires_grad:
        raise RuntimeError("Expected a loss that depends on the parameters, got a constant.")
    return loss.reshape(())


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Put the global generators of torch, NumPy and Python back on exit."""
    states = random_states()
    try:
        yield
    finally:
        torch.set_rng_state(states["torch"])
        np.random.set_state(states["numpy"])  # noqa: NPY002
        random.setstate(states["python"])
        if "cuda" in states:
            torch.cuda.set_rng_state_all(states["cuda"])
        if "mps" in states:
            torch.mps.set_rng_state(states["mps"])


def random_states() -> dict[str, Any]:
    """Return the states of the global generators, by the name of what draws from them."""
    states = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}  # noqa: NPY002
    # Touching CUDA before the user does would initialise it.
    if _cuda_is_live():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def _cuda_is_live() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def seed_everything(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python."""
    # torch.manual_seed would also queue a seed for a CUDA that is initialised later.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)
    if _cuda_is_live():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


@contextmanager
def _without_cudnn() -> Iterator[None]:
    # cuDNN's recurrent kernels have no double backward. Not by torch.backends.cudnn.flags: it reads and writes the TF32
    # switch too, which raises where a user has set `fp32_precision`.
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


@contextmanager
def _eager() -> Iterator[None]:
    # Nothing can be compiled before torch._dynamo is imported, and that import takes seconds.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _replace_attributes(module: nn.Module, attributes: Mapping[str, Any]) -> None:
    # Not by setattr: modules, metrics and compiled modules override it.
    module.__dict__.clear()
    module.__dict__.update(attributes)
