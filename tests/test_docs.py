"""The docs name every public name, link to pages that exist, and their code runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import eos_monitor

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_public_name_is_documented() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(table) == sorted(eos_monitor.__all__)
    for name in eos_monitor.__all__:
        assert (getattr(eos_monitor, name).__doc__ or "").split("\n")[0].endswith("."), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text(encoding="utf-8")):
        link = "".join(target)
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} -> {link}"


@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step.*")
def test_code_of_the_quickstart_runs(tmp_path: Path, monkeypatch: Any) -> None:
    """Block after block, in a namespace that holds what the page calls yours."""
    import pytorch_lightning as pl

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    class MyOptimizer(torch.optim.SGD):
        pass

    net = torch.nn.Linear(4, 3)
    space: dict[str, Any] = {
        "torch": torch,
        "module": Module(),
        "train_loader": loader,
        "net": net,
        "batches": list(loader),
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        "MyOptimizer": MyOptimizer,
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 6
    for block in blocks:
        exec(block.replace("max_epochs=30", "max_epochs=2, accelerator='cpu'"), space)
    assert space["monitor"].readings == []  # the second block makes a new one
    assert space["reading"].edge_ratio > 0
    assert len(space["spectrum"].eigenvalues) == 4
    mine = eos_monitor.critical_curvature(MyOptimizer(net.parameters(), lr=0.1))
    assert mine.c is not None
    assert torch.allclose(mine.c, torch.tensor(20.0))


def test_no_trace_page_has_every_row_and_none_failed() -> None:
    """The page is written from a test run; it must not fall behind the tables of the tests."""
    from tests.callbacks.test_faults import FAULTS
    from tests.callbacks.test_identity import CASES

    text = (ROOT / "docs" / "no-trace.md").read_text(encoding="utf-8")
    tables = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->", text, re.S))
    assert set(tables) == {"identity", "faults", "distributed"}
    for name, cases in (("identity", CASES), ("faults", FAULTS)):
        rows = [line.strip("|").split(" | ") for line in tables[name].splitlines()[2:]]
        assert {case.replace("-", " ") for case in cases} <= {row[0].strip() for row in rows}
        assert all(cell.strip() == "passed" for row in rows for cell in row[1:]), name
        assert len(rows) >= 40
    assert "failed" not in tables["distributed"]
