"""Whether the tests notice small faults: ``python -m tests.benchmarks.mutation [PART …]``. About half an hour for all.

A sample of the mutants of each part is run against the tests that pass through the changed line, quickest first, in a
copy of the tree. A fault that no test notices within the time is a survivor, and is printed.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import pytest
from tqdm import tqdm

from tests.benchmarks.equivalents import has_no_consequence
from tests.benchmarks.mutants import SEEN, Mutant, instrumented, mutants_of
from tests.benchmarks.tables import Table

_ROOT = Path(__file__).parents[2]
_MOST_SECONDS = 20.0  # of tests for one mutant, as timed without it; what comes after is not run
_PATIENCE = 4  # × the time of its tests, and half a minute, until a mutant counts as one that hangs


@dataclass(frozen=True)
class Part:
    files: Sequence[str]  # below eos_monitor/
    tests: Sequence[str]  # below tests/


PARTS = {
    "solver": Part(
        ["curvature/lanczos.py", "curvature/basis.py", "curvature/audit.py", "readings/edge_solver.py"],
        ["curvature", "readings"],
    ),
    "check": Part(
        [
            "readings/products.py",
            "curvature/precision.py",
            "curvature/finite_differences.py",
            "curvature/hessian.py",
            "limits/threshold_check.py",
        ],
        [
            "curvature",
            "readings",
            "limits/test_threshold_check.py",
            "limits/test_checked_steps.py",
            "isolation/test_alone.py",
        ],
    ),
    "error": Part(
        ["readings/uncertainty.py", "readings/samples.py", "readings/gauge.py", "curvature/spread.py"],
        ["curvature", "readings", "callbacks/test_full_batch.py"],
    ),
    "sandbox": Part(
        [
            "isolation/sandbox.py",
            "isolation/twin.py",
            "isolation/copies.py",
            "isolation/fingerprint.py",
            "callbacks/trainer_sandbox.py",
        ],
        ["isolation", "callbacks/test_trainer_sandbox.py", "callbacks/test_verify.py"],
    ),
    "detector": Part(
        [
            "verdicts/detector.py",
            "verdicts/divergence.py",
            "verdicts/edge_history.py",
            "verdicts/excursions.py",
            "verdicts/jump_risk.py",
            "verdicts/oscillation.py",
            "verdicts/projector.py",
            "verdicts/restraint.py",
            "verdicts/steps.py",
        ],
        ["verdicts"],
    ),
}


@dataclass
class Watched:
    """What the tests do without a fault: the lines that each runs, by file, and its seconds."""

    lines: dict[str, dict[str, set[int]]]  # test -> file -> lines
    seconds: dict[str, float]


class _Watch:
    """Plugin of pytest that notes which lines of the instrumented files each test runs, and its seconds."""

    def __init__(self) -> None:
        self.found = Watched({}, {})
        self._seen: set[tuple[str, int]] = set()
        setattr(builtins, SEEN, self._seen)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._seen.clear()
        began = time.perf_counter()
        try:
            return (yield)
        finally:
            self.found.seconds[item.nodeid] = time.perf_counter() - began
            lines: dict[str, set[int]] = defaultdict(set)
            for file, line in self._seen:
                lines[file].add(line)
            self.found.lines[item.nodeid] = dict(lines)


class _Chosen:
    """Plugin of pytest that runs some tests only, in a given order."""

    def __init__(self, tests: Sequence[str]) -> None:
        self._places = {test: i for i, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self._places), key=lambda i: self._places[i.nodeid])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.mutation", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"some of {', '.join(PARTS)}; default all")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each part; 0 for all")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="of the sample; several for one table each")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"Expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}.")
    parts = {name: PARTS[name] for name in args.parts or PARTS}
    _import_libraries()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(_ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build"))
        shutil.copy(_ROOT / ".gitignore", copy)
        os.chdir(copy)
        files = [f"eos_monitor/{file}" for part in parts.values() for file in part.files]
        watched = _watch(files, sorted({f"tests/{test}" for part in parts.values() for test in part.tests}))
        samples = {
            (seed, name): _sample(copy, part, args.sample, seed) for seed in args.seed for name, part in parts.items()
        }
        wanted = {mutant: name for (_, name), mutants in samples.items() for mutant in mutants}
        killed = {}
        for mutant, name in tqdm(wanted.items(), desc="mutants", unit="mutant", mininterval=5):
            killed[mutant] = _is_killed(mutant, watched, PARTS[name].tests)
            if not killed[mutant]:
                tqdm.write(f"{name}: {mutant}")
    for seed in args.seed:
        _print(seed, {name: samples[seed, name] for name in parts}, killed)


def _import_libraries() -> None:
    """Import what is not ours, once: every run is a fork of this process."""
    import lightning.pytorch  # noqa: F401
    import numpy  # noqa: F401
    import scipy.sparse.linalg  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    torch.set_num_threads(1)
    # The mutated tree is the one in the working directory.
    sys.path[:] = ["" if Path(path or ".").resolve() == _ROOT else path for path in sys.path]
    for name in [name for name in sys.modules if name == "tests" or name.startswith(("tests.", "eos_monitor"))]:
        del sys.modules[name]


def _watch(files: Sequence[str], tests: Sequence[str]) -> Watched:
    print(f"running {', '.join(tests)} without a fault …", flush=True)
    here, there = Pipe()
    originals = {file: Path(file).read_text(encoding="utf-8") for file in files}
    for file, source in originals.items():
        Path(file).write_text(instrumented(source, file), encoding="utf-8")

    def run() -> int:
        watch = _Watch()
        code = int(pytest.main([*_OPTIONS, *tests], plugins=[watch]))
        there.send((code, watch.found))
        return code

    child = _fork(run)
    there.close()
    code, found = here.recv()
    os.waitpid(child, 0)
    for file, source in originals.items():
        Path(file).write_text(source, encoding="utf-8")
    if code != 0:
        raise SystemExit("Expected tests that pass without a fault; run them by themselves.")
    return found  # type: ignore[no-any-return]


_OPTIONS = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider"]


def _fork(action: Callable[[], int]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()  # so that what a test starts ends with it
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = action()
    finally:
        os._exit(code)


def _sample(root: Path, part: Part, count: int, seed: int) -> list[Mutant]:
    everything = [mutant for file in part.files for mutant in mutants_of(root, f"eos_monitor/{file}")]
    chosen = random.Random(seed).sample(range(len(everything)), min(count or len(everything), len(everything)))
    return [everything[i] for i in sorted(chosen) if not has_no_consequence(*_key(everything[i]))]


def _key(mutant: Mutant) -> tuple[str, str, str]:
    return mutant.file.removeprefix("eos_monitor/"), mutant.text, mutant.change


@functools.cache
def _text(file: str) -> str:
    return Path(file).read_text(encoding="utf-8")


def _is_killed(mutant: Mutant, watched: Watched, tests: Sequence[str]) -> bool:
    """Whether some test fails, or hangs, with the fault."""
    chosen = []
    seconds = 0.0
    for test, lines in sorted(watched.lines.items(), key=lambda item: watched.seconds[item[0]]):
        ran = lines.get(mutant.file, set())
        reads = any(name in _text(test.partition("::")[0]) for name in mutant.names)
        if (reads or (ran & mutant.lines if mutant.lines else ran)) and test.startswith(
            tuple(f"tests/{name}" for name in tests)
        ):
            chosen.append(test)
            seconds += watched.seconds[test]
        if seconds > _MOST_SECONDS:
            break
    if not chosen:
        return False
    path = Path(mutant.file)
    original = path.read_text(encoding="utf-8")
    path.write_text(mutant.source, encoding="utf-8")
    try:
        files = sorted({test.partition("::")[0] for test in chosen})
        child = _fork(lambda: _run_with_a_fault(files, chosen))
        return _code(child, _PATIENCE * seconds + 30) != 0
    finally:
        path.write_text(original, encoding="utf-8")


def _run_with_a_fault(files: Sequence[str], tests: Sequence[str]) -> int:
    # A file's time has a resolution of a second, and mutants come faster than that.
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    return int(pytest.main([*_OPTIONS, *files], plugins=[_Chosen(tests)]))


def _code(child: int, most: float) -> int:
    """Wait for a run; what takes too long is ended, and failed."""
    end = time.monotonic() + most
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1


def _print(seed: int, samples: dict[str, list[Mutant]], killed: dict[Mutant, bool]) -> None:
    rows: list[list[object]] = []
    together = [mutant for mutants in samples.values() for mutant in mutants]
    for name, mutants in {**samples, "all": together}.items():
        died = sum(killed[mutant] for mutant in mutants)
        rows.append([name, len(mutants), died, len(mutants) - died, f"{died / max(1, len(mutants)):.0%}"])
    print(f"\nseed {seed}\n{Table('mutation', ['part', 'mutants', 'killed', 'survived', 'score'], rows).markdown()}")


if __name__ == "__main__":
    main()
