"""Train under a schedule whose learning rate jumps too far, without and with a monitor that may lower it.

Run it with ``python examples/lr_governor.py``; it needs scikit-learn and matplotlib, and writes ``lr_governor.png``.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor, Probe, StabilityActions

JUMP = 100  # step


class Classifier(LightningModule):
    """SGD with momentum; the learning rate is raised 150 times at step 100."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the mean squared error to the one-hot labels."""
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 10).float())

    def configure_optimizers(self) -> dict:
        """Schedule the jump."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        jump = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < JUMP else 150.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": jump, "interval": "step"}}


class Losses(Callback):
    """Keep the losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: D102
        self.values.append(float(outputs["loss"]))


def train(steps: int, *, dry_run: bool) -> tuple[list[float], EdgeOfStabilityMonitor, StabilityActions]:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.as_tensor(images[:512] / 16, dtype=torch.float32), torch.as_tensor(labels[:512]))
    losses = Losses()
    monitor = EdgeOfStabilityMonitor(every_n_steps=10, probe=Probe(samples=512))
    actions = StabilityActions("cap-lr", "restore", dry_run=dry_run)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses, monitor, actions],
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=512))
    return losses.values, monitor, actions


def draw(runs: dict[str, tuple[list[float], EdgeOfStabilityMonitor, StabilityActions]]) -> None:
    figure, axes = plt.subplots(3, 1, figsize=(8, 7.5), sharex=True, layout="constrained")
    for (label, (losses, monitor, _)), color in zip(runs.items(), ("tab:red", "tab:blue"), strict=True):
        steps = [reading.step for reading in monitor.readings]
        axes[0].semilogy(losses, color=color, label=label)
        axes[1].semilogy(steps, [r.edge_ratio or float("nan") for r in monitor.readings], ".-", color=color)
        axes[2].semilogy(steps, [r.lr[0] for r in monitor.readings], ".-", color=color)
    axes[0].set(ylabel="loss", ylim=(1e-3, 1e2))
    axes[1].axhline(1.0, color="gray", lw=0.8)
    axes[1].set(ylabel="edge ratio", ylim=(1e-2, 1e2))
    axes[2].set(ylabel="learning rate in use", xlabel="step")
    axes[0].legend()
    figure.savefig("lr_governor.png", dpi=120)
    plt.close(figure)


def main(steps: int = 500) -> list[str]:
    dry = train(steps, dry_run=True)
    acting = train(steps, dry_run=False)
    draw({"dry run": dry, "acting": acting})
    for losses, _, actions in (dry, acting):
        print(f"last loss {losses[-1]:.3g}")
        for action in actions.done:
            print(f"  step {action['step']}: {action['message']}")
    return [action["message"] for _, _, actions in (dry, acting) for action in actions.done]


if __name__ == "__main__":
    main()
