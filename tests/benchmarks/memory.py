"""Peak memory of a reading, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from eos_monitor.readings.gauge import Gauge
from tests.benchmarks.problems import CASES
from tests.benchmarks.tables import Progress, Table

_ROOT = Path(__file__).parents[2]


def measure(progress: Progress) -> list[Table]:
    rows = []
    for case in progress.over(CASES):
        # Peaks only grow, so each kind of work gets its own process.
        idle, one_pass, reading = (_in_child(case.name, work) for work in ("idle", "pass", "reading"))
        size = sum(p.numel() for p in case.start().params)
        rows.append(
            [case.name, f"{size:,}", f"{size * 4 / 2**20:.1f}", f"{one_pass - idle:.0f}", f"{reading - idle:.0f}"]
        )
    head = ["net", "parameters", "their size, MB", "forward + backward, MB", "first reading, MB"]
    return [Table("memory", head, rows)]


def _in_child(case: str, work: str) -> float:
    command = [sys.executable, "-m", "tests.benchmarks.memory", case, work]
    return float(subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.split()[-1])


def _peak_of(name: str, work: str) -> float:
    torch.set_num_threads(1)
    problem = next(case for case in CASES if case.name == name).start()
    if work == "pass":
        one_pass = problem.forward_backward()
        for _ in range(3):
            one_pass()
    elif work == "reading":
        optimizers = [problem.optimizer]
        Gauge().measure(problem.net, problem.loss, [problem.batch], optimizers, step=0, full_batch=True)
    # Not getrusage: its peak is inherited from the process that forked.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


if __name__ == "__main__":
    print(_peak_of(*sys.argv[1:]))
