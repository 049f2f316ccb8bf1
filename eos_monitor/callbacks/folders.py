"""One folder a run, for what is written beside the loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from eos_monitor.readings.guard import Guard

_NAME = "eos_logs"
_OURS = ("*_readings.jsonl", "*_actions.jsonl", "*_alerts.jsonl", "*_run*.png", "*_layers*.png")
# All callbacks of a fit write to one place, whichever asks for it first.
_FOLDERS: WeakKeyDictionary[Any, Path | None] = WeakKeyDictionary()


def forget_folder(trainer: Any) -> None:
    """Say that another fit begins."""
    _FOLDERS.pop(trainer, None)


def run_folder(trainer: Any, guard: Guard, *, resumed: bool) -> Path | None:
    """Return the folder of the present fit, None for a fast_dev_run; to be asked on every process, for it broadcasts.

    That is the folder of the first logger's run, where ModelCheckpoint puts its own, and without a logger one more
    ``eos_logs/version_<n>`` in the Trainer's folder. Where another run has left readings already, because a logger goes
    on in its own folder, there is one more ``eos_logs/version_<n>`` in there, unless this run goes on from that one.

    Args:
        trainer: The Trainer.
        guard: Tells why there is no folder.
        resumed: Whether the run goes on from a checkpoint.
    """
    if trainer.fast_dev_run:
        return None
    if trainer not in _FOLDERS:
        found = None
        if trainer.is_global_zero:
            found = guard.run("finding a log folder", lambda: str(_found(trainer, resumed)), gives_up=False)
        found = trainer.strategy.broadcast(found)
        _FOLDERS[trainer] = None if found is None else Path(found)
    return _FOLDERS[trainer]


def free_path(path: Path) -> Path:
    """Return a path that no file has: this one, or it with a number."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free


def _found(trainer: Any, resumed: bool) -> Path:
    logger = next(iter(trainer.loggers), None)
    if logger is None:
        return _claimed(Path(trainer.default_root_dir))
    place = getattr(logger, "log_dir", None)
    if not isinstance(place, (str, Path)):
        # As ModelCheckpoint has it. Weights & Biases and MLflow have a name and a version, and no folder of the run.
        version = logger.version
        parts = [logger.name, f"version_{version}" if isinstance(version, int) else version]
        place = Path(logger.save_dir or trainer.default_root_dir, *(str(part) for part in parts if part is not None))
        if version is None:
            return _claimed(place)  # nothing tells runs apart
    return Path(place) if resumed or not _is_used(Path(place)) else _claimed(Path(place))


def _is_used(folder: Path) -> bool:
    return any(path for pattern in _OURS for path in folder.glob(pattern))


def _claimed(folder: Path) -> Path:
    """Make the next ``eos_logs/version_<n>`` in a folder; runs that do so at the same time get different ones."""
    number = len(list((folder / _NAME).glob("version_*")))
    while True:
        place = folder / _NAME / f"version_{number}"
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError:  # a full disk, say: told by whatever cannot be written there
            return place
        else:
            return place
