"""A loss can be evaluated and differentiated at will; what the module, its user and the process own stays as it was."""

import copy
import random
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eos_monitor import HessianOperator, lanczos, measure_stability
from eos_monitor.isolation.batches import batch_tensors, clone_batch, map_batch, move_batch
from eos_monitor.isolation.sandbox import Sandbox, preserve_rng

MUTABLE = (list, deque, dict, OrderedDict, defaultdict, Counter, set)


class Busy(nn.Module):
    """Writes in forward wherever a module can keep something."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.losses: list[float] = []
        self.recent: deque[float] = deque(maxlen=2)
        self.by_name: dict[str, Any] = {"inner": {"count": 0}, "tensors": [torch.zeros(2)]}
        self.counter: Counter[str] = Counter()
        self.lookup: defaultdict[str, list[int]] = defaultdict(list)
        self.names: set[str] = set()
        self.average = torch.zeros(3)
        self.array = np.zeros(3)
        self.generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(4)
        self.python_generator = random.Random(5)
        self.last: Tensor | None = None
        self.steps = 0
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        x += torch.rand(x.shape, generator=self.generator)  # edits its input in place
        x *= 1 + 0.1 * self.numpy_generator.random() + 0.1 * self.python_generator.random()
        x *= 1 + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002
        y = self.body(x)
        self.seen += 1
        self.losses.append(float(y.detach().sum()))
        self.recent.append(float(y.detach().mean()))
        self.by_name["inner"]["count"] += 1
        self.by_name["tensors"][0].add_(1)
        self.by_name["new"] = 1
        self.counter["calls"] += 1
        self.lookup["calls"].append(self.steps)
        self.names.add("called")
        self.average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        self.array += 1
        self.last = y
        self.steps += 1
        self.eval() if self.steps > 100 else self.train()
        if self.broken:
            raise ValueError("broken in forward")
        return y


def busy_loss(module: nn.Module, batch: Any) -> Tensor:
    batch["extra"] = torch.ones(1)  # edits the batch too
    return F.cross_entropy(module(batch["x"]), batch["y"])


def busy_batch() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(16, 4, generator=g), "y": torch.randint(0, 3, (16,), generator=g)}


@dataclass
class Snapshot:
    """The very objects behind a value, with copies of what they hold."""

    value: Any
    content: Any = None
    parts: list["Snapshot"] = field(default_factory=list)

    @classmethod
    def of(cls, value: Any) -> "Snapshot":
        if isinstance(value, nn.Module):
            return cls(value, list(vars(value)), [cls.of(v) for v in vars(value).values()])
        if isinstance(value, (dict, UserDict)):
            return cls(value, list(value), [cls.of(v) for v in value.values()])
        if isinstance(value, (list, deque, tuple)):
            return cls(value, len(value), [cls.of(v) for v in value])
        if isinstance(value, Tensor):
            content = (value.detach().clone(), value._version, value.requires_grad)
            return cls(value, content, [cls.of(value.grad)] if value.is_leaf else [])
        if isinstance(value, torch.Generator):
            return cls(value, value.get_state())
        if isinstance(value, np.random.Generator):
            return cls(value, copy.deepcopy(value.bit_generator.state))
        if isinstance(value, random.Random):
            return cls(value, value.getstate())
        return cls(value, copy.copy(value))

    def check(self, now: Any, where: str = "module") -> None:
        assert now is self.value, f"{where} is another object"
        fresh = Snapshot.of(now)
        assert _same(self.content, fresh.content), f"{where} changed"
        assert len(self.parts) == len(fresh.parts), where
        names = self.content if isinstance(self.content, list) else range(len(self.parts))
        for name, part, value in zip(names, self.parts, fresh.parts, strict=True):
            part.check(value.value, f"{where}.{name}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    return bool(a == b)


def rng_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002


def trained(net: nn.Module) -> nn.Module:
    """Give it gradients, as in the middle of a step."""
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    return net


def measure(net: nn.Module, batches: list[Any]) -> None:
    measure_stability(net, busy_loss, batches, torch.optim.SGD(net.parameters(), lr=0.1), raw_sharpness=True, k=2)


def solve(net: nn.Module, batches: list[Any]) -> None:
    lanczos(HessianOperator(net, busy_loss, batches), max_matvecs=8)


def look_and_check(net: nn.Module, batches: list[Any]) -> None:
    operator = HessianOperator(net, busy_loss, batches)
    operator.check(torch.ones(operator.size))
    operator.gradient(torch.ones(operator.size))
    operator.evaluate()


USES: dict[str, Callable[[nn.Module, list[Any]], None]] = {
    "measure_stability": measure,
    "lanczos": solve,
    "check-gradient-evaluate": look_and_check,
}


@pytest.mark.parametrize("broken", [False, True], ids=["clean", "exception"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("use", USES)
def test_leaves_no_trace(use: str, count: int, broken: bool) -> None:
    net = trained(Busy())
    net.broken = broken
    net.body[3].eval()  # one flag that differs from the rest
    batches = [busy_batch() for _ in range(count)]
    snapshots = [(Snapshot.of(net), net), *((Snapshot.of(batch), batch) for batch in batches)]
    states = rng_states()
    if broken:
        with pytest.raises(ValueError, match="broken in forward"):
            USES[use](net, batches)
    else:
        USES[use](net, batches)
    for snapshot, now in snapshots:
        snapshot.check(now)
    assert _same(rng_states(), states)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_the_busy_module_does_leave_traces_on_its_own() -> None:
    """So the test above can fail."""
    net, batch = trained(Busy()), busy_batch()
    snapshot, whole = Snapshot.of(net), Snapshot.of(batch)
    busy_loss(net, batch)
    for one, now in ((snapshot, net), (whole, batch)):
        with pytest.raises(AssertionError):
            one.check(now)


def test_open_graph_can_still_be_differentiated() -> None:
    """A reading between forward and backward must not bump the versions that autograd checks."""
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    batch = busy_batch()
    loss = F.cross_entropy(net(batch["x"]), batch["y"])
    measure(net, [batch])
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_evaluations_are_bit_identical() -> None:
    net, batch = Busy(), busy_batch()
    with Sandbox(net) as sandbox:
        losses = {float(sandbox.evaluate(busy_loss, batch, {}).detach()) for _ in range(3)}
        other = float(sandbox.evaluate(busy_loss, batch, {}, stream=1).detach())
    assert len(losses) == 1
    assert other not in losses
    with Sandbox(net) as sandbox:
        assert float(sandbox.evaluate(busy_loss, batch, {}).detach()) in losses
    with Sandbox(net, seed=7) as sandbox:
        assert float(sandbox.evaluate(busy_loss, batch, {}).detach()) not in losses


def test_streams_are_seeds_that_follow_each_other() -> None:
    drop = nn.Dropout(0.5)
    x = torch.ones(100)
    for seed, stream in ((0, 3), (5, 2)):
        with Sandbox(drop, seed=seed) as sandbox:
            found = sandbox.evaluate(lambda m, b: m(b), x, {}, stream=stream)
        with preserve_rng():
            torch.manual_seed(seed + stream)
            assert torch.equal(found, drop(x))


def test_evaluation_starts_from_the_state_of_the_moment() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    live = net[1].running_mean
    with Sandbox(net) as sandbox:
        before = sandbox.evaluate(lambda m, b: m(b).sum(), torch.ones(2, 4), {}).item()
        live.add_(1.0)
        after = sandbox.evaluate(lambda m, b: m(b).sum(), torch.ones(2, 4), {}).item()
    assert after == pytest.approx(before - 6.0, rel=1e-4)  # float32; eps = 1e-5 beside the variance of 1


def test_stand_ins_reach_every_place_a_parameter_is_kept() -> None:
    """Tied weights, lists, dicts, tuples and recurrent nets' flat weights all point at the same tensor."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight
            w = self.first.weight
            self.kept = [w, {"w": w}, (w, [w]), deque([w])]
            self.cell = nn.LSTM(2, 2)

    net = Many()
    alias = torch.full((2, 2), 7.0)
    flat = {p: torch.zeros_like(p) for p in net.cell.parameters()}

    def loss(module: Any, batch: Any) -> Tensor:
        w = module.first.weight
        assert w is alias
        assert module.second.weight is alias
        kept = module.kept
        assert all(x is alias for x in (kept[0], kept[1]["w"], kept[2][0], kept[2][1][0], kept[3][0]))
        assert float(module.cell(batch)[0].abs().sum()) == 0.0
        assert {id(p) for p in module.parameters()} == {id(alias), *map(id, flat.values())}
        return w.sum()

    with Sandbox(net) as sandbox:
        assert float(sandbox.evaluate(loss, torch.ones(3, 1, 2), {net.first.weight: alias, **flat})) == 28.0
    assert net.kept[0] is net.first.weight


