"""A run with the monitor is bit-identical to the run without it; a naive callback is not, so the test can fail."""

import random
import re
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from eos_monitor import EdgeOfStabilityMonitor, Probe, Solver
from tests.callbacks.runs import CLASSES, FEATURES, NAMESPACES, Case, differences, mlp, run, sgd

# ---------------------------------------------------------------- nets


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(2, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x.view(-1, 4, 2))[0][:, -1])


class Attention(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.embed, self.head, self.fused = nn.Linear(2, 8), nn.Linear(8, CLASSES), fused
        if not fused:
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x.view(-1, 4, 2))
        h = F.scaled_dot_product_attention(h, h, h) if self.fused else self.attention(h, h, h)[0]
        return self.head(h.mean(1))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = mlp(dropout=0.2), nn.Linear(CLASSES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(checkpoint(self.first, x, use_reentrant=False))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(FEATURES, FEATURES)
        self.b = nn.Linear(FEATURES, FEATURES)
        self.b.weight = self.a.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x).tanh()).tanh())


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = mlp(), nn.Linear(2, 2), nn.Linear(FEATURES, FEATURES)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(self.frozen(x))


def spectral(legacy: bool) -> nn.Module:
    net = mlp()
    (torch.nn.utils.spectral_norm if legacy else parametrizations.spectral_norm)(net[0])
    return net


def weight_normed() -> nn.Module:
    net = mlp()
    parametrizations.weight_norm(net[0])
    return net


def compiled() -> nn.Module:
    return nn.Sequential(torch.compile(mlp(), backend="aot_eager"), nn.Tanh())


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, FEATURES)),
        nn.Conv1d(1, 4, 3),
        nn.InstanceNorm1d(4, track_running_stats=True),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


# ---------------------------------------------------------------- what steps do


def noise_from_global_generators(module: Any, batch: Any) -> None:
    batch[0] += 0.01 * (torch.randn(()) + np.random.randn() + random.random())  # noqa: NPY002


def give_generators(module: Any) -> None:
    module.torch_noise = torch.Generator().manual_seed(1)
    module.numpy_noise = np.random.default_rng(2)
    module.python_noise = random.Random(3)


def use_generators(module: Any, batch: Any) -> None:
    batch[0] += 0.01 * torch.randn((), generator=module.torch_noise)
    batch[0] += 0.01 * (module.numpy_noise.standard_normal() + module.python_noise.random())


def give_containers(module: Any) -> None:
    module.recent, module.table = deque(maxlen=3), {"sum": torch.zeros(()), "nested": [{"count": 0}]}
    module.array, module.names = np.zeros(3), set()


def use_containers(module: Any, batch: Any) -> None:
    module.recent.append(float(batch[0].sum()))
    module.table["sum"] += batch[0].sum()
    module.table["nested"][0]["count"] += 1
    module.array[module.calls % 3] += 1
    module.names.add(module.calls)


def give_ema(module: Any) -> None:
    module.ema = [p.detach().clone() for p in module.net.parameters()]
    module.register_buffer("queue", torch.zeros(4))
    module.queue_at = 0


def use_ema(module: Any, batch: Any) -> None:
    for average, p in zip(module.ema, module.net.parameters(), strict=True):
        average.mul_(0.9).add_(p.detach(), alpha=0.1)
    module.queue[module.queue_at] = batch[0].sum()
    module.queue_at = (module.queue_at + 1) % 4


def edit_batch(module: Any, batch: Any) -> None:
    batch["x"].mul_(0.5)
    batch.pop("extra")


def count_gradient_hooks(module: Any) -> None:
    module.fired = [0, 0]
    weight = module.net[0].weight

    def on_gradient(gradient: torch.Tensor) -> None:
        module.fired[0] += 1

    def on_accumulated(parameter: torch.Tensor) -> None:
        module.fired[1] += 1

    weight.register_hook(on_gradient)
    weight.register_post_accumulate_grad_hook(on_accumulated)


