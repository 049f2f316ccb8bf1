"""The instrument: layer-wise curvature in two tiers, measured again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eos_monitor.cfl.blocks import HessianBlocks, ScaledBlock, basis_dtype
from eos_monitor.cfl.capture import WITHOUT_A_GRAPH, layer_names
from eos_monitor.cfl.curvature_terms import CurvatureTerms, curvature_terms
from eos_monitor.cfl.estimate import CFLEstimate
from eos_monitor.cfl.layer_curvature import LayerCurvature
from eos_monitor.cfl.layer_limits import LayerLimit, LayerLimits
from eos_monitor.cfl.objective import Objective
from eos_monitor.curvature.lanczos import Spectrum, lanczos
from eos_monitor.isolation.batches import batch_size
from eos_monitor.isolation.sandbox import LossFn, Sandbox, preserve_rng
from eos_monitor.isolation.twin import as_list

# Products of a Lanczos run: from a probe's gradient the cheap tier's Ritz value is at 1.00 (p10 0.97) of the converged
# one after 5, and better than from a random vector after 6; the exact tier's, from the previous vector and the cheap
# tier's, at 1.00 (p10 0.99) after 3.
_CHEAP_COLD = 5
_CHEAP_WARM = 4
_EXACT_COLD = 6
_EXACT_WARM = 3
_TO_CONVERGENCE = 200
_FIRST = 3  # layers that always get the exact tier
_EARLY_STOP = 1e-3
# The eigenvalue is then within some 3e-3 over the relative gap, and four probes have a noise of 5 %. A probe's gradient
# can lie in the span of lower modes, and at a residual of 0.1 the run ended there: over eight nets, four states and
# three seeds at 0.40 of the truth in two nets. With a tenth of a random vector beside it, and at 0.05, the least of
# these is 0.72 and 0.86; 3.9 products a layer instead of 3.4.
_CHEAP_STOP = 0.05
_RANDOM_SHARE = 0.1

_Product = Callable[[Tensor], Tensor]


class CFLGauge:
    """Gauge of the layers' curvature in two tiers; each measurement starts from the vectors of the one before.

    Args:
        probes: Probes of the loss's curvature at the output, ≥ 1.
        exact: Whether every layer gets the exact tier, and is run to convergence; otherwise the first three do,
            those whose cheap estimate is weak, and all where there are at most three.
        layers: Name patterns (``fnmatch``) of the layers that are wanted; all by default.
        paper_bound: Whether to add the papers' bound.
        seed: Seed of probes and start vectors.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor.
        rtol: Relative residual to reach where a solve is run to convergence.
    """

    def __init__(
        self,
        *,
        probes: int = 4,
        exact: bool = False,
        layers: str | Sequence[str] | None = None,
        paper_bound: bool = False,
        seed: int = 0,
        batch_size_fn: Callable[[Any], int] | None = None,
        rtol: float = 1e-4,
    ) -> None:
        if probes < 1:
            raise ValueError(f"Expected `probes` >= 1, got {probes}.")
        self._probes = probes
        self._exact = exact
        self._seed = seed
        self._rtol = rtol
        self._bound = paper_bound
        self._patterns = [layers] if isinstance(layers, str) else layers
        self._batch_size = batch_size_fn or batch_size
        self._coupled: frozenset[str] | None = None
        self._cheap_vectors: dict[str, Tensor] = {}
        self._exact_vectors: dict[str, Tensor] = {}

    def measure(
        self,
        module: nn.Module,
        loss_fn: LossFn,
        batches: Iterable[Any],
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        sandbox: Sandbox | None = None,
        mode: Tensor | None = None,
        refine: bool = True,
    ) -> list[CFLEstimate]:
        """Estimate every wanted layer once; see :func:`estimate_cfl`.

        Without ``refine`` by the cheap tier alone, which then only knows of samples that meet before the loss if an
        earlier call has looked for them (batch normalization it always notices).
        """
        with preserve_rng():  # a DataLoader's iterator draws its seed from the global generator
            batches = list(batches)
        if not batches:
            raise ValueError("Expected at least one batch, got none.")
        samples = [self._batch_size(batch) for batch in batches]
        limits = LayerLimits([] if optimizer is None else as_list(optimizer))
        weights = {name: p for name, p in layer_names(module).items() if self.wants(name) and limits.trains(p)}
        random = torch.Generator().manual_seed(self._seed)
        trained = [p for p in module.parameters() if limits.trains(p)]
        objective = Objective(sandbox or Sandbox(module), module, loss_fn, batches, samples)
        with objective.sandbox:
            terms = self._terms(objective, trained, random, refine or self._exact)
            estimates = [self._cheap(layer, limits, random) for layer in terms.layers.values()]
            estimates += [CFLEstimate.unknown(name, reason) for name, reason in terms.not_attributed.items()]
            if refine or self._exact:
                exact = self._refined(estimates, terms, weights, limits, random, objective)
                estimates = [_merged(e, exact[e.layer]) if e.layer in exact else e for e in estimates]
        shares = _mode_shares(mode, limits, module, weights)
        estimates = [
            replace(
                e.with_regimes(terms.regimes.get(e.layer)),
                top_mode_share=shares.get(e.layer),
                paper_bound=terms.bounds.get(e.layer),
            )
            for e in estimates
        ]
        return sorted(estimates, key=lambda e: e.rank_value, reverse=True)

    def wants(self, name: str) -> bool:
        """Whether a layer of this name is among those to be measured."""
        return self._patterns is None or any(fnmatchcase(name, pattern) for pattern in self._patterns)

    def _terms(
        self, objective: Objective, trained: Sequence[Tensor], random: torch.Generator, choosing: bool
    ) -> CurvatureTerms:
        """Return T + GN of every wanted layer; where layers are to be chosen for the exact tier, also find the coupled.

        They are looked for once, when it first matters.
        """
        terms = curvature_terms(
            objective,
            trained,
            wanted=self.wants,
            probes=self._probes,
            generator=random,
            bounded=self._bound,
            coupled=self._coupled if self._coupled is not None or choosing else frozenset(),
        )
        if choosing:
            self._coupled = terms.coupled
        return terms

    def _cheap(self, layer: LayerCurvature, limits: LayerLimits, random: torch.Generator) -> CFLEstimate:
        limit = limits.of(layer.parameter)
        before = self._cheap_vectors.get(layer.name)
        start = before if before is not None and before.numel() == layer.parameter.numel() else None
        directions: list[Tensor] = []
        scaled = _scaled(layer.matvec, layer.parameter, limit)

        def noted(u: Tensor) -> Tensor:
            directions.append(u)
            return scaled(u)

        spectrum = _solve(
            noted,
            layer.parameter,
            _start_of(layer, limit, random) if start is None else start,
            _CHEAP_COLD if start is None else _CHEAP_WARM,
            _CHEAP_STOP,
            random,
        )
        self._cheap_vectors[layer.name] = spectrum.eigenvectors[:, 0]
        r = max(0.0, float(spectrum.eigenvalues[0]))
        estimate = CFLEstimate.solved(layer.name, r, spectrum, limit, "cheap")
        return replace(
            estimate,
            form=layer.surroundings.form,
            reason=limits.why_not or layer.surroundings.reason,
            transition_share=_transition_share(layer, spectrum, limit, directions),
        )

    def _refined(
        self,
        estimates: Sequence[CFLEstimate],
        terms: CurvatureTerms,
        weights: Mapping[str, Tensor],
        limits: LayerLimits,
        random: torch.Generator,
        objective: Objective,
    ) -> dict[str, CFLEstimate]:
        """Return the exact tier's estimates of the layers that it is for, by name."""
        if self._exact:
            chosen = [e.layer for e in estimates]
        else:
            known = sorted(terms.layers, key=lambda name: -_rank(estimates, name))
            weak = [name for name in known[_FIRST:] if terms.layers[name].surroundings.form == "weak"]
            chosen = [*known[:_FIRST], *weak]
        # Without a graph a block would be 0, and that would not be known of it.
        chosen = [n for n in chosen if n in weights and terms.not_attributed.get(n) != WITHOUT_A_GRAPH]
        blocks = HessianBlocks(objective, [weights[name] for name in chosen])
        exact = {}
        for i, name in enumerate(chosen):
            limit = limits.of(weights[name])
            spectrum = self._exact_solve(blocks, i, name, weights[name], limit, random)
            self._exact_vectors[name] = spectrum.eigenvectors[:, 0]
            exact[name] = CFLEstimate.solved(name, float(spectrum.eigenvalues[0]), spectrum, limit, "exact")
        return exact

    def _exact_solve(
        self,
        blocks: HessianBlocks,
        i: int,
        name: str,
        weight: Tensor,
        limit: LayerLimit | None,
        random: torch.Generator,
    ) -> Spectrum:
        known = (self._exact_vectors.get(name), self._cheap_vectors.get(name))
        starts = [v for v in known if v is not None and v.numel() == weight.numel()]
        start = None
        if starts:
            # Aligned, or opposite signs of the same mode would cancel.
            start = starts[0] + sum((torch.sign(starts[0] @ v) or 1.0) * v for v in starts[1:])
        products = _TO_CONVERGENCE if self._exact else _EXACT_WARM if len(starts) == 2 else _EXACT_COLD
        rtol = self._rtol if self._exact else _EARLY_STOP
        floor = 0.0 if limit is None else float((limit.l2 * limit.scale.square()).max())
        block = ScaledBlock(_scaled(lambda v: blocks.matvec(i, v), weight, limit), weight, floor)
        return block.solve(start, products, rtol, random, deep=self._exact)


