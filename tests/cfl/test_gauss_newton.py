"""Probes of the loss's curvature against its dense Hessian in the outputs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from eos_monitor.cfl.gauss_newton import NotSeparableError, output_probes

LABELS = torch.tensor([0, 3, 1, 2, 2])


def _targets(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _custom(out: Tensor) -> Tensor:  # couples the two columns of a row, in no form that is known by name
    return (out.prod(1).cosh() + out[:, 0] ** 4).mean()


LOSSES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "cross-entropy": ((5, 4), lambda out: F.cross_entropy(out, LABELS)),
    "weighted-smoothed-sum": (
        (5, 4),
        lambda out: F.cross_entropy(
            out, LABELS, weight=torch.arange(1.0, 5.0).double(), label_smoothing=0.1, reduction="sum"
        ),
    ),
    "ignored-rows": ((5, 4), lambda out: F.cross_entropy(out, LABELS.where(LABELS != 2, -100))),
    "scaled": ((5, 4), lambda out: 3.0 * F.cross_entropy(out, LABELS)),
    "binary": ((5, 3), lambda out: F.binary_cross_entropy_with_logits(out, _targets(5, 3))),
    "squares": ((5, 3), lambda out: F.mse_loss(out, _targets(5, 3))),
    "huber": ((5, 3), lambda out: F.huber_loss(out, _targets(5, 3), delta=0.7)),
    "coupled-columns": ((5, 2), _custom),
    "one-output": ((5,), lambda out: F.binary_cross_entropy_with_logits(out, _targets(5))),
    "pixels": ((2, 4, 3), lambda out: F.cross_entropy(out, LABELS[:3].expand(2, 3))),
    "tokens": ((2, 3, 4), lambda out: F.cross_entropy(out.transpose(1, 2), LABELS[:3].expand(2, 3))),
    "coupled-positions": ((3, 2, 2), lambda out: torch.logsumexp(out.flatten(1).square(), 1).mean()),
    "linear": ((5, 3), lambda out: out.sum()),
}


def probes_of(loss: Callable[[Tensor], Tensor], out: Tensor, probes: int, seed: int = 0) -> Tensor:
    """Return the probes flat, one a row."""
    leaf = out.clone().requires_grad_()
    inner = leaf * 1.0
    found = output_probes(
        loss(inner), get_gradient_edge(inner), inner.detach(), probes, torch.Generator().manual_seed(seed)
    )
    return torch.stack(found).reshape(probes, -1)


def outputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def within_rows(h: Tensor, rows: int) -> Tensor:
    """Zero everything that couples samples, as the products of pieces do."""
    size = len(h) // rows
    return h * torch.block_diag(*[torch.ones(size, size, dtype=h.dtype)] * rows)


def positive_part(h: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(h)
    return vectors @ torch.diag(values.clamp(min=0.0)) @ vectors.T


@pytest.mark.parametrize("name", LOSSES)
def test_probes_add_up_to_the_hessian_in_the_outputs(name: str) -> None:
    shape, loss = LOSSES[name]
    out = outputs(*shape)
    h = torch.autograd.functional.hessian(loss, out).reshape(out.numel(), out.numel())
    # Sixteen are more than a sample here has outputs, so that the signs cancel exactly within one.
    v = probes_of(loss, out, 16)
    expected = within_rows(positive_part((h + h.T) / 2), len(out))
    found = within_rows(v.T @ v / 16, len(out))
    # Rounding of double precision, and of the eigenvalues that are 0 (their root is the root of it).
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize(("name", "shape"), [("one-output", (5,)), ("two-classes", (5, 2))])
def test_one_probe_is_exact_where_rows_have_rank_one(name: str, shape: tuple[int, ...]) -> None:
    loss = LOSSES["one-output"][1] if name == "one-output" else (lambda out: F.cross_entropy(out, LABELS % 2))
    out = outputs(*shape)
    h = torch.autograd.functional.hessian(loss, out).reshape(out.numel(), -1)
    v = probes_of(loss, out, 1)
    torch.testing.assert_close(within_rows(v.T @ v, 5), h, atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize(("probes", "classes"), [(3, 4), (4, 9), (8, 80)], ids=["odd", "few", "no-eigenbasis"])
def test_probes_are_unbiased(probes: int, classes: int) -> None:
    labels = torch.arange(2) * 5 % classes
    out = outputs(2, classes)
    h = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o, labels), out).reshape(2 * classes, -1)
    draws = 400
    v = torch.cat([probes_of(lambda o: F.cross_entropy(o, labels), out, probes, seed) for seed in range(draws)])
    mean = v.T @ v / len(v)
    # The mean of k = draws · probes products of signs has a deviation of at most ‖H‖_F/√draws, whatever the probes.
    assert float((mean - h).norm() / h.norm()) < 4 / draws**0.5


def test_a_log_softmax_outside_is_seen_through_an_edge() -> None:
    out = outputs(5, 4).requires_grad_()
    logits = out * 1.0
    log_p = F.log_softmax(logits, 1)
    loss = F.nll_loss(log_p, LABELS)
    found = output_probes(loss, get_gradient_edge(logits), log_p.detach(), 16, torch.Generator().manual_seed(0))
    v = torch.stack(found).reshape(16, -1)
    h = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o, LABELS), out.detach()).reshape(20, 20)
    torch.testing.assert_close(within_rows(v.T @ v / 16, 5), h, atol=1e-12, rtol=1e-7)


def test_a_contrastive_loss_has_no_probes() -> None:
    def loss(out: Tensor) -> Tensor:
        return F.cross_entropy(out @ out.T, torch.arange(len(out)).roll(1))

    with pytest.raises(NotSeparableError, match="couples its rows"):
        probes_of(loss, outputs(6, 4), 4)


def test_single_precision_recognises_a_saturated_softmax() -> None:
    out = 12.0 * F.one_hot(LABELS, 4).float()
    v = probes_of(lambda o: F.cross_entropy(o, LABELS), out, 4)
    h = torch.autograd.functional.hessian(lambda o: F.cross_entropy(o, LABELS), out.double()).reshape(20, 20)
    # p (1 − p) at p ≈ 6e-6 from float32 probabilities: relative rounding 1e-7 / 1e-5.
    assert float((v.double() ** 2).sum() / 4) == pytest.approx(float(h.trace()), rel=0.05)