def test_parameters_that_are_not_named_enter_as_constants() -> None:
    net = nn.Linear(2, 1)
    with Sandbox(net) as sandbox:
        loss = sandbox.evaluate(lambda m, b: m(b).sum(), torch.ones(1, 2), {})
    assert not loss.requires_grad


def test_no_gradient_hook_of_the_user_fires() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    calls: Counter[str] = Counter()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: calls.update([name])

    net[2].weight.register_hook(note("tensor"))
    net[2].weight.register_post_accumulate_grad_hook(note("accumulated"))
    net[2].register_full_backward_hook(note("module"))
    net[2].register_full_backward_pre_hook(note("module-pre"))
    torch.autograd.graph.register_multi_grad_hook(list(net.parameters()), note("several"))
    handle = net[2].register_forward_hook(note("forward"))
    measure(net, [busy_batch()])
    assert set(calls) == {"forward"}  # part of what the loss is
    handle.remove()
    calls.clear()
    net(busy_batch()["x"]).sum().backward()
    assert calls == Counter({name: 1 for name in ("tensor", "accumulated", "module", "module-pre", "several")})


def test_autocast_of_the_caller_is_off_inside() -> None:
    net = nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Sandbox(net) as sandbox:
            assert sandbox.evaluate(lambda m, b: m(b), torch.ones(1, 4), {}).dtype == torch.float32
        assert net(torch.ones(1, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_records_a_graph_whatever_the_caller_does(context: Callable[[], Any]) -> None:
    net = nn.Linear(4, 1)
    with context(), Sandbox(net) as sandbox:
        alias = net.weight.detach().requires_grad_()
        assert sandbox.evaluate(lambda m, b: m(b).sum(), torch.ones(1, 4), {net.weight: alias}).requires_grad


@pytest.mark.parametrize("name", ["scaled-dot-product", "multi-head", "encoder-layer"])
def test_attention_can_be_differentiated_twice(name: str) -> None:
    """The fused kernels cannot; outside the sandbox the same loss raises or has no second derivative."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.heads = nn.MultiheadAttention(8, 2, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            if name == "scaled-dot-product":
                heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
                return F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            return self.heads(x, x, x, need_weights=False)[0] if name == "multi-head" else self.layer(x)

    net = Attend()

    def loss(module: Any, batch: Any) -> Tensor:
        return module(batch).square().mean()

    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    reading = measure_stability(net, loss, [x], torch.optim.SGD(net.parameters(), lr=0.1))
    assert reading.edge_ratio is not None
    assert reading.edge_ratio > 0.0
    if name == "scaled-dot-product":
        g = torch.autograd.grad(loss(net, x), net.inner.weight, create_graph=True)[0]
        with pytest.raises(RuntimeError, match="not implemented"):
            torch.autograd.grad(g.sum(), net.inner.weight)


def test_choice_of_attention_kernels_is_put_back() -> None:
    net = nn.Linear(2, 2)
    flags = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        before = [flag() for flag in flags]
        with Sandbox(net):
            assert not any(flag() for flag in flags)
        assert [flag() for flag in flags] == before


@pytest.mark.compiles
@pytest.mark.slow  # importing the compiler can take most of a minute
@pytest.mark.filterwarnings("ignore")
def test_compiled_module_runs_eagerly_and_is_not_compiled_again() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    exact = measure_stability(plain, busy_loss, [busy_batch()], torch.optim.SGD(plain.parameters(), lr=0.1), rtol=1e-5)
    compiled = nn.Sequential(torch.compile(plain[:2], backend="aot_eager"), plain[2])
    batch = busy_batch()
    for _ in range(2):  # the second time under training's own guards
        F.cross_entropy(compiled(batch["x"]), batch["y"]).backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = measure_stability(compiled, busy_loss, [batch], torch.optim.SGD(compiled.parameters(), lr=0.1), rtol=1e-5)
    assert found.edge_ratio == pytest.approx(exact.edge_ratio, rel=1e-4)
    F.cross_entropy(compiled(batch["x"]), batch["y"]).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0


def test_spectral_norm_keeps_its_vectors() -> None:
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))
    before = {name: (b, b.clone()) for name, b in net.named_buffers()}
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with Sandbox(net) as sandbox:
        losses = [sandbox.evaluate(lambda m, b: m(b).square().mean(), x, {}).item() for _ in range(3)]
    assert losses[0] == losses[1] == losses[2]
    for name, b in net.named_buffers():
        assert b is before[name][0]
        assert torch.equal(b, before[name][1])


def test_overrides_hold_inside_only() -> None:
    class Logging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[int] = []

        def log(self, value: int) -> None:
            self.rows.append(value)
            raise AssertionError("not to be called")

        def forward(self, x: Tensor) -> Tensor:
            self.log(1)
            return x.sum()

    net = nn.Sequential(Logging())
    with Sandbox(net, overrides=lambda m: {"log": lambda *_: None} if isinstance(m, Logging) else {}) as sandbox:
        assert float(sandbox.evaluate(lambda m, b: m(b), torch.ones(3), {})) == 3.0
    assert "log" not in vars(net[0])
    with pytest.raises(AssertionError, match="not to be called"):
        net(torch.ones(3))


def test_torchscript_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match=r"torch.jit"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="Expected eager sub-modules, got TorchScript in '0'"):
        Sandbox(nn.Sequential(scripted))


def test_lazy_module_is_not_initialized_by_a_reading() -> None:
    """Its weights would be drawn under the sandbox's seed, and training would go on from those."""
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="uninitialized parameter"), Sandbox(net) as sandbox:
        sandbox.evaluate(lambda m, b: m(b).sum(), torch.ones(1, 2), {})
    assert isinstance(net[1], nn.LazyLinear)
    assert isinstance(net[1].weight, nn.UninitializedParameter)


def test_casting_reaches_buffers_attributes_parameters_and_batch() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("shift", torch.ones(2))
            self.register_buffer("index", torch.tensor([1, 0]))
            self.scales = [torch.ones(2)]

        def forward(self, x: Tensor) -> Tensor:
            assert {t.dtype for t in (x, self.shift, self.scales[0], self.linear.weight)} == {torch.float64}
            assert self.index.dtype == torch.int64
            return (self.linear(x)[:, self.index] * self.scales[0] + self.shift).sum()

    net = Mixed()
    with Sandbox(net) as sandbox:
        assert sandbox.evaluate(lambda m, b: m(b["x"]), {"x": torch.ones(1, 2)}, {}, dtype=torch.float64).dtype == (
            torch.float64
        )
    assert net.shift.dtype == torch.float32


def test_attribute_added_by_a_forward_pass_is_gone() -> None:
    class Lazy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.cache = x * 2
            self.register_buffer("later", x)
            self.child = nn.Linear(1, 1)
            return x.sum()

    net = Lazy()
    with Sandbox(net) as sandbox:
        sandbox.evaluate(lambda m, b: m(b), torch.ones(2), {})
    assert not hasattr(net, "cache")
    assert not hasattr(net, "later")
    assert list(net.children()) == []


def test_cyclic_attributes_are_copied_once() -> None:
    net = nn.Linear(1, 1)
    net.loop = [1]
    net.loop.append(net.loop)

    def loss(module: Any, batch: Any) -> Tensor:
        assert module.loop is not net_loop
        assert module.loop[1] is module.loop
        module.loop.append(2)
        return module(batch).sum()

    net_loop = net.loop
    with Sandbox(net) as sandbox:
        sandbox.evaluate(loss, torch.ones(1, 1), {})
    assert len(net.loop) == 2


def test_preserve_rng_puts_the_generators_back() -> None:
    before = rng_states()

    def draw() -> None:
        with preserve_rng():
            torch.manual_seed(1), np.random.seed(1), random.seed(1)  # noqa: NPY002
            torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
            raise KeyError

    with pytest.raises(KeyError):
        draw()
    assert _same(rng_states(), before)


# Batches.

Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Tensor
    name: str
    parts: list[Tensor]


@dataclass(frozen=True)
class FrozenSample:
    x: Tensor


class Unknown:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: Any) -> "Unknown":
        return Unknown(self.x.to(device))


