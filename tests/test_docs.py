"""The docs name every public name, link to pages that exist, and their code runs."""

import re
from itertools import pairwise
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


def blocks_of(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.fixture
def space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What pages call yours, small, in a folder of its own."""
    import pytorch_lightning as pl

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    x, y = torch.randn(64, 1, 6, 6), torch.randint(3, (64,))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=32)

    def make_net() -> torch.nn.Sequential:
        nn = torch.nn
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3))

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    class MyOptimizer(torch.optim.SGD):
        pass

    net = make_net()
    return {
        "torch": torch,
        "module": Module(),
        "train_loader": loader,
        "net": net,
        "loss_fn": lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        "batches": list(loader),
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        "MyOptimizer": MyOptimizer,
    }


def run_page(page: Path, space: dict[str, Any]) -> None:
    """Run block after block."""
    for block in blocks_of(page):
        exec(block.replace("max_epochs=30", "max_epochs=2, accelerator='cpu'"), space)


# Pages whose code has a test of its own, which looks at what comes out.
LOOKED_AT = {
    "quickstart.md": "tests/test_docs.py",
    "thresholds.md": "tests/test_docs.py",
    "cfl.md": "tests/cfl/test_docs_cfl.py",
    "optimizers.md": "tests/optim/test_optimizers_page.py",
}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks_of(page) and page.name not in LOOKED_AT], ids=lambda page: page.name
)
def test_code_of_the_page_runs(page: Path, space: dict[str, Any]) -> None:
    run_page(page, space)


def test_every_block_is_run_or_is_no_code() -> None:
    for page in PAGES:
        fences = re.findall(r"^ *```(.*)$", page.read_text(encoding="utf-8"), re.M)
        assert set(fences[1::2]) <= {""}, page.name
        yaml = {"yaml"} if page.name == "quickstart.md" else set()  # run in tests/callbacks/test_lightning_cli.py
        assert set(fences[::2]) <= {"python", "text", ""} | yaml, page.name
        assert fences[::2].count("python") == len(blocks_of(page)), page.name
    for name, test in LOOKED_AT.items():
        assert name in (ROOT / test).read_text(encoding="utf-8")


def test_code_of_the_quickstart_runs(space: dict[str, Any]) -> None:
    page = ROOT / "docs" / "quickstart.md"
    assert len(blocks_of(page)) == 6
    del space["loss_fn"]  # the page has one
    run_page(page, space)
    assert space["monitor"].readings == []  # the second block makes a new one
    assert space["reading"].edge_ratio > 0
    assert len(space["spectrum"].eigenvalues) == 4
    mine = eos_monitor.critical_curvature(space["MyOptimizer"](space["net"].parameters(), lr=0.1))
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


def _tables_of(page: str) -> dict[str, str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return dict(re.findall(r"<!-- bench:(\w+) -->\n(.*?)\n<!-- end -->", text, re.S))


def test_threshold_tables_are_what_the_rules_say() -> None:
    """`python -m tests.limits.thresholds_page --formulas` writes them anew."""
    from tests.limits.thresholds_page import formulas

    page = _tables_of("thresholds.md")
    for table in formulas():
        assert page[table.name] == table.markdown(), table.name
    rows = page["formulas"] + page["none"]
    classes = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
    for cls in {*classes} - {torch.optim.Optimizer}:
        assert re.search(rf"\b{cls.__name__}\b", rows), cls


def test_table_of_live_runs_has_every_run_in_use() -> None:
    from tests.benchmarks.live_edges import BAND, CASES

    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in _tables_of("thresholds.md")["live"].splitlines()
    ]
    assert [row[0] for row in rows[2:]] == list(CASES)
    for row in rows[2:]:
        case = CASES[row[0]]
        assert row[1].split(", ")[0] == f"lr={case.lr}"
        assert not case.banded or BAND[0] <= float(row[2].split()[0]) <= BAND[1], row[0]


def test_code_of_the_thresholds_page_prints_what_the_page_says(capsys: Any) -> None:
    from eos_monitor.limits.thresholds import _RULES

    torch.manual_seed(0)
    widths = (10, 32, 32, 3)
    layers = [m for a, b in pairwise(widths) for m in (torch.nn.Linear(a, b), torch.nn.Tanh())]
    net = torch.nn.Sequential(*layers[:-1]).double()
    y = torch.arange(96) % 3
    x = torch.randn(3, 10, dtype=torch.float64)[y] + 0.8 * torch.randn(96, 10, dtype=torch.float64)
    text = (ROOT / "docs" / "thresholds.md").read_text(encoding="utf-8")
    space: dict[str, Any] = {
        "net": net,
        "loss_fn": lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]),
        "batches": [(x, y)],
        "optimizer": torch.optim.SGD(net.parameters(), lr=4.0),
    }
    printed = []
    try:
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(block, space)
            printed.append(capsys.readouterr().out)
    finally:
        _RULES.pop(space.get("QHM"), None)  # type: ignore[arg-type]
    assert space["check"].agrees
    assert space["sharp"].value > 0
    assert space["along"] > 0
    assert space["found"].converged

    # Another machine has other times and rounding errors, and far above the edge these grow: of what follows the
    # verdict only the words count.
    def plain(output: str) -> list[str]:
        verdict, *evidence = re.sub(r"off by [\d.e-]+", "", output).strip().splitlines()
        return [verdict, *(re.sub(r"[\d.e+-]*\d", "#", line) for line in evidence)]

    shown = re.findall(r"```text\n(.*?)```", text, re.S)
    assert [plain(output) for output in printed if output] == [plain(output) for output in shown]
