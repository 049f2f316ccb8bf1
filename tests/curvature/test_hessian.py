"""Hessian products and their largest eigenvalues, against dense Hessians, closed forms, ARPACK and differences."""

import gc
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import HessianOperator, lanczos, measure_stability
from eos_monitor.isolation.batches import batch_size
from tests.nets import (
    PROBLEMS,
    Checkpointed,
    PartlyUsed,
    Problem,
    cross_entropy,
    dense_hessian,
    difference_hessian,
    labelled,
    make,
    mlp,
    squared_error,
)


def operator_of(problem: Problem, **arguments: Any) -> HessianOperator:
    sizes = {id(batch): size for batch, size in zip(problem.batches, problem.sizes, strict=False)}
    count = (lambda batch: sizes[id(batch)]) if sizes else None
    return HessianOperator(problem.module, problem.loss_fn, problem.batches, batch_size_fn=count, **arguments)


def matrix_of(operator: HessianOperator) -> Tensor:
    with operator:
        return torch.stack([operator.matvec(e) for e in torch.eye(operator.size, dtype=operator.dtype)], dim=1)


def oracle(name: str) -> Tensor:
    # Sparse gradients cannot be made dense by autograd's own Hessian; the weights and data are those of the twin.
    return dense_hessian(make(name.removeprefix("sparse-")))


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", PROBLEMS)
def test_largest_eigenvalues_agree_with_a_dense_hessian(name: str, k: int) -> None:
    exact = torch.linalg.eigvalsh(oracle(name)).flip(0)
    found = lanczos(operator_of(make(name)), k=k, rtol=1e-8, atol=1e-10, max_matvecs=1000)
    assert found.converged
    # An eigenvalue is off by at most its residual, 1e-8 |θ|; both Hessians are exact but for rounding.
    torch.testing.assert_close(found.eigenvalues, exact[:k], rtol=1e-6, atol=0.0)


def test_the_nets_have_the_spectra_they_stand_for() -> None:
    negative = torch.linalg.eigvalsh(oracle("negative"))
    assert -negative[0] > 1.5 * negative[-1] > 0
    cluster = torch.linalg.eigvalsh(oracle("cluster"))
    assert cluster[-5] > 0.99 * cluster[-1]
    assert cluster[-6] < 0.6 * cluster[-1]


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_agree_with_differences_of_gradients(name: str) -> None:
    """This oracle has no second backward pass: it would see one that is wrong."""
    exact = difference_hessian(make(name))
    found = matrix_of(operator_of(make(name)))
    # Central differences at 1e-5: truncation h² and rounding u/h are both about 1e-10, times fourth derivatives and
    # gradients of order 1 to 100 (measured: 2e-8 at most, batch norm).
    assert float(torch.linalg.matrix_norm(found - exact)) <= 1e-6 * float(torch.linalg.matrix_norm(exact))
    torch.testing.assert_close(found, found.T, rtol=0, atol=1e-12 * float(exact.abs().max()))


@pytest.mark.parametrize("k", [1, 4])
def test_larger_net_agrees_with_arpack(k: int) -> None:
    net = seeded(lambda: mlp(40, 200, 80, 10).double())
    x, y = seeded(lambda: (torch.randn(64, 40).double(), torch.randint(0, 10, (64,))))
    params = list(net.parameters())
    n = sum(p.numel() for p in params)
    assert n >= 20_000
    gradients = torch.autograd.grad(F.cross_entropy(net(x), y), params, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradients])

    def product(v: Any) -> Any:
        rows = torch.autograd.grad(flat, params, torch.from_numpy(v.copy()).reshape(-1), retain_graph=True)
        return torch.cat([row.reshape(-1) for row in rows]).numpy()

    exact = eigsh(LinearOperator((n, n), matvec=product, dtype="float64"), k=k, which="LA", tol=1e-10)[0]
    found = lanczos(HessianOperator(net, cross_entropy, [(x, y)]), k=k, rtol=1e-8, max_matvecs=500)
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, torch.tensor(exact).flip(0), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("sizes", [[12], [3, 9], [1, 1, 10]], ids=str)
def test_linear_regression_closed_form(sizes: list[int]) -> None:
    """H = 2/N XᵀX over all samples, however they are cut into batches."""
    x = seeded(lambda: torch.randn(12, 4, dtype=torch.float64))
    batches = [(part, torch.zeros(len(part), 1, dtype=torch.float64)) for part in x.split(sizes)]
    operator = HessianOperator(nn.Linear(4, 1, bias=False).double(), squared_error, batches)
    torch.testing.assert_close(matrix_of(operator), 2 / 12 * x.T @ x, rtol=1e-12, atol=1e-14)


