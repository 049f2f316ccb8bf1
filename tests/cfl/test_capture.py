"""Which layers and activations one evaluation is seen to go through."""

import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eos_monitor.cfl.calls import Capture, LayerCall, Observer
from eos_monitor.cfl.capture import capture, layer_names
from eos_monitor.isolation.sandbox import Sandbox

X = torch.linspace(-1.5, 2.0, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6).sin()


def taken(
    module: nn.Module,
    x: Any = X,
    *,
    loss_fn: Callable[[Any, Any], Tensor] = lambda m, x: m(x).square().mean(),
    observers: tuple[Observer, ...] = (),
    previous: Mapping[Tensor, Tensor] | None = None,
) -> Capture:
    parameters: dict[Tensor, Tensor] = {p: p.detach().requires_grad_() for p in module.parameters() if p.requires_grad}
    with Sandbox(module) as sandbox:
        return capture(sandbox, module, loss_fn, x, parameters=parameters, observers=observers, previous=previous)


def followers(captured: Capture) -> dict[str, Any]:
    return {
        call.name: (call.activation.activation.name, call.activation.via) if call.activation else call.reason
        for call in captured.layers
    }


class Functional(nn.Module):
    """One convolution, and whatever a function does to what it puts out."""

    def __init__(self, behind: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.beta = nn.Parameter(torch.tensor([0.5, 1.0, 1.5, 2.0]))
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, self.conv(x))


def gelu_by_hand(m: Any, z: Tensor) -> Tensor:
    return 0.5 * z * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))


PLAIN = {
    "F.relu": (lambda m, z: F.relu(z), "relu"),
    "F.relu-in-place": (lambda m, z: F.relu(z, inplace=True), "relu"),
    "relu_": (lambda m, z: z.relu_(), "relu"),
    "nn.ReLU-in-place": (lambda m, z: nn.ReLU(inplace=True)(z), "relu"),
    "nn.GELU": (lambda m, z: nn.GELU()(z), "gelu"),
    "torch.tanh": (lambda m, z: torch.tanh(z), "tanh"),
    "sigmoid": (lambda m, z: z.sigmoid(), "sigmoid"),
    "clamp": (lambda m, z: z.clamp(min=0), "clamp"),
    "softplus": (lambda m, z: F.softplus(z, beta=2.0), "softplus"),
    "swish": (lambda m, z: z * torch.sigmoid(z), "silu"),
    "swish-beta": (lambda m, z: torch.sigmoid(z * 1.7) * z, "silu"),
    "swish-per-channel": (lambda m, z: z * torch.sigmoid(m.beta[:, None, None] * z), "silu"),
    "papers-swish": (lambda m, z: z / (1 + torch.exp(-z)), "composition"),
    "mish-by-hand": (lambda m, z: z * torch.tanh(F.softplus(z)), "composition"),
    "gelu-by-hand": (gelu_by_hand, "composition"),
    "squared-relu": (lambda m, z: F.relu(z).square(), "composition"),
    "relu-times-relu": (lambda m, z: F.relu(z) * F.relu(z), "composition"),
    "gate-of-another": (lambda m, z: torch.sigmoid(z) * m.other(X), "sigmoid"),
}


@pytest.mark.parametrize("form", PLAIN)
def test_activation_right_behind_a_layer(form: str) -> None:
    behind, name = PLAIN[form]
    net = Functional(behind)
    values: dict[int, tuple[Any, Tensor]] = {}

    def watch(call: LayerCall, activation: Any, z: Tensor, before: Tensor | None) -> None:
        assert before is None
        values[call.index] = (activation, z.clone())

    captured = taken(net, observers=(watch,))
    assert followers(captured)["conv"] == (name, ())
    # What the observer saw last is the layer's output, whatever was written over it since.
    activation, z = values[0]
    assert torch.equal(z, net.conv(X))
    if form != "gate-of-another":
        assert torch.allclose(activation.function(z), behind(net, net.conv(X)), atol=1e-6)


