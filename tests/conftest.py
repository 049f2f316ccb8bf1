"""Settings of the whole suite, and a watch over what tests leave behind."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules import module as torch_module

# `tests` has no __init__.py, so plain `pytest` does not put the root on the path (`python -m pytest` does).
sys.path.insert(0, str(Path(__file__).parents[1]))

# The nets are tiny: a second thread only waits.
torch.set_num_threads(1)


def leftovers() -> dict[str, Any]:
    """What a test could leave behind in this process."""
    return {
        "threads": {thread.name for thread in threading.enumerate() if thread.is_alive()},
        "processes": {process.pid for process in multiprocessing.active_children()},
        # Lightning sets its own for DDP children, and torch and scikit-learn set some when they are first imported.
        "environment": {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTEST", "PL_", "LOCAL_", "KMP_", "TORCH", "PYTORCH"))
        },
        "global hooks": [
            len(getattr(torch_module, name))
            for name in sorted(vars(torch_module))
            if name.startswith("_global_") and name.endswith("hooks")
        ],
        "flags": {
            "grad": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "dtype": torch.get_default_dtype(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "anomaly": torch.is_anomaly_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "threads": torch.get_num_threads(),
            "flash": torch.backends.cuda.flash_sdp_enabled(),
            "math": torch.backends.cuda.math_sdp_enabled(),
            "cudnn": torch.backends.cudnn.enabled,
        },
    }


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a thread, a process, a hook, an environment variable or a changed flag."""
    before = leftovers()
    yield
    after = leftovers()
    new = {key: (before[key], after[key]) for key in before if key != "threads" and before[key] != after[key]}
    # A thread that ended is no leftover; tqdm keeps one of its own for the life of the process.
    threads = after["threads"] - before["threads"] - {"tqdm_monitor"}
    if request.node.get_closest_marker("compiles") is not None:
        threads = {name for name in threads if not name.startswith("ThreadPoolExecutor")}
    assert not threads, f"threads left: {threads}"
    assert not new, f"left behind: {new}"


@pytest.fixture
def in_a_folder_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_figure(*args: object) -> None:
        raise ImportError  # a second each, and not what is asked here

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("eos_monitor.dashboard.figures.run_figure", no_figure)
