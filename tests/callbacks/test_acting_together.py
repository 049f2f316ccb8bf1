"""Two gloo processes of different speed act alike."""

import math
from pathlib import Path

import pytest
import torch

from tests.callbacks import acting_run
from tests.launching import run_script


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cadence", "jump", "action"), [(10, 200.0, "cap-lr"), (0, 40.0, "restore")], ids=["every-10", "by-the-clock"]
)
def test_both_ranks_act_alike(cadence: int, jump: float, action: str, tmp_path: Path) -> None:
    run_script(acting_run.__file__, cadence, jump, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in (0, 1))

    def without_id(result: dict) -> list[dict]:
        return [{key: value for key, value in row.items() if key != "run"} for row in result["actions"]]

    assert without_id(first) == without_id(second)
    assert {row["action"] for row in first["actions"]} >= {"checkpoint", action}
    assert first["factors"] == second["factors"]
    assert len(first["factors"]) == 400
    assert any(factors and min(factors) < 1.0 for factors in first["factors"])
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(one, other)
        assert math.isfinite(float(one.sum()))
    assert list(tmp_path.rglob("eos_*.ckpt"))