def build_batches() -> dict[str, Any]:
    t = torch.ones
    return {
        "tensor": t(2),
        "tuple": (t(2), t(3), "name"),
        "list": [t(2), [t(3), (t(4),)]],
        "dict": {"a": t(2), "b": {"c": t(3)}},
        "ordered": OrderedDict(a=t(2), b=t(3)),
        "user-dict": UserDict(a=t(2), b=[t(3)]),
        "namedtuple": Pair(t(2), t(3)),
        "dataclass": Sample(t(2), "name", [t(3)]),
        "frozen-dataclass": FrozenSample(t(2)),
        "object": Unknown(t(2)),
        "mixed": [{"a": Pair(t(2), Sample(t(3), "n", [t(4)]))}, 5, None],
    }


@pytest.mark.parametrize("name", build_batches())
def test_batches_keep_their_structure_and_are_copied_deeply(name: str) -> None:
    batch = build_batches()[name]
    copied = clone_batch(batch)
    assert type(copied) is type(batch)
    originals, copies = list(batch_tensors(batch)), list(batch_tensors(copied))
    assert [len(t) for t in copies] == [len(t) for t in originals]
    for a, b in zip(originals, copies, strict=True):
        b.add_(1.0)
        assert float(a.sum()) == len(a)


@pytest.mark.parametrize("name", build_batches())
def test_batches_are_moved_wherever_something_can_be(name: str) -> None:
    moved = move_batch(build_batches()[name], "meta")
    assert type(moved) is type(build_batches()[name])
    tensors = list(batch_tensors(moved))
    assert tensors
    assert {t.device.type for t in tensors} == {"meta"}


