"""What people train by minibatches: the runs that cost, pauses and memory are measured on."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_CHARACTERS = 400_000


class Text(Dataset[tuple[Tensor, Tensor]]):
    """Windows of characters from the source of torch.nn."""

    def __init__(self, length: int, windows: int = 100_000) -> None:
        files = sorted(pathlib.Path(nn.__file__).parent.glob("modules/*.py"))
        text = "".join(path.read_text(errors="ignore") for path in files)[:_CHARACTERS]
        letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
        self.vocabulary = len(letters)
        self._ids = torch.tensor([letters[c] for c in text])
        self._length = length
        self._windows = windows

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        at = (i * 7919) % (len(self._ids) - self._length - 1)
        return self._ids[at : at + self._length], self._ids[at + 1 : at + self._length + 1]


class Block(nn.Module):
    """A pre-norm block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(pl.LightningModule):
    """A character model as people write it: GPT-2's initialization, AdamW with two groups, a warm-up."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                into_stream = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(p, std=0.02 / (2 * depth) ** 0.5 if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.token(x) + self.place(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(hidden)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [p for p in self.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        warm_up = torch.optim.lr_scheduler.LambdaLR(adamw, lambda t: min(1.0, (t + 1) / 100))
        return {"optimizer": adamw, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


class Residual(nn.Module):
    """A basic block of ResNet-18."""

    def __init__(self, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(b)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(b)
        same = a == b and stride == 1
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(z + self.skip(x))


def resnet18() -> nn.Module:
    """ResNet-18 for images of 32×32, 11 million parameters."""
    stages = [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]
    blocks = [block for a, b, stride in stages for block in (Residual(a, b, stride), Residual(b, b, 1))]
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mlp() -> nn.Module:
    """A net whose steps take 2 ms."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


class Classifier(pl.LightningModule):
    """A net and its SGD."""

    def __init__(self, net: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.net = net
        self.settings = settings

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **self.settings)


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Scikit-learn's digits, again and again; as color images of 32×32, or flat."""

    def __init__(self, *, images: bool) -> None:
        x, y = load_digits(return_X_y=True)
        x = torch.tensor((x - 4.9) / 6.0, dtype=torch.float32)
        if images:
            x = F.interpolate(x.view(-1, 1, 8, 8), scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1)
        self._x = x
        self._y = torch.tensor(y)

    def __len__(self) -> int:
        return 50 * len(self._x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self._x[i % len(self._x)], self._y[i % len(self._x)]


@dataclass(frozen=True)
class Workload:
    """A run that people have.

    Attributes:
        about: It in words.
        build: Makes the module and its data, of that many samples a batch.
        size: Samples in a batch.
        trainer: Settings of the Trainer.
    """

    about: str
    build: Callable[[], tuple[pl.LightningModule, Dataset[Any]]]
    size: int
    trainer: dict[str, Any]

    def make(self, seed: int = 0) -> tuple[pl.LightningModule, DataLoader[Any]]:
        """Return the module and its loader."""
        torch.manual_seed(seed)
        module, data = self.build()
        return module, DataLoader(data, self.size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def _gpt(width: int, depth: int, heads: int, length: int = 128) -> tuple[pl.LightningModule, Dataset[Any]]:
    text = Text(length)
    return GPT(text.vocabulary, length, width, depth, heads, lr=1e-3), text


def _resnet() -> tuple[pl.LightningModule, Dataset[Any]]:
    sgd = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    return Classifier(resnet18(), **sgd), Digits(images=True)


WORKLOADS = {
    "a": Workload("GPT, 2.7 M", lambda: _gpt(192, 6, 6), 8, {"gradient_clip_val": 1.0}),
    "b": Workload(
        "GPT, 2.7 M, bf16-mixed, accumulation 4",
        lambda: _gpt(192, 6, 6),
        8,
        {"gradient_clip_val": 1.0, "precision": "bf16-mixed", "accumulate_grad_batches": 4},
    ),
    "c": Workload("ResNet-18, 11 M", _resnet, 64, {}),
    "d": Workload("GPT, 31.6 M", lambda: _gpt(512, 10, 8), 2, {"gradient_clip_val": 1.0}),
    "e": Workload("MLP, 85 k", lambda: (Classifier(mlp(), lr=0.05), Digits(images=False)), 64, {}),
    "f": Workload("GPT-2's size, 124 M", lambda: _gpt(768, 17, 12), 1, {"gradient_clip_val": 1.0}),
}


def parameters(module: nn.Module) -> Iterator[int]:
    """Yield the sizes of the trained parameters."""
    return (p.numel() for p in module.parameters() if p.requires_grad)
