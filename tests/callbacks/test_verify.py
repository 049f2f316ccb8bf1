"""``verify`` finds what a reading changed beyond the sandbox's reach, names it, and stops; clean runs hear nothing."""

import functools
import importlib
import io
import itertools
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics import MeanMetric

import eos_monitor.callbacks.trainer_gauge as callback
from eos_monitor import EdgeOfStabilityMonitor, Probe, Solver
from eos_monitor.isolation import fingerprint as fingerprints
from eos_monitor.isolation.digests import word_sum
from eos_monitor.isolation.fingerprint import Fingerprint, fingerprint
from eos_monitor.monitor.engine import Engine
from eos_monitor.monitor.ranks import Ranks
from eos_monitor.monitor.verification import Verification
from tests.callbacks.runs import CLASSES, FEATURES, NAMESPACES, mlp
from tests.callbacks.runs import run as run_case
from tests.callbacks.test_identity import CASES, fresh

pl = importlib.import_module(NAMESPACES[0])
STEPS = 8

# ---------------------------------------------------------------- objects that the sandbox shares with a reading


class Kept:
    """With a finalizer the sandbox shares its instances: a copy would be finalized too."""

    __slots__ = ()

    def __del__(self) -> None: ...


class Box(Kept):
    """Any object of the user's."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


class Slotted(Kept):
    __slots__ = ("average", "never_set")

    def __init__(self) -> None:
        self.average = torch.zeros(3)


class Replay(Kept):
    def __init__(self) -> None:
        self.items: list[torch.Tensor] = []

    def push(self, item: torch.Tensor) -> None:
        self.items.append(item.detach())


class Stream(Kept):
    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> int:
        self.at += 1
        return self.at


class Tally:
    n = 0


GLOBAL = Box(n=0)


def squares() -> Any:
    for i in itertools.count():
        yield i * i


def increment(box: Any) -> None:
    box.n += 1


def give_hook(module: Any) -> None:
    features: list[torch.Tensor] = []
    module.net[0].register_forward_hook(lambda layer, inputs, output: features.append(output.detach()))


def give_view(module: Any) -> None:
    module.spare = nn.Linear(2, 2)
    module.view = Box(weight=module.spare.weight)


def decay(module: Any) -> None:
    module.trainer.optimizers[0].param_groups[0]["lr"] *= 0.999


def count_on_class(module: Any) -> None:
    type(module.tally).n += 1


def loader_of_numbers() -> Any:
    return iter(torch.utils.data.DataLoader(range(100_000)))


@dataclass(frozen=True)
class Leak:
    """What the module holds, what each training step does to it, and what of it is named."""

    give: Callable[[Any], None]
    use: Callable[[Any], Any]
    place: str


def held(name: str, make: Callable[[], Any]) -> Callable[[Any], None]:
    return lambda module: setattr(module, name, make())


LEAKS = {
    "tensor-in-an-object": Leak(
        held("ema", lambda: Box(average=torch.zeros(3))), lambda m: m.ema.average.add_(1), "ema.average"
    ),
    "tensor-in-a-list-in-an-object": Leak(
        held("ema", lambda: Box(shadow=[torch.zeros(3), torch.zeros(2)])),
        lambda m: m.ema.shadow[1].add_(1),
        "ema.shadow[1]",
    ),
    "tensor-in-slots": Leak(held("ema", Slotted), lambda m: m.ema.average.add_(1), "ema.average"),
    "replay-buffer": Leak(held("replay", Replay), lambda m: m.replay.push(torch.ones(2)), "replay.items"),
    "own-iterator": Leak(held("stream", Stream), lambda m: next(m.stream), "stream.at"),
    "list-iterator": Leak(held("stream", lambda: iter([0] * 10_000)), lambda m: next(m.stream), "stream"),
    "zipped-iterators": Leak(
        held("stream", lambda: zip(iter([0] * 10_000), itertools.count(), strict=False)),
        lambda m: next(m.stream),
        "stream[0]",
    ),
    "counter": Leak(held("stream", itertools.count), lambda m: next(m.stream), "stream"),
    "generator": Leak(held("stream", squares), lambda m: next(m.stream), "stream.i"),
    "iterator-over-a-loader": Leak(held("stream", loader_of_numbers), lambda m: next(m.stream), "stream"),
    "module-in-a-list": Leak(
        held("experts", lambda: [nn.BatchNorm1d(2)]),
        lambda m: m.experts[0](torch.ones(4, 2)),
        "experts[0].running_mean",
    ),
    "global-object": Leak(held("counter", lambda: GLOBAL), lambda m: increment(m.counter), "counter.n"),
    "array-in-an-object": Leak(
        held("stats", lambda: Box(sums=np.zeros(3))), lambda m: np.add.at(m.stats.sums, 1, 1.0), "stats.sums"
    ),
    "metric-in-a-dictionary": Leak(
        held("extra", lambda: {"loss": MeanMetric()}), lambda m: m.extra["loss"].update(1.0), "extra['loss'].mean_value"
    ),
    "generator-in-an-object": Leak(
        held("noise", lambda: Box(source=torch.Generator())),
        lambda m: torch.rand((), generator=m.noise.source),
        "noise.source",
    ),
    "list-captured-by-a-hook": Leak(give_hook, lambda m: None, ".features"),
    "partial-with-an-object": Leak(
        held("count", lambda: functools.partial(increment, Box(n=0))), lambda m: m.count(), "count.args[0].n"
    ),
    "bound-method": Leak(held("push", lambda: Replay().push), lambda m: m.push(torch.ones(1)), "push.__self__.items"),
    "class-attribute": Leak(held("tally", Tally), count_on_class, "Tally.n"),
    "object-replaced": Leak(
        held("holder", lambda: Box(inner=Box())), lambda m: m.holder.__dict__.update(inner=Box()), "holder.inner"
    ),
    "weights-through-data": Leak(give_view, lambda m: m.view.weight.data.add_(0.01), "spare.weight"),
    "gradient-through-an-object": Leak(
        give_view, lambda m: setattr(m.view.weight, "grad", torch.ones(2, 2)), "spare.weight.grad"
    ),
    "optimizer-state": Leak(
        lambda m: None,
        lambda m: [s["momentum_buffer"].add_(1) for s in m.trainer.optimizers[0].state.values()],
        "optimizer.state[net.0.weight]['momentum_buffer']",
    ),
    "learning-rate": Leak(lambda m: None, decay, "optimizer.param_groups[0]['lr']"),
    "scheduler": Leak(
        lambda m: None, lambda m: m.trainer.lr_scheduler_configs[0].scheduler.step(), "lr_schedulers[0].last_epoch"
    ),
}


def make_module(give: Callable[[Any], None], use: Callable[[Any], Any], since: int = 0) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(norm=True, dropout=0.2)
            give(self)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step >= since:
                use(self)
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)]

    return Module()


def fit(module: Any, monitor: Any, folder: Path) -> list[str]:
    torch.manual_seed(0)
    batches = [(torch.randn(8, FEATURES), torch.randint(CLASSES, (8,))) for _ in range(STEPS)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            callbacks=[monitor],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert trainer.global_step == STEPS  # whatever was found, training went on
    return [str(w.message) for w in caught if "eos_monitor" in str(w.message)]


def monitor_with(**settings: Any) -> Any:
    # The second batch fills the probe: the first reading precedes step 1, when the optimizer has its state.
    return EdgeOfStabilityMonitor(**{"every_n_steps": 1, "probe": Probe(samples=16), "alerts": (), **settings})


# ---------------------------------------------------------------- leaks are found and named


@pytest.mark.parametrize("verify", ["first", "always"])
@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_named_and_ends_the_measuring(name: str, verify: str, tmp_path: Path) -> None:
    leak = LEAKS[name]
    monitor = monitor_with(verify=verify)
    told = fit(make_module(leak.give, leak.use), monitor, tmp_path)
    assert len(told) == 1, told
    assert "stops measuring" in told[0]
    assert f"{leak.place} changed" in told[0]
    assert [reading.step for reading in monitor.readings] == [1]


@pytest.mark.parametrize(("verify", "last"), [("first", STEPS), ("always", 4), (False, STEPS)])
def test_only_always_finds_a_leak_of_a_later_reading(verify: Any, last: int, tmp_path: Path) -> None:
    leak = LEAKS["replay-buffer"]
    monitor = monitor_with(verify=verify)
    told = fit(make_module(leak.give, leak.use, since=4), monitor, tmp_path)
    assert monitor.readings[-1].step == last
    assert [f"{leak.place} changed" in message for message in told] == [True] * (last == 4)


def test_a_leak_of_a_reading_that_fails_is_named(tmp_path: Path) -> None:
    leak = LEAKS["replay-buffer"]

    def fails(module: Any, batch: Any) -> torch.Tensor:
        leak.use(module)
        raise RuntimeError("on purpose")

    monitor = monitor_with(loss_fn=fails)
    told = fit(make_module(leak.give, lambda m: None), monitor, tmp_path)
    assert ["on purpose" in told[0], f"{leak.place} changed" in told[1]] == [True, True]
    assert monitor.readings == []


def test_a_new_fit_is_verified_again(tmp_path: Path) -> None:
    leak, monitor = LEAKS["replay-buffer"], monitor_with()
    assert fit(make_module(leak.give, lambda m: None), monitor, tmp_path) == []
    assert len(fit(make_module(leak.give, leak.use), monitor, tmp_path)) == 1


# ---------------------------------------------------------------- clean runs hear nothing

CLEAN = [
    "torchmetrics",
    "accumulate-bf16-clip-scheduler",
    "adamw",
    "onecycle",
    "two-groups",
    "lbfgs",
    "adversarial",
    "lstm",
    "spectral-norm",
    "spectral-norm-legacy",
    "multihead-attention",
    "activation-checkpointing",
    "tied-weights",
    "unused-and-frozen",
    "queue-and-ema",
    "containers",
    "own-generators",
    "global-generators",
    "gradient-hooks",
    "stop-from-the-step",
    "double-precision",
    "relu-raw-sharpness",
    pytest.param("compiled-submodule", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name", CLEAN)
def test_nothing_is_found_where_the_sandbox_reaches(name: str, tmp_path: Path) -> None:
    """Every reading is verified; a warning would be an error here."""
    case = CASES[name]
    done = run_case(NAMESPACES[0], case, tmp_path / "run", lambda pl: monitor_of(case))
    assert len(done["callback"].readings) >= 2


def monitor_of(case: Any) -> Any:
    return EdgeOfStabilityMonitor(**{**fresh(case), "verify": "always"})


# ---------------------------------------------------------------- the option


@pytest.mark.parametrize(("verify", "looks"), [(False, 0), ("first", 2), ("always", 2 * STEPS)])
def test_how_often_it_looks(verify: Any, looks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Fingerprint:
        calls.append(1)
        return original(*args, **kwargs)

    original = callback.fingerprint
    monkeypatch.setattr(callback, "fingerprint", counted)
    monitor = monitor_with(verify=verify)
    assert fit(make_module(lambda m: None, lambda m: None), monitor, tmp_path) == []
    assert len(monitor.readings) == STEPS  # before the steps 1 to 7, and at the end
    assert len(calls) == looks


@pytest.mark.parametrize("value", ["last", "", True, None, 0, 1])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="verify"):
        EdgeOfStabilityMonitor(verify=value)


def test_a_failing_look_is_told_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Fingerprint:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(callback, "fingerprint", fails)
    monitor = monitor_with(verify="always")
    told = fit(make_module(lambda m: None, lambda m: None), monitor, tmp_path)
    assert len(told) == 1
    assert "could not verify" in told[0]
    assert len(monitor.readings) == STEPS


def test_all_processes_stop_together() -> None:
    """One process finds nothing and hears of what another found."""
    engine = Engine(Probe(), Solver())
    engine.ranks = Ranks(2, lambda flat: flat + 1.0)
    nothing = Fingerprint({}, (), [])
    with pytest.warns(UserWarning, match="another process"):
        Verification("always").around(lambda: nothing, engine, print, lambda: None)
    assert engine.off is not None


# ---------------------------------------------------------------- looking


class Touchy:
    """Complains about whatever code of its own is run."""

    def __init__(self) -> None:
        self.__dict__["inner"] = Box(value=torch.zeros(2))

    def _complain(self, *args: Any) -> Any:
        raise AssertionError("code of the user's ran")

    __getattr__ = __iter__ = __len__ = __eq__ = __bool__ = __repr__ = __reduce__ = __copy__ = _complain  # type: ignore[assignment]
    __hash__ = object.__hash__
    shape = __class__ = property(_complain)  # type: ignore[assignment]


class TouchyList(list):  # type: ignore[type-arg]
    __iter__ = __len__ = __getitem__ = Touchy._complain  # type: ignore[assignment]


class TouchyDict(dict):  # type: ignore[type-arg]
    __iter__ = __len__ = __getitem__ = items = keys = values = Touchy._complain  # type: ignore[assignment]


def holder(**attributes: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.__dict__.update(attributes)
    return module


def test_looking_runs_no_code_of_the_users() -> None:
    touchy, items, table = Touchy(), TouchyList([1.0, Box(n=0)]), TouchyDict(a=Box(n=0))
    module = holder(touchy=touchy, items=items, table=table)
    before = fingerprint(module)
    touchy.__dict__["inner"].value += 1
    list.__getitem__(items, 1).n += 1
    dict.__getitem__(table, "a").n += 1
    assert before.changes(fingerprint(module)) == ["touchy.inner.value", "items[1].n", "table['a'].n"]


def test_looking_leaves_no_trace() -> None:
    stream, numbers = itertools.cycle([1, 2, 3]), iter([1, 2, 3])
    next(stream)
    module = holder(stream=stream, numbers=numbers, generator=torch.Generator(), points=squares())
    optimizer = torch.optim.Adam(module.parameters())
    version, state, flags = module.weight._version, torch.get_rng_state(), warnings.filters[:]
    first = fingerprint(module, [optimizer])
    assert first.changes(fingerprint(module, [optimizer])) == []
    assert first.uncovered == ()
    assert len(optimizer.state) == 0
    assert module.weight.grad is None
    assert module.weight._version == version
    assert torch.equal(torch.get_rng_state(), state)
    assert warnings.filters == flags
    assert [next(stream), next(numbers), next(module.points)] == [2, 1, 0]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda m: m.weight.data.view(torch.int32)[1].bitwise_xor_(1), "weight"),  # one bit of the last digit
        (lambda m: m.weight.detach().mul_(1.0), "weight"),  # the values stay, the version that autograd checks does not
        (lambda m: m.table.pop("a"), "table"),
        (lambda m: m.table.update(a=-0.0), "table['a']"),
        (lambda m: m.names.add("c"), "names"),
        (lambda m: m.__dict__.update(flag=1), "flag"),  # not True
        (lambda m: m.weight.requires_grad_(False), "weight"),
        (lambda m: m.objects.__setitem__(1, 2), "objects[1]"),
        (lambda m: m.eval(), "training"),
        (lambda m: torch.rand(1), "the random state of torch"),
        (lambda m: np.random.rand(), "the random state of numpy"),  # noqa: NPY002
        (lambda m: random.random(), "the random state of python"),
        (lambda m: m.numbers.standard_normal(), "numbers"),
        (lambda m: setattr(m.box, "new", 1), "box"),
        (lambda m: m.sparse._values().add_(1), "sparse"),
        (lambda m: m.file.read(2), "file"),
    ],
)
def test_each_kind_of_change_is_seen(change: Callable[[Any], Any], place: str) -> None:
    module = holder(
        table={"a": 0.0, "b": float("nan")},
        names={"a", "b"},
        flag=True,
        objects=np.array([1, 1], dtype=object),
        numbers=np.random.default_rng(0),
        box=Box(),
        sparse=torch.eye(2).to_sparse(),
        file=io.BytesIO(b"0123"),
    )
    before = fingerprint(module)
    assert before.changes(fingerprint(module)) == []
    with torch.no_grad():
        change(module)
    assert before.changes(fingerprint(module)) == [place]


def test_lightning_and_what_is_left_out_may_change() -> None:
    class Logger(pl.loggers.logger.Logger):
        name = version = None
        log_metrics = log_hyperparams = None

    left, logger = Box(n=0), Logger()
    module = holder(left=left, logger=logger, loader=torch.utils.data.DataLoader([1]))
    before = fingerprint(module, leave_out=[left])
    left.n, logger.__dict__["rows"], module.loader.__dict__["extra"] = 1, [1], 1
    assert before.changes(fingerprint(module, leave_out=[left])) == []


def test_what_is_too_large_is_named_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def counted(array: Any) -> bytes:
        read.append(array.nbytes)
        return b""

    monkeypatch.setattr(fingerprints, "bytes_digest", counted)
    monkeypatch.setattr("eos_monitor.isolation.digests.bytes_digest", counted)
    rows, chain = list(range(fingerprints.MAX_ENTRIES + 1)), Box()
    for _ in range(100):
        chain = Box(next=chain)
    images = torch.zeros(fingerprints.MAX_BYTES + 1, dtype=torch.uint8)
    arrays = [np.zeros(fingerprints.MAX_BYTES // 4) for _ in range(3)]  # 2 MAX_BYTES each
    module = holder(data=Box(images=images), arrays=Box(arrays=arrays), rows=Box(rows=rows), chain=chain)
    before = fingerprint(module)
    assert sum(read) < 2**20
    assert set(before.uncovered) >= {"data.images", "arrays.arrays[0]", "rows.rows"}
    assert sum(place.startswith("chain.next") for place in before.uncovered) == 1
    images[0] = 1  # not read, but it counts its versions
    rows[5] = -1  # not read, but it is another object
    assert before.changes(fingerprint(module)) == ["data.images", "rows.rows"]


def test_cycles_end() -> None:
    box = Box(items=[])
    box.items.append(box)
    box.itself = box
    module = holder(box=box)
    before = fingerprint(module)
    box.items.append(1)
    assert before.changes(fingerprint(module)) == ["box.items"]


# ---------------------------------------------------------------- the digest for accelerators, here on the CPU


def sum_of(data: torch.Tensor) -> int:
    return word_sum(data.reshape(-1).view(torch.uint8))


def test_word_sums_see_every_small_change() -> None:
    g = torch.Generator().manual_seed(0)
    data = torch.randint(256, (4099,), generator=g, dtype=torch.uint8)
    sums = {sum_of(data)}
    for i in range(0, 4099, 7):
        changed = data.clone()
        changed[i] ^= 1 << (i % 8)
        sums.add(sum_of(changed))
    assert len(sums) == 1 + len(range(0, 4099, 7))
    assert sum_of(data) == sum_of(data.clone())
    # Not aligned to words.
    assert sum_of(data[1:]) == sum_of(data[1:].clone()) != sum_of(data[:-1])


def test_word_sums_see_order_and_signs() -> None:
    x = torch.randn(2_200_000, generator=torch.Generator().manual_seed(0))  # over two chunks
    swapped, mirrored = x.clone(), x.clone()
    swapped[[5, 2_100_000]] = x[[2_100_000, 5]]
    mirrored[::2] *= -1
    assert len({sum_of(v) for v in (x, swapped, mirrored, x.flip(0))}) == 4
    assert sum_of(torch.zeros(0)) == sum_of(torch.zeros(0))