def test_tensors_come_in_order_of_appearance() -> None:
    batch = {"text": "ab", "x": torch.zeros(3), "rest": [Pair(torch.zeros(4), 1), Unknown(torch.zeros(5))]}
    assert [len(t) for t in batch_tensors(batch)] == [3, 4, 5]


def test_mapping_leaves_strings_and_leaves_alone() -> None:
    assert map_batch({"a": ["text", 1, None]}, lambda leaf: (leaf,)) == {"a": [("text",), (1,), (None,)]}


def test_inference_tensors_become_ordinary_copies() -> None:
    with torch.inference_mode():
        x = torch.ones(2)
    copied = clone_batch([x])[0]
    assert not copied.is_inference()
    assert not copied.requires_grad


def test_parameters_not_named_are_constants_in_every_evaluation() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    named = {net[0].weight: net[0].weight.detach()}
    with Sandbox(net) as sandbox:
        for _ in range(2):
            assert not sandbox.evaluate(lambda m, x: m(x).sum(), torch.ones(1, 2), named).requires_grad


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.Linear])
def test_cudnn_is_off_only_for_recurrent_modules_and_put_back(
    kind: Any, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("as where a user has set fp32_precision")

    monkeypatch.setattr(torch.backends.cudnn, "flags", raises)
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled
    try:
        with Sandbox(nn.Sequential(kind(3, 3))):
            assert torch.backends.cudnn.enabled is (enabled and kind is nn.Linear)
        assert torch.backends.cudnn.enabled is enabled
    finally:
        torch.backends.cudnn.enabled = before
