"""One base class for both Lightning packages.

``lightning.pytorch.Callback`` and ``pytorch_lightning.Callback`` are different classes; a callback that inherits from
those that are installed is accepted by both Trainers, by LightningCLI and by pickling launchers.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any


def _from_installed(name: str, places: dict[str, str]) -> type[Any]:
    classes = [getattr(importlib.import_module(place), name) for package, place in places.items() if find_spec(package)]
    return type(name, tuple(dict.fromkeys(classes)), {"__module__": __name__})


if TYPE_CHECKING:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning import Callback
else:
    Callback = _from_installed(
        "Callback", {"lightning": "lightning.pytorch.callbacks", "pytorch_lightning": "pytorch_lightning.callbacks"}
    )
    MisconfigurationException = _from_installed(
        "MisconfigurationException",
        {
            "lightning": "lightning.fabric.utilities.exceptions",
            "pytorch_lightning": "pytorch_lightning.utilities.exceptions",
        },
    )

__all__ = ["Callback", "MisconfigurationException"]
