"""The page on layers: its code runs, its table of borders is that of the code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.cfl.regimes_page import regimes_table

PAGE = (Path(__file__).parents[2] / "docs" / "cfl.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step.*")
def test_code_of_the_page_runs(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import pytorch_lightning as pl

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = torch.randint(3, (64,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    module = Module()
    space: dict[str, Any] = {
        "module": module,
        "train_loader": loader,
        "net": module.net,
        "loss_fn": lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]),
        "batches": list(loader),
        "optimizer": torch.optim.SGD(module.net.parameters(), lr=0.1, momentum=0.9),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    told = []
    for block in blocks:
        exec(block.replace("max_epochs=30", "max_epochs=1, accelerator='cpu'"), space)
        told.append(capsys.readouterr().out)
    assert "of its limit, exact" in told[0]
    assert told[1].count("of its limit, lr_max") == 2
    assert re.search(r"0 relu \d+% transitioning", told[2])
    assert "no elementwise activation follows" in told[2]
    shares = [layer.top_mode_share for layer in space["estimate_cfl"](space["net"], space["loss_fn"], space["batches"])]
    assert shares == [None, None]  # only where a mode was given, as in the last block
    assert told[3].count("PaperBound") == 1


def test_table_of_borders_is_that_of_the_code() -> None:
    """`python -m tests.cfl.regimes_page` writes it anew."""
    (found,) = re.findall(r"<!-- table:regimes -->\n(.*?)\n<!-- end -->", PAGE, re.S)
    assert found == regimes_table()
    assert len(found.splitlines()) >= 15


def test_borders_on_the_page_are_where_the_second_derivative_is_half_its_largest() -> None:
    """The numbers of the table once more, from r″ by finite differences on a grid."""
    functions = {"SiLU": F.silu, "GELU": F.gelu, "Mish": F.mish, "Softplus": F.softplus}
    z = torch.arange(-8.0, 8.0, 1e-3, dtype=torch.float64)
    for name, r in functions.items():
        (row,) = re.findall(rf"^\| {name} \| ([^|]+) \|", PAGE, re.M)
        low, high = (float(number.replace("−", "-")) for number in re.findall(r"−?\d+\.\d+", row))
        bend = ((r(z + 1e-3) - 2 * r(z) + r(z - 1e-3)) / 1e-6).abs()
        inside = z[bend >= bend.max() / 2]
        # the grid's step, and three digits on the page
        assert (float(inside[0]), float(inside[-1])) == pytest.approx((low, high), abs=2e-3)