def test_logistic_regression_closed_form() -> None:
    """H = 1/N Xᵀ diag(σ(1−σ)) X, which depends on the weights."""
    x = seeded(lambda: torch.randn(20, 3, dtype=torch.float64))
    y = (x[:, :1] > 0).double()
    net = seeded(lambda: nn.Linear(3, 1, bias=False).double())
    s = torch.sigmoid(net(x)).detach()
    operator = HessianOperator(net, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), [(x, y)])
    torch.testing.assert_close(matrix_of(operator), x.T @ (s * (1 - s) * x) / 20, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["unequal-batches", "multi-head-attention", "lstm", "batch-norm"])
def test_float32_products(name: str) -> None:
    exact = oracle(name)
    problem = make(name)
    problem.module.float()
    problem.batches = [(x.float(), y) for x, y in problem.batches]
    operator = operator_of(problem)
    assert operator.dtype == torch.float32
    v = torch.randn(operator.size, generator=torch.Generator().manual_seed(0))
    found = operator.matvec(v)
    assert found.dtype == torch.float32
    # u = 6e-8 through two backward passes over five layers.
    assert float((found - exact @ v.double()).norm()) <= 2e-5 * float((exact @ v.double()).norm())


def test_params_give_the_order_of_the_vectors() -> None:
    problem = make("tied")
    exact = dense_hessian(make("tied"))
    ends = torch.tensor([p.numel() for p in problem.module.parameters()]).cumsum(0).tolist()
    rows = [torch.arange(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    order = torch.cat(rows[::-1])
    operator = operator_of(problem, params=list(problem.module.parameters())[::-1])
    torch.testing.assert_close(matrix_of(operator), exact[order][:, order], rtol=1e-9, atol=1e-12)


def test_params_that_are_left_out_are_constants() -> None:
    problem = make("unequal-batches")
    weight = problem.module[0].weight
    exact = dense_hessian(make("unequal-batches"))[: weight.numel(), : weight.numel()]
    torch.testing.assert_close(matrix_of(operator_of(problem, params=[weight])), exact, rtol=1e-9, atol=1e-12)


def test_batch_size_fn_weights_the_batches() -> None:
    a, b = (seeded(lambda s=s: (torch.randn(4, 3).double(), torch.randn(4, 1).double()), s) for s in (0, 1))
    net = nn.Linear(3, 1, bias=False).double()
    one, two = (matrix_of(HessianOperator(net, squared_error, [batch])) for batch in (a, b))
    operator = HessianOperator(net, squared_error, [a, b], batch_size_fn=lambda batch: 1 if batch is a else 3)
    assert operator.samples == 4
    torch.testing.assert_close(matrix_of(operator), one / 4 + 3 * two / 4, rtol=1e-12, atol=1e-14)


def test_loss_evaluate_and_gradient() -> None:
    problem = make("unequal-batches")
    operator = operator_of(problem)
    assert operator.loss is None
    operator.matvec(torch.zeros(operator.size, dtype=torch.float64))
    x, y = (torch.cat([batch[i] for batch in problem.batches]) for i in (0, 1))
    loss = F.cross_entropy(problem.module(x), y)
    loss.backward()
    flat = torch.cat([p.grad.reshape(-1) for p in problem.module.parameters() if p.grad is not None])
    # Sums in another order: a few u.
    assert operator.loss == pytest.approx(loss.item(), rel=1e-13)
    assert operator.evaluate() == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(operator.gradient(), flat, rtol=1e-12, atol=1e-15)


def test_gradient_at_a_shift_leaves_the_parameters() -> None:
    problem = make("unequal-batches")
    operator = operator_of(problem)
    shift = torch.randn(operator.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = [(p, p.clone(), p._version) for p in problem.module.parameters()]
    found = operator.gradient(shift)
    assert all(torch.equal(p, before) and p._version == version for p, before, version in kept)
    with torch.no_grad():
        for p, part in zip(problem.module.parameters(), shift.split([p.numel() for p, *_ in kept]), strict=True):
            p += part.view(p.shape)
    torch.testing.assert_close(found, operator.gradient(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("batches", "evaluations"), [(1, 1), (3, 15)])
def test_one_batch_keeps_its_graph_and_several_are_worked_through(batches: int, evaluations: int) -> None:
    calls = []

    def loss(module: Any, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(module, batch)

    with HessianOperator(mlp(4, 3), loss, seeded(lambda: labelled([2] * batches, [4]))) as operator:
        for _ in range(5):
            operator.matvec(torch.ones(operator.size))
    assert len(calls) == evaluations


@pytest.mark.parametrize("sizes", [[8], [3, 5]], ids=str)
def test_products_follow_the_parameters(sizes: list[int]) -> None:
    """A kept graph belongs to the point it was recorded at."""
    net = seeded(lambda: mlp(4, 6, 3).double())
    problem = Problem(net, cross_entropy, seeded(lambda: [(x.double(), y) for x, y in labelled(sizes, [4])]))
    operator = operator_of(problem)
    with operator:
        before = operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        with torch.no_grad():
            net[0].weight.add_(1.0)
        after = operator.matvec(torch.ones(operator.size, dtype=torch.float64))
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, dense_hessian(problem).sum(dim=1), rtol=1e-9, atol=1e-12)


def test_kept_graph_is_freed_on_exit() -> None:
    operator = operator_of(make("tied"))
    with operator:
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        assert operator._graph is not None
    assert operator._graph is None


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_works_where_the_caller_records_no_graph(context: Callable[[], Any]) -> None:
    exact = oracle("unequal-batches").sum(dim=1)
    problem = make("unequal-batches")
    with context():
        problem.batches = [(x.clone(), y.clone()) for x, y in problem.batches]  # inference tensors, in that mode
        found = operator_of(problem).matvec(torch.ones_like(exact))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_share_of_unused_parameters() -> None:
    problem = Problem(PartlyUsed(), cross_entropy, labelled([6, 3], [4]))
    operator = operator_of(problem)
    product = operator.matvec(torch.ones(operator.size))
    assert operator.unused == pytest.approx(12 / 27)  # Linear(5, 2) beside Linear(4, 3)
    assert not bool(product[15:].any())


def test_loss_that_is_affine_in_the_parameters_has_no_curvature() -> None:
    operator = HessianOperator(nn.Linear(3, 1), lambda m, b: m(b).mean(), [torch.ones(2, 3)])
    assert operator.matvec(torch.ones(4)).tolist() == [0.0] * 4


def test_data_loader_does_not_move_the_global_generator() -> None:
    data, net = TensorDataset(torch.randn(6, 4), torch.randint(0, 3, (6,))), mlp(4, 3)
    before = torch.get_rng_state()
    assert HessianOperator(net, cross_entropy, DataLoader(data, batch_size=4, shuffle=True)).samples == 6
    assert torch.equal(torch.get_rng_state(), before)


def test_reentrant_checkpointing_is_an_error_and_not_zero() -> None:
    problem = Problem(Checkpointed(reentrant=True), cross_entropy, labelled([6], [4]))
    operator = operator_of(problem)
    with pytest.raises(RuntimeError, match="use_reentrant=True"):
        operator.matvec(torch.ones(operator.size))


LINEAR = nn.Linear(3, 1)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "Expected at least one batch, got none", {"batches": []}),
        (ValueError, "Expected `method` to be one of .*, got 'exact'", {"method": "exact"}),
        (ValueError, "Expected at least one trainable parameter, got none", {"params": []}),
        (ValueError, "Expected batches of at least one sample, got sizes", {"batches": [torch.ones(0, 3)]}),
        (ValueError, "Expected a batch with a tensor, got str", {"batches": ["words"]}),
        (TypeError, "Expected real floating-point parameters, got torch.int64", {"params": [torch.arange(3)]}),
        (TypeError, "got torch.complex64", {"params": [torch.zeros(3, dtype=torch.complex64)]}),
    ],
    ids=["batches", "method", "params", "empty-batch", "no-tensor", "integer", "complex"],
)
def test_arguments_that_are_refused(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        HessianOperator(LINEAR, lambda m, b: m(b).mean(), **({"batches": [torch.ones(2, 3)]} | arguments))


def test_module_without_trainable_parameters_is_refused() -> None:
    net = nn.Linear(3, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="Expected at least one trainable parameter, got none"):
        HessianOperator(net, lambda m, b: m(b).mean(), [torch.ones(2, 3)])


def test_vector_of_another_shape_is_refused() -> None:
    operator = HessianOperator(LINEAR, lambda m, b: m(b).mean(), [torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"Expected a vector of shape \(4,\), got \(5,\)"):
        operator.matvec(torch.ones(5))


LOSSES: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "nan": (lambda m, b: m(b).mean() * math.nan, "Expected a finite loss, got nan"),
    "inf": (lambda m, b: m(b).mean() + math.inf, "Expected a finite loss, got inf"),
    "vector": (lambda m, b: m(b), r"Expected the loss to be a scalar tensor, got shape \(2, 1\)"),
    "number": (lambda m, b: m(b).mean().item(), "Expected the loss to be a scalar tensor, got float"),
    "none": (lambda m, b: None, "got NoneType"),
    "detached": (lambda m, b: m(b).mean().detach(), "depends on the parameters, got a constant"),
    "elsewhere": (lambda m, b: LINEAR(b).mean(), "depends on the parameters, got one that uses none of them"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_refused(name: str) -> None:
    loss, message = LOSSES[name]
    operator = HessianOperator(nn.Linear(3, 1), loss, [torch.ones(2, 3)])
    with pytest.raises(RuntimeError, match=message):
        operator.matvec(torch.ones(4))


def test_loss_of_one_element_is_a_scalar() -> None:
    operator = HessianOperator(nn.Linear(3, 1), lambda m, b: m(b).square().mean().reshape(1), [torch.ones(2, 3)])
    assert float(operator.matvec(torch.ones(4)).sum()) > 0.0


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.zeros(4, 2), torch.zeros(9)), 4),
        ({"scale": torch.tensor(1.0), "x": torch.zeros(3)}, 3),
        ([["a", "b"], {"y": [torch.zeros(7)]}], 7),
    ],
    ids=["tensor", "tuple", "scalar-first", "nested"],
)
def test_batch_size_is_the_first_dimension_of_the_first_tensor(batch: Any, size: int) -> None:
    assert batch_size(batch) == size