def estimate_cfl(
    module: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    *,
    probes: int = 4,
    exact: bool = False,
    layers: str | Sequence[str] | None = None,
    paper_bound: bool = False,
    seed: int = 0,
    batch_size_fn: Callable[[Any], int] | None = None,
    sandbox: Sandbox | None = None,
    mode: Tensor | None = None,
) -> list[CFLEstimate]:
    r"""Estimate each layer's curvature and the learning rate that it bears, without touching the module.

    With H_l the Hessian's diagonal block of a layer's weight, C_l the critical curvature of the optimizer there and W_l
    its coupled weight decay, a layer alone is at its limit where

    .. math:: \lambda_{\max}\bigl(C_l^{-1/2} (H_l + W_l) C_l^{-1/2}\bigr) = 1,

    and this is its ``cfl_number`` (up to decoupled decay, which bends C). The largest is a lower bound of the whole
    net's edge ratio. In two tiers: the *cheap* one replaces H_l by T + GN_m for all layers, at the cost of a few
    forward and backward passes; the *exact* one runs Lanczos on H_l, for the first three layers, those whose cheap
    estimate is ``"weak"``, and all where there are at most three, or on request.

    Memory: about 3 + ``probes`` activation tensors for each layer and batch; nothing of a weight's size for a sample.

    Args:
        module: Module to measure, in its present train or eval mode.
        loss_fn: ``loss_fn(module, batch)`` -> scalar mean loss.
        batches: The probe: batches of any structure, whose products are added, never their eigenvalues. Batch
            normalization in train mode uses the statistics of each.
        optimizer: The optimizer in use, or several; None for gradient descent of no particular learning rate, where
            ``lr_max`` is 2 / curvature and ``cfl_number`` None.
        probes: Probes of the loss's curvature at the output, ≥ 1; a power of two is best, and as many as the loss has
            outputs in a sample are exact.
        exact: Run the exact tier in every layer, to convergence; also where the cheap one does not work.
        layers: Name patterns (``fnmatch``) of the layers that are wanted.
        paper_bound: Add the papers' bound.
        seed: Seed of probes and start vectors.
        batch_size_fn: Samples in a batch; by default the first dimension of its first tensor, which must be the first
            dimension of the layers' outputs, or divide it.
        sandbox: Sandbox to run in, when the module needs a special one.
        mode: Vector of which each layer's share is told, ``(n,)`` in the order of the optimizers' parameters (of the
            module's trainable ones without an optimizer); say the critical mode.

    Returns:
        One estimate for each layer with a trained weight, the closest to its limit first, those that could not be
        attributed last.

    Raises:
        ValueError: If there is no batch, or the loss runs through no Linear or convolution layer.
        RuntimeError: If the loss is not a finite scalar.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> (layer,) = estimate_cfl(net, lambda m, b: m(b).square().mean(), [x], sgd)
        >>> layer.layer, round(layer.curvature, 4), round(layer.cfl_number, 4)  # λ_max(2/N XᵀX) = 9, lr·λ/2
        ('0', 9.0, 0.45)

    References:
        Sun, Lao, Yezzi, Sundaramoorthi, "A PDE-based Explanation of Extreme Numerical Sensitivities and Edge of
        Stability in Training Neural Networks", arXiv 2206.02001, section 5.5, where layers are judged one by one.
    """
    gauge = CFLGauge(
        probes=probes, exact=exact, layers=layers, paper_bound=paper_bound, seed=seed, batch_size_fn=batch_size_fn
    )
    return gauge.measure(module, loss_fn, batches, optimizer, sandbox=sandbox, mode=mode)