def stop_early(module: Any, batch: Any) -> None:
    # A stop asked for by a reading's evaluation would cut the run short at its first reading.
    if module.calls >= 12:
        module.trainer.should_stop = True


# ---------------------------------------------------------------- manual optimization


def cross_entropy(module: Any, batch: Any) -> torch.Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def one_manual_optimizer(module: Any, batch: Any) -> None:
    optimizer = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(cross_entropy(module, batch))
    optimizer.step()


def two_manual_optimizers(module: Any, batch: Any) -> None:
    for optimizer in module.optimizers():
        optimizer.zero_grad()
        module.manual_backward(cross_entropy(module, batch))
        optimizer.step()


def halves(module: Any) -> Any:
    return [sgd(module.net[0].parameters()), torch.optim.Adam(module.net[3].parameters(), lr=0.01)]


def give_discriminator(module: Any) -> None:
    module.judge = nn.Sequential(nn.Linear(CLASSES, 8), nn.Tanh(), nn.Linear(8, 1))


def adversaries(module: Any) -> Any:
    return [sgd(module.net.parameters(), lr=0.01), sgd(module.judge.parameters(), lr=0.01)]


def adversarial_loss(module: Any, batch: Any) -> torch.Tensor:
    return F.softplus(-module.judge(module.net(batch[0]))).mean()


def adversarial_step(module: Any, batch: Any) -> None:
    generator, discriminator = module.optimizers()
    module.toggle_optimizer(generator)
    generator.zero_grad()
    module.manual_backward(adversarial_loss(module, batch))
    generator.step()
    module.untoggle_optimizer(generator)
    module.toggle_optimizer(discriminator)
    discriminator.zero_grad()
    fake = module.judge(module.net(batch[0]).detach())
    module.manual_backward(F.softplus(fake).mean())
    discriminator.step()
    module.untoggle_optimizer(discriminator)


# ---------------------------------------------------------------- failures inside a reading


class FailAt:
    """A loss that raises at its n-th evaluation: the graph, the self-check, a later reading."""

    def __init__(self, n: int) -> None:
        self.n, self.count = n, 0

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        self.count += 1
        loss = cross_entropy(module, batch)
        if self.count == self.n:
            raise RuntimeError("on purpose")
        return loss


class FailInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("on purpose")


def fails_in_backward(module: Any, batch: Any) -> torch.Tensor:
    return FailInBackward.apply(cross_entropy(module, batch))


# ---------------------------------------------------------------- the table

_WARM = {"max_epochs": 5}  # Adam's state is too young for an edge until step 31
_STEP = {"interval": "step"}