# The self-check. Right and silently wrong second derivatives, in float32, as they come.


class OnceTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class DetachedTanh(torch.autograd.Function):
    """Right gradients; the saved value is cut from the graph, so their derivatives miss a term."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.y = x.tanh().detach()
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.y * ctx.y)


class PartlyDetachedTanh(torch.autograd.Function):
    """As above, with a fifth of the saved value cut: the products are wrong by a fifth as much."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - (0.8 * y + 0.2 * y.detach()) ** 2)


class Apply(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def custom(function: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), Apply(function), nn.Linear(16, 3))


def legacy_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(6, 16)), nn.Tanh(), norm(nn.Linear(16, 3)))


WRONG: dict[str, Callable[[], nn.Module]] = {
    "weight-norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "legacy-weight-norm": lambda: normed(legacy_weight_norm),
    "once-differentiable": lambda: custom(OnceTanh),
    "detached-save": lambda: custom(DetachedTanh),
}


def _regularized(module: Any, batch: Any) -> Tensor:
    return cross_entropy(module, batch) + 0.1 * sum(p.square().sum() for p in module.parameters())


def convolution() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(16, 3)
    )


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: mlp(6, 16, 3),
    "relu": lambda: mlp(6, 64, 64, 3, activation=nn.ReLU),
    "max-pool": convolution,
    "batch-norm-dropout": lambda: nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)
    ),
    # In train mode its power iteration depends on the weights behind autograd's back.
    "spectral-norm-eval": lambda: normed(nn.utils.parametrizations.spectral_norm).eval(),
}