def _scaled(matvec: _Product, weight: Tensor, limit: LayerLimit | None) -> _Product:
    """Return C^-½ (±A + W) C^-½ as an operator, or A itself where there is no limit."""
    dtype = basis_dtype(weight)

    def scaled(u: Tensor) -> Tensor:
        v = u if limit is None else limit.scale * u
        product = matvec(v.to(weight.dtype)).to(dtype)
        return product if limit is None else limit.scale * (limit.sign * product + limit.l2 * v)

    return scaled


def _solve(
    operator: _Product, weight: Tensor, start: Tensor | None, products: int, rtol: float, random: torch.Generator
) -> Spectrum:
    """Solve for the top of an operator on a weight's space."""
    return lanczos(
        operator,
        size=weight.numel(),
        dtype=basis_dtype(weight),
        device=weight.device,
        v0=start,
        rtol=rtol,
        max_matvecs=products,
        generator=random,
    )


def _start_of(layer: LayerCurvature, limit: LayerLimit | None, random: torch.Generator) -> Tensor | None:
    """Return a start in the basis where C is one, a probe's gradient and a little noise; None for a random one."""
    if limit is not None and bool((limit.l2 != 0).any()):
        # A probe has nothing of weights without a gradient, where decay can have all of a preconditioned block's top.
        return None
    start = layer.start() if limit is None else limit.scale * layer.start()
    length = torch.linalg.vector_norm(start)
    noise = torch.randn(start.shape, generator=random, device="cpu").to(start.device, start.dtype)
    mixed: Tensor = start + _RANDOM_SHARE * length / torch.linalg.vector_norm(noise) * noise
    return mixed


