"""The optimizers on a smoothed loss against SGD, on scikit-learn's digits, at equal numbers of gradients."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from eos_monitor.optim import BurgersSGD, ElasticSGD, EntropySGD, HamiltonJacobi, HeatSmoothing, recompute_batch_norm

_BATCH = 64
_TRAINING = 1297  # of 1797; 20 whole batches


@dataclass(frozen=True)
class Method:
    """An optimizer with its settings.

    Attributes:
        name: In words.
        settings: In the papers' symbols.
        build: Makes it from parameters and a generator for its noise.
    """

    name: str
    settings: str
    build: Callable[[Iterator[nn.Parameter], torch.Generator], Optimizer]


# The paper's scoping is 10⁻³ a step.
METHODS = (
    Method("SGD", "η = 0.1", lambda params, g: SGD(params, lr=0.1)),
    Method(
        "Entropy-SGD",
        "η = γ = 1, η′ = 0.1, L = 20",
        lambda params, g: EntropySGD(params, lr=1.0, gamma=1.0, scoping=1e-3),
    ),
    Method(
        "Entropy-SGD, noise",
        "the same, T = 5·10⁻⁷",
        lambda params, g: EntropySGD(params, lr=1.0, gamma=1.0, temperature=5e-7, scoping=1e-3, generator=g),
    ),
    Method(
        "Hamilton–Jacobi",
        "η = 0.5, γ = 1, L = 5",
        lambda params, g: HamiltonJacobi(params, lr=0.5, gamma=1.0, scoping=1e-3),
    ),
    Method(
        "Hamilton–Jacobi, narrow",
        "η = 0.5, γ = 0.1, L = 5",
        lambda params, g: HamiltonJacobi(params, lr=0.5, gamma=0.1, scoping=1e-3),
    ),
    Method(
        "Heat",
        "η = 0.5, γ = 10⁻⁴, L = 5",
        lambda params, g: HeatSmoothing(params, lr=0.5, gamma=1e-4, scoping=1e-3, generator=g),
    ),
    Method(
        "Elastic-SGD",
        "4 workers, η′ = 0.1, η = γ = 1, L = 1",
        lambda params, g: ElasticSGD(params, lr=0.1, workers=4, gamma=1.0),
    ),
    # Tuned on seeds 100 to 103 among η′ = 0.1, 0.2, 0.4, γ = 1, 10 and L = 1, 5.
    Method(
        "Elastic-SGD, tuned",
        "4 workers, η′ = 0.4, η = γ = 1, L = 1",
        lambda params, g: ElasticSGD(params, lr=0.4, workers=4, gamma=1.0),
    ),
    Method("Burgers", "δ = 0.1, γ = 1, L = 5", lambda params, g: BurgersSGD(params, lr=0.1, gamma=1.0)),
)


@dataclass(frozen=True)
class Comparison:
    """What the runs of one method showed.

    Attributes:
        method: Which.
        epochs: Effective epochs at which it was tested: gradients of all workers, in passes through the data.
        errors: Test error in percent: for each seed, at each of ``epochs``.
    """

    method: Method
    epochs: tuple[float, ...]
    errors: tuple[tuple[float, ...], ...]

    @property
    def final(self) -> tuple[float, ...]:
        """Test error of each seed at the end."""
        return tuple(run[-1] for run in self.errors)

    def difference(self, other: Comparison) -> tuple[float, float]:
        """Return the mean of the paired differences of the final errors, and half its 95 % interval (Student's t)."""
        pairs = [a - b for a, b in zip(self.final, other.final, strict=True)]
        if len(pairs) < 2:
            return pairs[0], float("nan")
        quantile = float(student.ppf(0.975, len(pairs) - 1))
        return statistics.fmean(pairs), quantile * statistics.stdev(pairs) / len(pairs) ** 0.5


def compare_optimizers(
    methods: Sequence[Method] = METHODS, *, seeds: Sequence[int] = range(8), epochs: int = 30, tests: int = 6
) -> list[Comparison]:
    """Train a small net with each method and each seed; the first method is what the others are compared with.

    A seed stands for a split of the data, initial weights and an order of mini-batches, the same for all methods.

    Args:
        methods: What to compare.
        seeds: Seeds.
        epochs: Effective epochs.
        tests: How often to measure the test error, at equal distances.
    """
    compared = []
    for method in methods:
        runs = [_train(method, seed, epochs, tests) for seed in seeds]
        compared.append(Comparison(method, runs[0][0], tuple(errors for _, errors in runs)))
    return compared


def _train(method: Method, seed: int, epochs: int, tests: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    g = torch.Generator().manual_seed(seed)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    order = torch.randperm(len(images), generator=g)
    images = (images[order] / 16).float().view(-1, 1, 8, 8)
    labels = labels[order]
    x = images[:_TRAINING]
    test = images[_TRAINING:], labels[_TRAINING:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # initial weights and dropout
        net = _net()
        optimizer = method.build(net.parameters(), torch.Generator().manual_seed(seed))
        batches = _endless(x, labels[:_TRAINING], g)

        def closure() -> float:
            images, labels = next(batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        calls = int(getattr(optimizer, "closure_calls", 1))
        per_epoch = _TRAINING // _BATCH
        done = 0
        measured: list[float] = []
        errors: list[float] = []
        for target in range(1, tests + 1):
            while done + calls <= target * epochs * per_epoch / tests:
                optimizer.step(closure)
                done += calls
            measured.append(done / per_epoch)
            errors.append(_error(net, x, *test))
    return tuple(measured), tuple(errors)


def _endless(x: Tensor, y: Tensor, g: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        order = torch.randperm(len(x), generator=g)[: len(x) // _BATCH * _BATCH]
        for chosen in order.view(-1, _BATCH):
            yield x[chosen], y[chosen]


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(256, 10),
    )


def _error(net: nn.Module, training: Tensor, images: Tensor, labels: Tensor) -> float:
    """Return the test error in percent, with the batch statistics of these weights."""
    recompute_batch_norm(net, torch.split(training, len(training) // 5))
    net.eval()
    with torch.no_grad():
        wrong = net(images).argmax(1) != labels
    net.train()
    return 100 * float(wrong.float().mean())


def comparison_table(compared: Sequence[Comparison]) -> str:
    """Return the final errors as a table in Markdown."""
    first = compared[0]
    lines = [
        f"| optimizer | settings | test error, % | minus {first.method.name} (95 %) | effective epochs |",
        "|---|---|---|---|---|",
    ]
    for one in compared:
        spread = statistics.stdev(one.final) if len(one.final) > 1 else float("nan")
        mean, half = one.difference(first)
        difference = "" if one is first else f"{mean:+.2f} ± {half:.2f}"
        lines.append(
            f"| {one.method.name} | {one.method.settings} | {statistics.fmean(one.final):.2f} ± {spread:.2f} "
            f"| {difference} | {one.epochs[-1]:g} |"
        )
    return "\n".join(lines)


def comparison_figure(compared: Sequence[Comparison], path: Path) -> Path:
    """Draw the mean test error over effective epochs, and the final differences to the first; write it to a file.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    first = compared[0]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle(f"scikit-learn's digits, {len(first.errors)} seeds")
    curves, differences = figure.subplots(1, 2)
    for one, marker in zip(compared, cycle("os^vD<>PX"), strict=False):
        curves.plot(one.epochs, torch.tensor(one.errors).mean(0), marker=marker, label=one.method.name)
    curves.set(xlabel="effective epochs (gradients / gradients in a pass)", ylabel="mean test error, %", ylim=(0, None))
    curves.legend()
    means, halves = zip(*(one.difference(first) for one in compared[1:]), strict=True)
    rows = range(len(means))
    differences.errorbar(means, rows, xerr=halves, fmt="o", capsize=4)
    differences.axvline(0, color="grey")
    differences.set_yticks(rows, [one.method.name for one in compared[1:]])
    differences.invert_yaxis()
    differences.set_xlabel(f"final test error minus {first.method.name}'s, points (mean, 95 %)")
    figure.savefig(path, dpi=120)
    return path