CASES: dict[str, Case] = {
    "plain": Case(),
    "batchnorm-dropout": Case(net=lambda: mlp(norm=True, dropout=0.3)),
    "torchmetrics": Case(metrics=True),
    "accumulate-bf16-clip-scheduler": Case(
        net=lambda: mlp(norm=True, dropout=0.3),
        metrics=True,
        scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
        trainer={"accumulate_grad_batches": 4, "precision": "bf16-mixed", "gradient_clip_val": 0.5},
    ),
    "adamw": Case(net=lambda: mlp(dropout=0.3), optimizer=lambda p: torch.optim.AdamW(p, lr=0.01), trainer=_WARM),
    "clip-by-norm": Case(trainer={"gradient_clip_val": 0.1}),
    "clip-by-value": Case(trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "onecycle": Case(
        scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=16),
    ),
    "plateau-that-fires": Case(
        validate=True,
        optimizer=lambda p: sgd(p, lr=2.0),
        scheduler=lambda o: {
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
            "monitor": "val_loss",
        },
        trainer={"max_epochs": 3},
    ),
    "epoch-scheduler": Case(
        scheduler=lambda o: {"scheduler": torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "interval": "epoch"}
    ),
    "nesterov-decay": Case(optimizer=lambda p: sgd(p, nesterov=True, weight_decay=0.01)),
    "two-groups": Case(
        optimizers=lambda m: torch.optim.SGD(
            [{"params": m.net[0].parameters(), "momentum": 0.9}, {"params": m.net[3].parameters()}], lr=0.1
        )
    ),
    "amsgrad": Case(optimizer=lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), trainer=_WARM),
    "lbfgs": Case(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), readings=0),
    "nadam": Case(optimizer=lambda p: torch.optim.NAdam(p, lr=0.01), trainer=_WARM),
    "rmsprop": Case(
        optimizer=lambda p: torch.optim.RMSprop(p, lr=0.01), monitor={"solver": Solver(raw_sharpness=True)}
    ),
    "without a threshold": Case(
        optimizer=lambda p: torch.optim.Rprop(p, lr=0.01), monitor={"solver": Solver(raw_sharpness=True)}, readings=0
    ),
    "manual-one-optimizer": Case(body=one_manual_optimizer, monitor={"loss_fn": cross_entropy}),
    "manual-two-optimizers": Case(
        body=two_manual_optimizers, optimizers=halves, monitor={"loss_fn": cross_entropy}, trainer=_WARM
    ),
    "adversarial": Case(
        state=give_discriminator,
        body=adversarial_step,
        optimizers=adversaries,
        monitor={"loss_fn": adversarial_loss},
    ),
    "lstm": Case(net=lambda: Recurrent(nn.LSTM)),
    "gru": Case(net=lambda: Recurrent(nn.GRU)),
    "spectral-norm": Case(net=lambda: spectral(legacy=False)),
    "spectral-norm-legacy": Case(net=lambda: spectral(legacy=True)),
    "weight-norm": Case(net=weight_normed, warns=True, readings=0),
    "fused-attention": Case(net=lambda: Attention(fused=True)),
    "multihead-attention": Case(net=lambda: Attention(fused=False)),
    "convolution-instancenorm-maxpool": Case(net=convolutional),
    "compiled-submodule": Case(net=compiled, slow=True),
    "activation-checkpointing": Case(net=Checkpointed),
    "tied-weights": Case(net=Tied),
    "unused-and-frozen": Case(net=PartlyUsed),
    "batch-edited-in-place": Case(batch=lambda x, y: {"x": x, "y": y, "extra": 1}, during=edit_batch),
    "queue-and-ema": Case(state=give_ema, during=use_ema),
    "containers": Case(state=give_containers, during=use_containers),
    "own-generators": Case(state=give_generators, during=use_generators),
    "global-generators": Case(during=noise_from_global_generators),
    "gradient-hooks": Case(state=count_gradient_hooks),
    "validation-twice-an-epoch": Case(validate=True, trainer={"val_check_interval": 0.5}),
    "early-stopping": Case(
        validate=True,
        callbacks=lambda pl, folder: [pl.callbacks.EarlyStopping("val_loss", patience=0, min_delta=10.0)],
        trainer={"max_epochs": 4},
    ),
    "checkpoints": Case(
        validate=True,
        callbacks=lambda pl, folder: [
            pl.callbacks.ModelCheckpoint(
                folder, monitor="val_loss", filename="{step}", save_top_k=1, enable_version_counter=False
            )
        ],
    ),
    "resume": Case(net=lambda: mlp(norm=True, dropout=0.3), resume=True),
    "weight-averaging": Case(
        callbacks=lambda pl, folder: [pl.callbacks.StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)],
        trainer={"max_epochs": 4},
    ),
    "stop-from-the-step": Case(during=stop_early, trainer={"max_epochs": 4}),
    "double-precision": Case(net=lambda: mlp(dropout=0.3), trainer={"precision": "64-true"}),
    "finite-differences": Case(net=lambda: mlp(dropout=0.3), monitor={"solver": Solver(method="fd")}),
    "all-modes-near-the-edge": Case(monitor={"solver": Solver(k="edge")}),
    "verified-at-every-reading": Case(net=lambda: mlp(norm=True), monitor={"verify": "always"}),
    "batch-probe-top3": Case(monitor={"probe": "batch", "solver": Solver(k=3)}),
    "relu-raw-sharpness": Case(
        net=lambda: mlp(activation=nn.ReLU),
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        monitor={"solver": Solver(raw_sharpness=True)},
        trainer=_WARM,
    ),
    "fails-at-the-graph": Case(monitor={"loss_fn": FailAt(1)}, warns=True),
    "fails-in-the-self-check": Case(monitor={"loss_fn": FailAt(6)}, warns=True),
    "fails-at-a-later-reading": Case(monitor={"loss_fn": FailAt(12)}, warns=True),
    "fails-in-backward": Case(monitor={"loss_fn": fails_in_backward}, warns=True, readings=0),
}

