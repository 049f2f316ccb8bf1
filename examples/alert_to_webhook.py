"""Send the alerts of a run to a webhook: here a server of its own, in real life Slack's address.

Run it with ``python examples/alert_to_webhook.py``.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eos_monitor import EdgeOfStabilityMonitor, Probe, WebhookSink


class Regression(LightningModule):
    """Gradient descent, at a learning rate that jumps to where it must fail."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the mean squared error."""
        return F.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> dict:
        """Raise the learning rate a hundredfold at step 40."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        jump = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 40 else 100.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": jump, "interval": "step"}}


def main(steps: int = 80) -> list[str]:
    received: list[str] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    sink = WebhookSink(f"http://127.0.0.1:{server.server_port}/hook")

    torch.manual_seed(0)
    x = torch.randn(64, 8)
    data = TensorDataset(x, x[:, :1] * x[:, 1:2])
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[EdgeOfStabilityMonitor(every_n_steps=10, probe=Probe(samples=64), alerts=("log", sink))],
    )
    try:
        trainer.fit(Regression(), DataLoader(data, batch_size=64))
        sink.flush(10.0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    print("\n".join(received))
    return received


if __name__ == "__main__":
    main()
