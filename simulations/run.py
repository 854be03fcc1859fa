"""One simulation from settings to files: what ``propolis simulate`` does."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flwr.serverapp import Grid

from propolis.flower import quiet_flower
from propolis.secure.errors import PropolisError
from propolis.server.app import Members, Observer
from propolis.server.job import CHECKPOINT, Job, Rounds, RunOptions, require_feasible, run_job
from propolis.settings import Settings
from propolis.simulations.apps import client_app, largest_device, load_data
from propolis.simulations.dropout import DropoutGrid, steps_of
from propolis.simulations.federation import (
    DevicesInFolder,
    DevicesInMemory,
    Federation,
    keep_federation,
    make_federation,
    parameters_of,
    recalled_federation,
    write_federation,
)
from propolis.simulations.linked import linked_grid
from propolis.simulations.local import LocalGrid
from propolis.simulations.ray import require_ray, run_on_ray
from propolis.simulations.witness import Witness
from propolis.task import choose_device

# The devices of an encrypted run, with the keys that open its model.
DEVICES = "devices"


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
    if settings.is_protected:
        require_feasible(settings, task, settings.clients, largest)
    federation = _federation_of(settings, options)
    he_key = federation.he.public if federation and federation.he else None
    members = Members(federation.verified_roster, largest, settings.seed, he_key=he_key) if federation else None
    fingerprint = federation.verified_roster.roster.federation if federation else None
    job = Job(task, data.test, device, members, fingerprint)
    if federation is None or federation.he is None:
        return run_job(settings, options, job, partial(_over_backend, settings, federation, ()))
    witness = Witness(federation, task, data.test, device, options.console)
    if options.resume:
        witness.recall(options.out)
    return _witnessed(settings, options, job, federation, witness)


def _witnessed(
    settings: Settings, options: RunOptions, job: Job, federation: Federation, witness: Witness
) -> dict[str, Any]:
    """An encrypted run: its devices' keys stay in its folder, and one of them says what the model is worth."""
    begun = False

    def over(rounds: Rounds, cancelled: threading.Event) -> None:
        nonlocal begun
        begun = True
        # A run that has a checkpoint has its model under the keys that it had, wherever these are now.
        if not _has_begun(options):
            keep_federation(federation, options.out / DEVICES)
        _over_backend(settings, federation, (witness,), rounds, cancelled)

    try:
        done = run_job(settings, options, job, over)
    except BaseException:
        if begun:
            with suppress(PropolisError):  # the first error is the one to report
                witness.report(options.out)
        raise
    return {**done, **witness.report(options.out)}


def _federation_of(settings: Settings, options: RunOptions) -> Federation | None:
    """The run's own federation; that of a resumed run which is encrypted has the keys that its model is under."""
    if not settings.is_protected:
        return None
    if settings.is_encrypted and _has_begun(options):
        return recalled_federation(options.out / DEVICES, settings.clients)
    he = parameters_of(settings, settings.clients)
    return make_federation(settings.clients, settings.seed, he, masked=settings.is_masked)


def _has_begun(options: RunOptions) -> bool:
    """Whether there is an encrypted run to go on with, whose devices have its keys."""
    return options.resume and ((options.out / DEVICES).is_dir() or (options.out / CHECKPOINT).exists())


def _over_backend(
    settings: Settings,
    federation: Federation | None,
    observers: Sequence[Observer],
    rounds: Rounds,
    cancelled: threading.Event,
) -> None:
    def serve(grid: Grid) -> None:
        lossy = DropoutGrid(grid, settings.dropout, settings.seed, steps_of(settings))
        rounds(lossy, lossy, *observers)

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
    in_memory = (
        DevicesInMemory(federation.devices, federation.he.bundles if federation.he else ()) if federation else None
    )
    with LocalGrid(partial(client_app, settings, in_memory), settings.clients, workers=settings.workers) as grid:
        serve(grid)
