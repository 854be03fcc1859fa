"""One simulation from settings to files: what ``propolis simulate`` does."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flwr.serverapp import Grid

from propolis.flower import quiet_flower
from propolis.server.app import Members
from propolis.server.job import Job, Rounds, RunOptions, require_feasible, run_job
from propolis.settings import Settings
from propolis.simulations.apps import client_app, largest_device, load_data
from propolis.simulations.dropout import DropoutGrid, steps_of
from propolis.simulations.federation import (
    DevicesInFolder,
    DevicesInMemory,
    Federation,
    make_federation,
    write_federation,
)
from propolis.simulations.linked import linked_grid
from propolis.simulations.local import LocalGrid
from propolis.simulations.ray import require_ray, run_on_ray
from propolis.task import choose_device


def simulate(settings: Settings, options: RunOptions) -> dict[str, Any]:
    """Train a task's model over simulated devices.

    Returns:
        The content of result.json, and what the model was registered as.

    Raises:
        UsageError: the task, the data, the partition or the folder is not usable; nothing has been written.
        PropolisError: the run failed; the rounds completed so far are in the folder, with status ``failed``.
        KeyboardInterrupt: the user stopped it; likewise, with status ``interrupted``.
    """
    torch.set_num_threads(1)  # as in the devices, so that figures do not depend on the number of cores
    quiet_flower()
    device = choose_device(settings.device)
    if settings.backend == "ray":
        require_ray(settings)
    task, data = load_data(settings.task, settings.data)
    largest = largest_device(settings, data, settings.clients)
    federation = make_federation(settings.clients, settings.seed) if settings.is_protected else None
    if settings.is_protected:
        require_feasible(settings, task, settings.clients, largest)
    members = Members(federation.verified_roster, largest, settings.seed) if federation else None
    fingerprint = federation.verified_roster.roster.federation if federation else None
    job = Job(task, data.test, device, members, fingerprint)
    return run_job(settings, options, job, partial(_over_backend, settings, federation))


def _over_backend(
    settings: Settings, federation: Federation | None, rounds: Rounds, cancelled: threading.Event
) -> None:
    def serve(grid: Grid) -> None:
        lossy = DropoutGrid(grid, settings.dropout, settings.seed, steps_of(settings))
        rounds(lossy, lossy)

    if settings.backend == "ray":
        with TemporaryDirectory(prefix="propolis-") as folder:
            stores = None
            if federation is not None:  # Ray moves a device from process to process
                write_federation(federation, Path(folder))
                stores = DevicesInFolder(Path(folder))
            run_on_ray(settings, client_app(settings, stores), serve, cancelled)
        return
    if settings.backend == "link":
        with linked_grid(settings, federation or make_federation(settings.clients, settings.seed)) as linked:
            serve(linked)
        return
    in_memory = DevicesInMemory(federation.devices) if federation else None
    with LocalGrid(partial(client_app, settings, in_memory), settings.clients, workers=settings.workers) as grid:
        serve(grid)
