"""Train a small classifier as usual, with one line more: the monitor.

Run it with ``python examples/quickstart.py``; it needs scikit-learn.
"""

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor


class Classifier(LightningModule):
    """A network like any other: it knows nothing of the monitor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss of a minibatch."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train with SGD and momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(max_epochs: int = 30) -> str:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.as_tensor(images / 16, dtype=torch.float32), torch.as_tensor(labels))
    loader = DataLoader(data, batch_size=64, shuffle=True)

    # Without `every_n_steps` it reads as often as fits into 5 % of the training time: hardly ever in a run of seconds.
    monitor = EdgeOfStabilityMonitor(every_n_steps=50)
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[monitor],
        log_every_n_steps=10,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(), loader)

    report = monitor.report()
    print(report)
    print(f"Readings and figure: {trainer.log_dir}")
    return report


if __name__ == "__main__":
    main()