BETWEEN = {
    "batch_norm": (lambda m, z: F.relu(m.norm(z)), ("batch_norm",)),
    "dropout": (lambda m, z: F.relu(F.dropout(z, 0.3)), ("dropout",)),
    "dropout-in-eval": (lambda m, z: F.relu(F.dropout(z, 0.3, training=False)), ()),
    "residual": (lambda m, z: (z + X[:, :1, :4, :4]).relu(), ("add",)),
    "residual-in-place": (lambda m, z: z.add_(X[:, :1, :4, :4]).relu_(), ("add",)),
    "reshape": (lambda m, z: torch.tanh(z.flatten(1)), ("reshape",)),
    "contiguous": (lambda m, z: torch.tanh(z.contiguous().clone()), ()),
    "cast": (lambda m, z: torch.tanh(z.double()), ("cast",)),
    "pool": (lambda m, z: F.relu(F.max_pool2d(z, 2)), ("pool",)),
    "scale": (lambda m, z: torch.tanh(m.beta[:, None, None] * z), ("scale",)),
    "chunk": (lambda m, z: F.silu(z.chunk(2, 1)[0]) * z.chunk(2, 1)[1], ("slice",)),
    "several": (lambda m, z: F.gelu(F.dropout(m.norm(z)) + X[:, :1, :4, :4]), ("batch_norm", "dropout", "add")),
    "nearest": (lambda m, z: torch.tanh(z) + torch.tanh(F.dropout(z, 0.1)), ()),
}


@pytest.mark.parametrize("form", BETWEEN)
def test_path_to_the_activation_is_named(form: str) -> None:
    behind, via = BETWEEN[form]
    (activation,) = (call.activation for call in taken(Functional(behind)).layers)
    assert activation is not None
    assert activation.via == via


UNATTRIBUTED = {
    "nothing": (lambda m, z: z, "no elementwise activation follows (but pow)"),
    "two": (lambda m, z: F.relu(z) + torch.tanh(z), "several activations read its output (relu, tanh)"),
    "wavenet": (
        lambda m, z: torch.tanh(z[:, :2]) * torch.sigmoid(z[:, 2:]),
        "several activations read its output (tanh, sigmoid)",
    ),
    "glu": (lambda m, z: F.glu(z, dim=1), "no elementwise activation follows (but glu)"),
    "concatenated": (lambda m, z: F.relu(torch.cat([z, z])), "no elementwise activation follows (but cat)"),
    "softmax": (lambda m, z: z.softmax(1), "no elementwise activation follows (but softmax)"),
    "bounds": (lambda m, z: z.clamp(torch.zeros(())), "the regimes of this clamp cannot be told"),
    "unused": (lambda m, z: m.other(X), "no elementwise activation follows (its output is not seen again)"),
}


@pytest.mark.parametrize("form", UNATTRIBUTED)
def test_what_has_no_activation_says_why(form: str) -> None:
    behind, reason = UNATTRIBUTED[form]
    net = Functional(behind)
    found = followers(taken(net, loss_fn=lambda m, x: m(x).pow(2).mean()))["conv"]
    assert found == reason


def test_residual_sum_of_two_layers_belongs_to_both() -> None:
    assert followers(taken(Functional(lambda m, z: F.relu(z + m.other(X))))) == {
        "conv": ("relu", ("add",)),
        "other": ("relu", ("add",)),
    }


def test_residual_stream_keeps_the_nearest_activation() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            s = self.a(x)
            s = s + self.b(F.gelu(F.layer_norm(s, (4,))))
            return s + self.c(torch.tanh(F.layer_norm(s, (4,))))

    assert followers(taken(Stream(), torch.randn(5, 4))) == {
        "a": ("gelu", ("layer_norm",)),
        "b": ("tanh", ("add", "layer_norm")),
        "c": "no elementwise activation follows (but square)",
    }


LAYERS = {
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2), X[:, :, 0]),
    "conv-same": (nn.Conv1d(3, 4, 4, padding="same"), X[:, :, 0]),
    "conv2d": (nn.Conv2d(3, 6, 3, groups=3, dilation=2, padding=(1, 2)), X),
    "conv-circular": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), X),
    "conv3d": (nn.Conv3d(2, 4, 2), X[None]),
    "transposed-1d": (nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), X[:, :, 0]),
    "transposed-2d": (nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, 3, dilation=2), X),
    "transposed-3d": (nn.ConvTranspose3d(2, 4, 2), X[None]),
    "linear": (nn.Linear(6, 2, bias=False), X),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_call_repeats_the_layer(kind: str) -> None:
    layer, x = LAYERS[kind]
    x = x.transpose(0, 1) if x.ndim == 5 else x
    x = x[:2].transpose(0, 1) if x.ndim == 5 and x.shape[1] != 2 else x
    (call,) = taken(nn.Sequential(layer, nn.Tanh()), x).layers
    wanted = layer(x)
    assert (call.name, call.parameter) == ("0", layer.weight)
    assert (call.shape, call.dtype) == (wanted.shape, wanted.dtype)
    assert torch.equal(call.apply(call.weight, call.bias), wanted)