def data(n: int = 64) -> Any:
    return torch.randn(n, 6), torch.randint(0, 3, (n,))


def float_inside(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]).float(), batch[1])


def float_outside(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0].float()), batch[1])


def softmax_in_float(module: Any, batch: Any) -> Tensor:
    return F.nll_loss(F.log_softmax(module(batch[0]), dim=-1, dtype=torch.float32), batch[1])


ROTATION = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]


def float_constant(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0] @ ROTATION), batch[1])  # refuses anything but float32


CHECKED_LOSSES = {
    "plain": (cross_entropy, torch.float64),
    "float-logits": (float_inside, torch.float64),
    "float-inputs": (float_outside, torch.float64),
    "float-softmax": (softmax_in_float, torch.float64),
    "float-constant": (float_constant, torch.float32),
}


@pytest.mark.parametrize("loss", CHECKED_LOSSES)
@pytest.mark.parametrize("name", WRONG)
def test_check_catches_wrong_products(name: str, loss: str) -> None:
    loss_fn, dtype = CHECKED_LOSSES[loss]
    for seed in range(4):
        net, batch = seeded(lambda: (WRONG[name](), data()), seed)
        operator = HessianOperator(net, loss_fn, [batch])
        top = lanczos(operator, rtol=1e-3).eigenvectors[:, 0]
        check = operator.check(top)
        assert (check.passed, check.dtype) == (False, dtype), (seed, check)


