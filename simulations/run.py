"""One simulation from settings to files: what ``propolis simulate`` does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from flwr.serverapp import Grid
from rich.console import Console

from propolis.client.train import choose_device
from propolis.flower import quiet_flower
from propolis.secure.errors import CancelledError, StorageError, UsageError
from propolis.server.app import (
    MAY_CHANGE_ON_RESUME,
    FederatedRun,
    Members,
    Observer,
    initial_model,
    protection_of,
    run_digest,
)
from propolis.server.checkpoint import RunState, load_checkpoint
from propolis.server.report import (
    CONFIG,
    CURVES,
    MODEL,
    RESULT,
    Failure,
    TerminalReport,
    write_config,
    write_results,
)
from propolis.settings import Settings, load_settings
from propolis.simulations.apps import client_app, largest_device, load_data
from propolis.simulations.dropout import DropoutGrid, steps_of
from propolis.simulations.federation import (
    DevicesInFolder,
    DevicesInMemory,
    Federation,
    make_federation,
    write_federation,
)
from propolis.simulations.local import LocalGrid
from propolis.simulations.ray import require_ray, run_on_ray
from propolis.task import Task

CHECKPOINT = "checkpoint.safetensors"
_FILES = (RESULT, MODEL, CURVES, CONFIG, CHECKPOINT)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a run leaves its files, and how it treats what lies there.

    Attributes:
        out: folder for the results; made when missing.
        resume: go on from the folder's checkpoint.
        force: replace another run's files.
        console: where rounds are shown; None shows nothing.
    """

    out: Path
    resume: bool = False
    force: bool = False
    console: Console | None = None


def simulate(settings: Settings, options: RunOptions) -> dict[str, Any]:
    """Train a task's model over simulated devices.

    Returns:
        The content of result.json.

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
        sampled = max(int(settings.clients * settings.fraction), settings.min_clients)
        parameters = sum(array.size for array in initial_model(settings, task).arrays.values())
        protection_of(settings, largest).require_feasible(sampled, parameters)
    members = Members(federation.verified_roster, largest, settings.seed) if federation else None
    start = _starting_state(settings, options, task)
    cancelled = threading.Event()
    checkpoint = options.out / CHECKPOINT
    run = FederatedRun(
        settings,
        task,
        data.test,
        device=device,
        members=members,
        start=start,
        checkpoint=checkpoint,
        cancelled=cancelled,
    )
    _prepare_folder(settings, options)
    try:
        with _report(settings, options, run.state.completed) as report:
            _run_backend(settings, federation, partial(_serve, settings, run, report), cancelled)
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, CancelledError))
        with suppress(StorageError):  # the first error is the one to report
            write_results(
                options.out, settings, run.state, "interrupted" if stopped else "failed", Failure.of(error, run.retries)
            )
        raise
    return write_results(options.out, settings, run.state, "completed")


def settings_to_resume(out: Path, overrides: Mapping[str, Any]) -> Settings:
    """The settings of the run in `out`, with the few changes that leave its rounds as they would have been.

    Raises:
        UsageError: the folder holds no run, or an override would make another run of it.
    """
    if not (out / CONFIG).is_file():
        raise UsageError(f"{out} holds no run to resume: {CONFIG} is missing")
    before = load_settings(out / CONFIG)
    after = load_settings(base=before, overrides=overrides)
    changed = {key for key in Settings.model_fields if getattr(before, key) != getattr(after, key)}
    # The cosine reaches zero after the last round, so each round depends on how many there are.
    may_change = MAY_CHANGE_ON_RESUME - ({"rounds"} if before.lr_schedule == "cosine" else set())
    if refused := sorted(changed - may_change):
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in refused)
        raise UsageError(f"{flags} would make another run of {out}; start a new one without --resume")
    return after


def _starting_state(settings: Settings, options: RunOptions, task: Task) -> RunState | None:
    if not options.resume or not (options.out / CHECKPOINT).exists():  # it was stopped before the first round ended
        return None
    state = load_checkpoint(options.out / CHECKPOINT, initial_model(settings, task), run_digest(settings))
    if state.completed > settings.rounds:
        raise UsageError(f"{options.out} has done {state.completed} rounds already, more than {settings.rounds}")
    return state


def _prepare_folder(settings: Settings, options: RunOptions) -> None:
    found = [name for name in _FILES if (options.out / name).exists()]
    if found and not (options.resume or options.force):
        raise UsageError(f"{options.out} holds another run ({found[0]}); use --resume, --force or another --out")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_config(options.out, settings)  # first, so that a full disk costs the run that lies there nothing
        for name in found:
            if not options.resume and name != CONFIG:
                (options.out / name).unlink()
    except OSError as error:
        raise UsageError(f"cannot write to {options.out}: {error.strerror}") from None


def _report(settings: Settings, options: RunOptions, completed: int) -> TerminalReport | nullcontext[None]:
    if options.console is None:
        return nullcontext()
    return TerminalReport(settings.rounds, completed, options.console)


def _serve(settings: Settings, run: FederatedRun, report: Observer | None, grid: Grid) -> None:
    lossy = DropoutGrid(grid, settings.dropout, settings.seed, steps_of(settings))
    run.run(lossy, *([report] if report else []), lossy)


def _run_backend(
    settings: Settings, federation: Federation | None, serve: Callable[[Grid], None], cancelled: threading.Event
) -> None:
    if settings.backend == "ray":
        with TemporaryDirectory(prefix="propolis-") as folder:
            stores = None
            if federation is not None:  # Ray moves a device from process to process
                write_federation(federation, Path(folder))
                stores = DevicesInFolder(Path(folder))
            run_on_ray(settings, client_app(settings, stores), serve, cancelled)
        return
    in_memory = DevicesInMemory(federation.devices) if federation else None
    with LocalGrid(partial(client_app, settings, in_memory), settings.clients, workers=settings.workers) as grid:
        serve(grid)