def test_edges_give_gradients_before_and_behind_what_is_written_over() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    y = torch.tensor([0, 1, 1, 0, 1])
    captured = taken(net, (x, y), loss_fn=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert captured.loss_call is not None
    assert captured.loss_call.edge is not None
    first, last = captured.layers
    assert first.activation is not None
    edges = (first.edge, first.activation.edge, last.edge, captured.loss_call.edge)
    found = torch.autograd.grad(captured.loss, edges)
    z = net[0](x).detach().requires_grad_()
    h = F.relu(z)
    out = net[2](h)
    wanted = torch.autograd.grad(F.cross_entropy(out, y), (z, h, out))
    for a, b in zip(found, (*wanted, wanted[-1]), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(captured.loss_call.input, out)
    assert captured.output is captured.loss_call.input


def test_batch_norm_right_behind_a_layer_is_noted_in_train_mode_only() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, eps=1e-3), nn.Linear(6, 6), nn.Dropout(), nn.BatchNorm1d(6))
    x = torch.randn(8, 6)
    first, second = taken(net, x).layers
    assert first.batch_norm is not None
    assert torch.equal(first.batch_norm.weight, net[1].weight)
    assert first.batch_norm.eps == 1e-3
    assert second.batch_norm is None
    assert all(call.batch_norm is None for call in taken(net.eval(), x).layers)


def test_previous_parameters_are_carried_to_the_activation() -> None:
    """Through batch statistics, one dropout mask, a residual sum and in place, against a second run of the net."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
            self.b = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.dropout(self.norm(self.a(x)), 0.4)
            h.add_(x)
            return self.b(F.relu(h.clone(), inplace=True))

    net = Net()
    x = torch.randn(9, 4)
    moved = {net.a.weight: net.a.weight.detach() + 0.1, net.a.bias: net.a.bias.detach() - 0.2}
    seen: list[tuple[Tensor, Tensor | None]] = []
    taken(net, x, observers=(lambda call, activation, z, before: seen.append((z.clone(), before)),), previous=moved)
    ((now, before),) = seen
    wanted = []
    for weight, bias in ((net.a.weight, net.a.bias), moved.values()):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)  # the sandbox's seed
            wanted.append(F.dropout(net.norm(F.linear(x, weight, bias)), 0.4) + x)
    assert torch.equal(now, wanted[0])
    assert before is not None
    assert torch.allclose(before, wanted[1], atol=1e-6)
    assert not torch.allclose(now, before, atol=1e-3)


class Odd(nn.Module):
    """All that is no layer call with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.cell = nn.GRUCell(4, 4)
        self.recurrent = nn.LSTM(4, 4, batch_first=True)
        self.old = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.matrix = nn.Parameter(torch.eye(4))
        self.other = nn.Parameter(torch.eye(4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.idle = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.embed = nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attend(x, x, x)[0] + self.recurrent(x)[0]
        x = self.cell(x[:, 0]) @ self.matrix.T + torch.einsum("ij,kj->ki", self.other, x[:, 1])
        x = F.relu(self.frozen(self.old(x)))
        return torch.tanh(self.twice(torch.tanh(self.twice(x)))) + self.embed.weight[0]


def test_what_is_no_layer_call_is_reported() -> None:
    captured = taken(Odd(), torch.randn(2, 3, 4))
    assert [(call.name, call.index) for call in captured.layers] == [("twice", 0), ("twice", 1)]
    missing = dict(captured.not_attributed)
    assert {name for name, p in layer_names(Odd()).items()} == {*missing, "twice"}
    for name, part in {
        "attend.in_proj_weight": "inside nn.MultiheadAttention",
        "attend.out_proj": "inside nn.MultiheadAttention",
        "cell.weight_ih": "inside a recurrent cell",
        "recurrent.weight_ih_l0": "inside a recurrent layer",
        "old": "its weight goes into",
        "matrix": "its weight goes into T,",
        "other": "its weight goes into einsum,",
        "frozen": "frozen",
        "idle": "not used in this batch",
        "embed": "its weight goes into getitem",
    }.items():
        assert missing[name].startswith(part), (name, missing[name])


def test_checkpoint_without_a_graph_is_reported() -> None:
    class Net(nn.Module):
        def __init__(self, *, reentrant: bool) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.reentrant = reentrant

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda h: torch.tanh(self.b(h)), self.a(x), use_reentrant=self.reentrant)

    x = torch.randn(3, 4)
    assert [call.name for call in taken(Net(reentrant=False), x).layers] == ["a", "b"]
    captured = taken(Net(reentrant=True), x)
    assert [call.name for call in captured.layers] == ["a"]
    assert captured.not_attributed["b"].startswith("computed without a graph")


def test_tied_weight_is_one_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    captured = taken(net, torch.randn(3, 4))
    assert [call.name for call in captured.layers] == ["0", "0"]
    assert captured.layers[0].bias is not captured.layers[1].bias


@pytest.mark.compiles
def test_compiled_module_is_seen() -> None:
    net = torch.compile(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), backend="eager")
    x = torch.randn(3, 4)
    net(x)
    assert followers(taken(net, x))["0"] == ("tanh", ())