# No float32 step is right for a loss with kinks: kinked nets whose loss refuses double precision are left out.
KINKED = ("relu", "max-pool", "batch-norm-dropout")


@pytest.mark.parametrize(
    ("name", "loss"), [(n, o) for n in RIGHT for o in CHECKED_LOSSES if o != "float-constant" or n not in KINKED]
)
def test_check_passes_right_products(name: str, loss: str) -> None:
    loss_fn, dtype = CHECKED_LOSSES[loss]
    for seed in range(4):
        net, batch = seeded(lambda: (RIGHT[name](), data()), seed)
        operator = HessianOperator(net, loss_fn, [batch])
        for v in (lanczos(operator, rtol=1e-3).eigenvectors[:, 0], torch.randn(operator.size)):
            check = operator.check(v)
            assert (check.passed, check.dtype) == (True, dtype), (seed, check)


def test_check_accepts_errors_below_one_percent() -> None:
    """A reading is good to 1 %, so that smaller errors of a product are none."""
    net, batch = seeded(lambda: (custom(PartlyDetachedTanh), data()))
    operator = HessianOperator(net, cross_entropy, [batch])
    check = operator.check(lanczos(operator, rtol=1e-3).eigenvectors[:, 0])
    assert check.passed
    assert 1e-3 < check.mismatch < 1e-2


@pytest.mark.parametrize("name", PROBLEMS)
def test_check_passes_for_every_net(name: str) -> None:
    problem = make(name, torch.float32)
    operator = operator_of(problem)
    check = operator.check(torch.randn(operator.size, generator=torch.Generator().manual_seed(0)))
    assert check.passed
    assert check.dtype == torch.float64
    assert check.mismatch < 1e-4  # u = 6e-8 of float32 products, times a hundred


def test_check_reaches_a_regularizer_in_the_loss() -> None:
    net, batch = seeded(lambda: (mlp(6, 16, 3), data()))
    operator = HessianOperator(net, _regularized, [batch])
    assert operator.check(torch.ones(operator.size)).mismatch < 1e-4