# The rows that both packages run in the fast suite; for the others one package will do there.
BASIC = ("plain", "batchnorm-dropout", "torchmetrics", "accumulate-bf16-clip-scheduler", "adamw")

PARAMETERS = [
    pytest.param(
        namespace,
        name,
        id=f"{name}-{namespace}",
        marks=[pytest.mark.slow, pytest.mark.compiles]
        if case.slow
        else [pytest.mark.slow]
        if name not in BASIC and namespace != NAMESPACES[0]
        else [],
    )
    for name, case in CASES.items()
    for namespace in NAMESPACES
]


def fresh(case: Case) -> dict[str, Any]:
    settings = {"every_n_steps": 2, "probe": Probe(samples=16), "alerts": (), **case.monitor}
    if isinstance(settings.get("loss_fn"), FailAt):
        settings["loss_fn"] = FailAt(settings["loss_fn"].n)
    return settings


@pytest.mark.parametrize(("namespace", "name"), PARAMETERS)
def test_monitor_leaves_the_run_bit_identical(namespace: str, name: str, tmp_path: Any) -> None:
    case = CASES[name]
    without = run(namespace, case, tmp_path / "without", lambda pl: None)
    with pytest.MonkeyPatch.context() as patch:
        if case.warns:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        monitored = run(namespace, case, tmp_path / "with", lambda pl: EdgeOfStabilityMonitor(**fresh(case)))
    assert differences(without["compared"], monitored["compared"]) == []
    readings = monitored["callback"].readings
    measured = sum(reading.edge_ratio is not None for reading in readings)
    assert measured >= 2 if case.readings is None else measured == case.readings
    assert len(monitored["ours"]) >= len(readings)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_naive_callback_is_caught(namespace: str, tmp_path: Any) -> None:
    def naive(pl: Any) -> Any:
        class Naive(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                loss = pl_module.training_step(batch, batch_idx)
                torch.autograd.grad(loss, [p for p in pl_module.parameters()], allow_unused=True)

        return Naive()

    case = CASES["accumulate-bf16-clip-scheduler"]
    without = run(namespace, case, tmp_path / "without", lambda pl: None)
    found = differences(without["compared"], run(namespace, case, tmp_path / "with", naive)["compared"])
    kinds = {re.split("[/:]", place)[1] for place in found}
    assert {"weights", "buffers", "gradients", "optimizer", "attributes", "callback_metrics", "rows", "rng"} <= kinds


def test_differences_sees_each_kind_of_change() -> None:
    a = {"t": torch.ones(2), "n": np.ones(2), "l": [1, 2.0], "nan": float("nan")}
    assert differences(a, {**a}) == []
    assert differences(a, {**a, "t": torch.zeros(2)}) == ["/t"]
    assert differences(a, {**a, "t": torch.ones(2).double()}) == ["/t"]
    assert differences(a, {**a, "n": np.zeros(2)}) == ["/n"]
    assert differences(a, {**a, "l": [1, 3.0]}) == ["/l/1"]
    assert differences(a, {"t": torch.ones(2)}) == [": keys ['l', 'n', 'nan']"]
