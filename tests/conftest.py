"""Settings of the whole suite."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# `tests` has no __init__.py, so plain `pytest` does not put the root on the path (`python -m pytest` does).
sys.path.insert(0, str(Path(__file__).parents[1]))

# The nets are tiny: a second thread only waits.
torch.set_num_threads(1)