def test_check_of_bfloat16_parameters_allows_for_their_rounding() -> None:
    net, (x, y) = seeded(lambda: (mlp(6, 16, 3).bfloat16(), data()))
    operator = HessianOperator(net, cross_entropy, [(x.bfloat16(), y)])
    check = operator.check(torch.randn(operator.size, generator=torch.Generator().manual_seed(0)))
    assert check.passed
    assert check.mismatch < 8 * 2**-7


def test_check_leaves_no_trace() -> None:
    net, batch = seeded(lambda: (RIGHT["batch-norm-dropout"](), data()))
    operator = HessianOperator(net, float_outside, [batch])
    before = ({k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state(), torch.get_default_dtype())
    operator.check(torch.ones(operator.size))
    assert all(torch.equal(v, before[0][k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_default_dtype() == before[2]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_products_give_no_edge(name: str) -> None:
    net, batch = seeded(lambda: (WRONG[name](), data()))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    reading = measure_stability(net, cross_entropy, [batch], sgd, raw_sharpness=True)
    for field in ("edge_ratio", "sharpness", "normalized_sharpness", "error", "edge_scale", "edge_lr", "eigenvalues"):
        assert getattr(reading, field) is None, field
    assert any("differ from finite differences" in note for note in reading.notes)
    assert reading.loss == pytest.approx(cross_entropy(net, batch).item(), rel=1e-5)


@pytest.mark.parametrize("name", RIGHT)
def test_right_products_give_an_edge_without_a_note(name: str) -> None:
    net, batch = seeded(lambda: (RIGHT[name](), data()))
    reading = measure_stability(net, cross_entropy, [batch], torch.optim.SGD(net.parameters(), lr=0.1))
    assert reading.edge_ratio is not None
    assert reading.notes == ()


def test_check_in_float32_only_is_said() -> None:
    net, batch = seeded(lambda: (RIGHT["tanh"](), data()))
    reading = measure_stability(net, float_constant, [batch], torch.optim.SGD(net.parameters(), lr=0.1))
    assert reading.edge_ratio is not None
    assert any("checked in float32 only" in note for note in reading.notes)


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "randn_like": torch.randn_like,
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "normal": lambda x: torch.normal(torch.zeros_like(x), 1.0),
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "distribution": lambda x: torch.distributions.Normal(torch.zeros_like(x), torch.ones_like(x)).rsample(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("noise", NOISES)
def test_check_sees_the_same_noise_in_double_precision(noise: str, dtype: torch.dtype) -> None:
    """Training with noise (diffusion, autoencoders): numbers drawn in double precision would be others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)

    def loss(module: Any, x: Tensor) -> Tensor:
        return module(x + NOISES[noise](x)).square().mean()

    operator = HessianOperator(net, loss, [torch.randn(6, 4, dtype=dtype)])
    check = operator.check(torch.randn(operator.size, dtype=dtype))
    assert check.dtype is torch.float64
    assert check.mismatch < 1e-4  # as on any smooth net


@pytest.mark.parametrize("fails_at", [1, 2])
def test_failed_product_over_processes_leaves_no_tensors_behind(fails_at: int) -> None:
    """Without the garbage collector: a stored error holds its traceback, that the frames, and those every vector."""
    net = nn.Linear(31, 7)
    size = 32 * 7
    calls = 0

    def loss(module: Any, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("on purpose")
        return module(batch).square().mean()  # type: ignore[no-any-return]

    def vectors() -> int:
        return sum(type(item) is Tensor and item.numel() in (size, size + 1, size + 2) for item in gc.get_objects())

    def fail() -> None:
        batches = [torch.ones(4, 31)] * 2  # rebuilt at each product
        with HessianOperator(net, loss, batches, sum_over_ranks=lambda total: total.clone()) as operator:
            kept = [torch.ones(operator.size) for _ in range(20)]
            operator.matvec(kept[0])

    gc.collect()
    before = vectors()
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="a loss on every process"):
            fail()
        after = vectors()
    finally:
        gc.enable()
    assert after == before
