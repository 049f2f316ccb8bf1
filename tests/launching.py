"""Scripts that tests start as processes of their own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT = 120  # seconds for what takes 10 to 20; a hang is what it is there to end
_ROOT = Path(__file__).parents[1]


def run_script(script: str | Path, *arguments: object, limit: float = LIMIT) -> str:
    """Run a script with one thread a process and return what it printed.

    Past the limit the script is ended with all processes that it has started, and each says where it stood. They would
    hold a pipe open and leave the test waiting for them, so the output goes to a file.

    Raises:
        AssertionError: If it runs past the limit, or exits with another code than 0.
    """
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGABRT)  # Python's fault handler prints the stacks
            time.sleep(2.0)
        finally:
            with contextlib.suppress(ProcessLookupError):  # raised where all have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()
    assert code == 0, f"{' '.join(command)} {'hangs' if code is None else f'exits with {code}'}:\n{said[-20000:]}"
    return said
