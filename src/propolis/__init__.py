"""Propolis: a secure federated edge-cloud framework on Flower.

The public names load on first use (PEP 562), so that ``import propolis`` and ``propolis --help`` stay fast.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from propolis.client.update import secure_mod
    from propolis.secure.errors import PropolisError, UsageError
    from propolis.server.grid import SecureGrid
    from propolis.server.job import RunOptions
    from propolis.server.planner import Protection
    from propolis.server.roster import load_roster
    from propolis.settings import Settings
    from propolis.simulations.local import LocalGrid
    from propolis.simulations.run import simulate
    from propolis.task import DataSet, Examples, Task, load_task

# Flower and Ray read these once, when they are imported: a federation reports to nobody unless asked to.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

__version__ = "0.1.0"

_HOME_OF = {
    "DataSet": "propolis.task",
    "Examples": "propolis.task",
    "LocalGrid": "propolis.simulations.local",
    "PropolisError": "propolis.secure.errors",
    "Protection": "propolis.server.planner",
    "RunOptions": "propolis.server.job",
    "SecureGrid": "propolis.server.grid",
    "Settings": "propolis.settings",
    "Task": "propolis.task",
    "UsageError": "propolis.secure.errors",
    "load_roster": "propolis.server.roster",
    "load_task": "propolis.task",
    "secure_mod": "propolis.client.update",
    "simulate": "propolis.simulations.run",
}

__all__ = [
    "DataSet",
    "Examples",
    "LocalGrid",
    "PropolisError",
    "Protection",
    "RunOptions",
    "SecureGrid",
    "Settings",
    "Task",
    "UsageError",
    "load_roster",
    "load_task",
    "secure_mod",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
