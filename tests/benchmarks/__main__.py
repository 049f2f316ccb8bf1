"""Run the benchmarks and rewrite the tables of docs/cost.md. About ten minutes."""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from tests.benchmarks import memory, optimizers, overhead, peers, products, readings, steps
from tests.benchmarks.tables import Progress, Table, write

SECTIONS: dict[str, Callable[[Progress], list[Table]]] = {
    "products": products.measure,
    "readings": readings.measure,
    "peers": peers.measure,
    "memory": memory.measure,
    "steps": steps.measure,
    "overhead": overhead.measure,
    "optimizers": optimizers.measure,
}
_DOC = Path(__file__).parents[2] / "docs" / "cost.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"some of {', '.join(SECTIONS)}; default all")
    parser.add_argument("--no-write", action="store_true", help="leave docs/cost.md alone")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"Expected some of {', '.join(SECTIONS)}, got {', '.join(sorted(unknown))}.")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    # OpenBLAS's threads wait actively: after an eigsh of SciPy's they doubled the CPU time of what was timed next.
    threadpool_limits(1)

    began = time.perf_counter()
    tables = [Table("machine", ["machine", "Python", "torch", "threads"], [_machine()])]
    for name in args.sections or SECTIONS:
        tables += SECTIONS[name](Progress(name))
    for table in tables:
        print(f"\n{table.name}\n{table.markdown()}")
    if not args.no_write:
        write(tables, _DOC)
    print(f"\n{time.perf_counter() - began:.0f} s" + ("" if args.no_write else f"; tables written to docs/{_DOC.name}"))


def _machine() -> list[object]:
    return [
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {platform.system()}, no accelerator",
        platform.python_version(),
        torch.__version__,
        torch.get_num_threads(),
    ]


if __name__ == "__main__":
    main()
