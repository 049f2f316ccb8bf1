"""Processes that tests start."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LIMIT = 120  # seconds for what takes 10 to 20; a hang is what it is there to end
_ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def started(*command: object) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """Start a command with one thread a process; yield it, and a function that returns what it has printed so far.

    At the end it is killed with all processes that it has started. Those would hold a pipe open and leave the test
    waiting for them, so the output goes to a file.
    """
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process, lambda: Path(output.name).read_text(errors="replace")
        finally:
            with contextlib.suppress(ProcessLookupError):  # raised where all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_script(script: str | Path, *arguments: object, limit: float = LIMIT) -> str:
    """Run a Python script and return what it printed; past the limit all its processes say where they stand.

    Raises:
        AssertionError: If it runs past the limit, or exits with another code than 0.
    """
    with started(sys.executable, script, *arguments) as (process, said):
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)  # Python's fault handler prints the stacks
            time.sleep(2.0)
            raise AssertionError(f"{script} {arguments} hangs:\n{said()[-20000:]}") from None
        assert code == 0, f"{script} {arguments} exits with {code}:\n{said()[-20000:]}"
        return said()