def _merged(cheap: CFLEstimate, exact: CFLEstimate) -> CFLEstimate:
    """Keep what the cheap tier said of the layer, with the exact tier's numbers."""
    return replace(exact, transition_share=cheap.transition_share, form=cheap.form, reason=cheap.reason)


def _rank(estimates: Sequence[CFLEstimate], name: str) -> float:
    return next(e.rank_value for e in estimates if e.layer == name)


def _transition_share(
    layer: LayerCurvature, spectrum: Spectrum, limit: LayerLimit | None, directions: Sequence[Tensor]
) -> float:
    """Return T's part of vᵀ(T + GN)v at the top eigenvector, from its coefficients in an orthonormal basis."""
    u = spectrum.eigenvectors[:, 0]
    total = float(spectrum.eigenvalues[0])
    if limit is not None:
        v = limit.scale * u
        total = limit.sign * (total - float((limit.l2 * v * v).sum()))
    gauss_newton = layer.gauss_newton_form([float(u @ direction) for direction in directions])
    bend = max(0.0, total - gauss_newton)
    return bend / (bend + gauss_newton) if bend + gauss_newton > 0.0 else 0.0


def _mode_shares(
    mode: Tensor | None, limits: LayerLimits, module: nn.Module, weights: Mapping[str, Tensor]
) -> dict[str, float]:
    if mode is None:
        return {}
    params = limits.params or [p for p in module.parameters() if p.requires_grad]
    sizes = [p.numel() for p in params]
    if mode.shape != (sum(sizes),):
        raise ValueError(f"Expected `mode` of shape ({sum(sizes)},), got {tuple(mode.shape)}.")
    squares = {
        id(p): float(part.double().square().sum()) for p, part in zip(params, torch.split(mode, sizes), strict=True)
    }
    total = sum(squares.values())
    return {name: squares[id(p)] / total for name, p in weights.items()} if total else {}
