"""Run the identity, fault and DDP tests and write the outcomes into docs/no-trace.md.

python -m tests.callbacks.no_trace
"""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "no-trace.md"
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
TABLES = {
    "identity": "tests/callbacks/test_identity.py::test_monitor_leaves_the_run_bit_identical",
    "faults": "tests/callbacks/test_faults.py",
    "distributed": "tests/callbacks/test_distributed.py",
}


class Outcomes:
    """Collects what became of each test."""

    def __init__(self) -> None:
        self.of: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            failed = self.of.get(report.nodeid) == "failed"
            self.of[report.nodeid] = "failed" if failed else report.outcome


def row_of(node: str) -> tuple[str, str]:
    """Return the row and the package that a test stands for."""
    name, _, parameters = node.partition("::")[2].partition("[")
    parameters = parameters.rstrip("]")
    package = next((n for n in NAMESPACES if n in parameters), "")
    detail = parameters.replace(package, "").strip("-") if package else parameters
    own = name.removeprefix("test_")
    generic = own in ("monitor_leaves_the_run_bit_identical", "fault_is_told_and_harms_nothing")
    words = detail if generic else f"{own}: {detail}" if detail else own
    return words.replace("_", " ").replace("-", " ").strip(), package


def table(outcomes: dict[str, str], packages: tuple[str, ...]) -> str:
    rows: dict[str, dict[str, str]] = {}
    for node, outcome in outcomes.items():
        row, package = row_of(node)
        rows.setdefault(row, {})[package] = outcome
    lines = [f"| configuration | {' | '.join(packages) or 'outcome'} |", "|---|" + "---|" * max(1, len(packages))]
    for row, by_package in rows.items():
        cells = [by_package.get(package, "–") for package in packages or ("",)]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(outcomes: dict[str, str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, prefix in TABLES.items():
        chosen = {node: outcome for node, outcome in outcomes.items() if node.startswith(prefix)}
        body = table(chosen, () if name == "distributed" else NAMESPACES)
        pattern = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        text = re.sub(pattern, lambda match, body=body: match[1] + body + match[2], text, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    collected = Outcomes()
    files = sorted({prefix.partition("::")[0] for prefix in TABLES.values()})
    code = pytest.main([*files, "-q"], plugins=[collected])
    write(collected.of)
    sys.exit(int(code))
