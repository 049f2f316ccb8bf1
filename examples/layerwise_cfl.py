"""Drive a convolutional net to its edge on purpose, and see which layer takes it there.

Full-batch gradient descent on 384 of scikit-learn's digits, at a learning rate that is fine at first and then too high.
Run it with ``python examples/layerwise_cfl.py``: less than a minute on a CPU. It needs scikit-learn; the heat map,
matplotlib.
"""

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from eos_monitor import CFLMonitor, EdgeOfStabilityMonitor, Probe


class Classifier(LightningModule):
    """Three convolutions and a linear layer, without normalization: each layer has to bear the learning rate."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch of images."""
        for layer in (self.conv1, self.conv2, self.conv3):
            x = F.silu(layer(x))
        return self.head(x.flatten(1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the squared error on all images: it keeps a run at its edge, where cross-entropy lets it go."""
        images, labels = batch
        return (self(images) - F.one_hot(labels, 10)).square().sum(1).mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain gradient descent, whose limit is lr · λ_max = 2."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def main(steps: int = 200, lr: float = 0.6) -> str:
    torch.set_num_threads(1)  # the net is tiny: a second thread only waits
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor((images - images.mean()) / images.std(), dtype=torch.float32).reshape(-1, 1, 8, 8)
    data = [(images[:384], torch.as_tensor(labels[:384]))]

    monitor = CFLMonitor()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[EdgeOfStabilityMonitor(every_n_steps=4, probe=Probe(samples=384)), monitor],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(lr), DataLoader(data, batch_size=None))

    table = monitor.report()
    print(table)
    print(f"Times each layer crossed its own limit: {monitor.crossings}")
    print(f"Heat map: {trainer.log_dir}/cfl_layers.png")
    return table


if __name__ == "__main__":
    main()
