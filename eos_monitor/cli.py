"""The ``eos-monitor`` command."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from eos_monitor import __version__

# Modules of the extra `demo`, and what they are called in a package index.
_DEMO_NEEDS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code.

    Args:
        argv: Arguments after the program's name; by default the process's.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Greek letters is no reason to end
    arguments = _parser().parse_args(argv)
    try:
        return _demo(arguments)
    except ModuleNotFoundError as error:
        missing = _DEMO_NEEDS.get((error.name or "").partition(".")[0])
        if missing is None:
            raise
        print(f"eos-monitor: the demo needs {missing}: pip install 'eos-monitor[demo]'", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="eos-monitor", description="A stability gauge for training runs.")
    parser.add_argument("--version", action="version", version=f"eos-monitor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a small net to the edge of stability, three times, and show it",
        description="Train a small net on scikit-learn's digits by full-batch gradient descent, by full-batch AdamW "
        "and by minibatch SGD, and watch each climb to its own edge of stability. CPU, about a minute.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--output", type=Path, default=Path("eos_demo"), metavar="DIR", help="folder for all files")
    demo.add_argument("--steps", type=_positive, default=1200, metavar="N", help="optimizer steps of each run")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="seed of weights and minibatches")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def _demo(arguments: argparse.Namespace) -> int:
    if os.environ.get("EOS_MONITOR", "").lower() == "off":
        print("eos-monitor: the demo needs the monitor, which EOS_MONITOR=off switches off", file=sys.stderr)
        return 2
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"eos-monitor: cannot write to {arguments.output}: {error.strerror}", file=sys.stderr)
        return 2
    print("Loading torch and Lightning ...", flush=True)
    from eos_monitor.lab.edge_demo import edge_table, run_edge_demo

    print(
        "Training a tanh net (64-64-64-10) on 1000 digits: with the full batch by gradient descent and by AdamW, then\n"
        "by SGD with batches of 8.\n"
        "Theory: sharpness climbs until it meets what the optimizer can bear (edge ratio 1), and stays there.\n"
        "With minibatches it stays below: there the curvature along each batch's own gradient meets 2/lr.",
        flush=True,
    )
    result = run_edge_demo(arguments.output, steps=arguments.steps, seed=arguments.seed)
    print(f"\n{edge_table(result)}\n")
    print(f"All runs in one figure: {result.figure}")
    for run in result.runs:
        print(f"Events, readings and figure of {run.name}: {run.folder}{os.sep}")
    print("\nTo see them in TensorBoard (tabs Custom Scalars, Images, Text):")
    print(f"  {tensorboard_command(arguments.output)}")
    return 0


def tensorboard_command(folder: Path) -> str:
    """Return the shell command that opens TensorBoard, of this interpreter, on ``folder``."""
    beside = shutil.which("tensorboard", path=str(Path(sys.executable).parent))
    if beside is None:
        start = [sys.executable, "-m", "tensorboard.main"]
    elif shutil.which("tensorboard") == beside:
        start = ["tensorboard"]
    else:
        start = [os.path.relpath(beside) if Path(beside).is_relative_to(Path.cwd()) else beside]
    return shlex.join([*start, "--logdir", str(folder)])