@pytest.mark.parametrize(
    ("loss_fn", "name"),
    [
        (lambda m, x: F.mse_loss(m(x), x), "mse_loss"),
        (lambda m, x: nn.CrossEntropyLoss()(m(x), x.softmax(-1)), "cross_entropy"),
        (lambda m, x: F.binary_cross_entropy_with_logits(m(x), x.sigmoid()), "binary_cross_entropy_with_logits"),
        (lambda m, x: F.nll_loss(m(x).log_softmax(-1), x.argmax(-1)), "nll_loss"),
        (lambda m, x: F.mse_loss(m(x), x) + 1.0, None),
        (lambda m, x: F.mse_loss(m(x), x) + F.mse_loss(m(x), -x), None),
        (lambda m, x: F.huber_loss(m(x), x), None),
    ],
)
def test_loss_call_is_what_the_loss_is(loss_fn: Callable[[Any, Any], Tensor], name: str | None) -> None:
    captured = taken(nn.Linear(4, 4), torch.randn(3, 4), loss_fn=loss_fn)
    assert (captured.loss_call.name if captured.loss_call else None) == name
    assert captured.output is not None
    assert [call.name for call in captured.layers][0] == "weight"


@pytest.mark.parametrize("module", [nn.Embedding(4, 4), nn.LSTM(4, 4), nn.BatchNorm1d(4)], ids=type)
def test_model_without_layers_gets_one_message(module: nn.Module) -> None:
    x = torch.tensor([0, 1]) if isinstance(module, nn.Embedding) else torch.randn(3, 4)

    def loss(m: Any, x: Tensor) -> Tensor:
        out = m(x)
        return (out[0] if isinstance(out, tuple) else out).sum()

    with pytest.raises(ValueError, match="Expected a loss that runs through a Linear or convolution layer"):
        taken(module, x, loss_fn=loss)


def test_nothing_is_left_in_the_module_and_no_output_is_kept() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    attributes = {name: dict(m.__dict__) for name, m in net.named_modules()}
    outputs: list[Any] = []

    def watch(call: LayerCall, activation: Any, z: Tensor, before: Tensor | None) -> None:
        outputs.append(weakref.ref(z))

    parameters: dict[Tensor, Tensor] = {p: p.detach() for p in net.parameters()}
    with Sandbox(net) as sandbox:
        captured = capture(
            sandbox,
            net,
            lambda m, x: m(x).sum(),
            torch.randn(3, 4),
            parameters=parameters,
            observers=[watch],
            graph=False,
        )
        gc.collect()
        assert [ref() for ref in outputs] == [None]
    assert captured.layers[0].edge is None
    after = {name: dict(m.__dict__) for name, m in net.named_modules()}
    assert all(after[name].keys() == held.keys() for name, held in attributes.items())
    assert all(after[name][key] is value for name, held in attributes.items() for key, value in held.items())


def test_second_capture_in_one_sandbox_sees_the_same() -> None:
    net = Functional(PLAIN["swish"][0])
    parameters: dict[Tensor, Tensor] = {p: p.detach().requires_grad_() for p in net.parameters()}
    with Sandbox(net) as sandbox:
        first, second = (capture(sandbox, net, lambda m, x: m(x).sum(), X, parameters=parameters) for _ in range(2))
    assert followers(first) == followers(second)
    assert first.not_attributed == second.not_attributed
    assert first.layers[0].parameter is second.layers[0].parameter is net.conv.weight
