"""One run of the ready ServerApp from settings to files in a folder, over whatever grid it is given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from flwr.serverapp import Grid
from rich.console import Console

from propolis.secure.errors import CancelledError, StorageError, UsageError
from propolis.secure.he.held import scheme_of
from propolis.secure.he.parameters import choose
from propolis.server.app import (
    MAY_CHANGE_ON_RESUME,
    FederatedRun,
    Members,
    Observer,
    initial_model,
    masking_of,
    protection_of,
    run_digest,
)
from propolis.server.checkpoint import RunState, load_checkpoint
from propolis.server.registration import RUN, Registration
from propolis.server.report import (
    CONFIG,
    CURVES,
    ENCRYPTED_MODEL,
    MODEL,
    RESULT,
    Failure,
    LogReport,
    TerminalReport,
    write_config,
    write_results,
)
from propolis.settings import Settings, load_settings
from propolis.task import Examples, Task

CHECKPOINT = "checkpoint.safetensors"
_FILES = (RESULT, MODEL, ENCRYPTED_MODEL, CURVES, CONFIG, CHECKPOINT, RUN)
_log = logging.getLogger("propolis.server")


class Rounds(Protocol):
    """Does the rounds of a run."""

    def __call__(self, grid: Grid, *observers: Observer) -> object:
        """Over this grid; the observers are told of each."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where a run leaves its files, and how it treats what lies there.

    Attributes:
        out: folder for the results; made when missing.
        resume: go on from the folder's checkpoint.
        force: replace another run's files.
        console: where rounds are shown; None shows nothing.
        logger: name of the logger that each round has a line in; None: no lines.
        registration: where the model goes when the run is complete; None: it stays in the folder.
    """

    out: Path
    resume: bool = False
    force: bool = False
    console: Console | None = None
    logger: str | None = None
    registration: Registration | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained, and on what it is tested.

    Attributes:
        task: the model, its loss and its evaluation.
        test: the server's test set.
        device: that evaluates.
        members: of the federation, where updates are protected.
        federation: fingerprint of the federation's root, where devices belong to one.
    """

    task: Task
    test: Examples
    device: torch.device
    members: Members | None = None
    federation: bytes | None = None


def run_job(
    settings: Settings,
    options: RunOptions,
    job: Job,
    over: Callable[[Rounds, threading.Event], None],
) -> dict[str, Any]:
    """Do the rounds of a run, or those that are left of it, and leave its files in the folder.

    Args:
        settings: what to do.
        options: the folder, and how to treat what lies there.
        job: what is trained.
        over: gets a function that does the rounds over a grid and tells observers of them, and the event that ends
            the run at the next exchange; returns when the rounds are done.

    Returns:
        The content of result.json, and what the model was registered as.

    Raises:
        UsageError: the folder or the registry is not usable; nothing has been written.
        PropolisError: the run failed; the rounds completed so far are in the folder, with status ``failed``.
        KeyboardInterrupt: the user stopped it; likewise, with status ``interrupted``.
    """
    start = state_of_run(options.out, settings, job.task) if options.resume else None
    cancelled = threading.Event()
    run = FederatedRun(
        settings,
        job.task,
        job.test,
        device=job.device,
        members=job.members,
        start=start,
        checkpoint=options.out / CHECKPOINT,
        cancelled=cancelled,
    )
    _prepare_registry(options)
    _prepare_folder(settings, options)
    log = LogReport(settings.rounds, options.logger) if options.logger else None
    try:
        with _report(settings, options, run.state.completed) as report:
            reports = [each for each in (report, log) if each is not None]
            over(lambda grid, *observers: run.run(grid, *reports, *observers), cancelled)
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, CancelledError))
        with suppress(StorageError):  # the first error is the one to report
            write_results(
                options.out, settings, run.state, "interrupted" if stopped else "failed", Failure.of(error, run.retries)
            )
        raise
    result = write_results(options.out, settings, run.state, "completed")
    return result | registered(options, job.federation)


def registered(options: RunOptions, federation: bytes | None) -> dict[str, Any]:
    """Register the run that is complete in its folder, where that is asked for.

    Returns:
        What to add to the result; see `Registration.register`.

    Raises:
        UsageError: it could not be registered; the message says how to go on.
    """
    if options.registration is None:
        return {}
    try:
        return options.registration.register(options.out, federation)
    except UsageError as error:
        again = f"`propolis models register {options.out} --model {options.registration.model}`"
        raise type(error)(
            f"the run in {options.out} is complete, but not registered: {error}; mended, {again}"
        ) from None


def require_feasible(settings: Settings, task: Task, devices: int, max_weight: float) -> None:
    """Refuse a protected run whose sums cannot be made, before anything starts.

    Args:
        settings: of the run.
        task: whose model's parameters are summed.
        devices: that take part at most.
        max_weight: see `Members`.

    Raises:
        UsageError: the message says what cannot be, and what to change.
    """
    if settings.is_encrypted:
        scheme_of(choose(devices, settings.value_bits, seeded=settings.he_mode == "seeded"))
    sampled = max(int(devices * settings.fraction), settings.min_clients)
    if settings.is_masked and settings.is_encrypted:
        masking_of(settings).require_feasible(sampled)
    if settings.is_encrypted:
        return
    parameters = sum(array.size for array in initial_model(settings, task).arrays.values())
    protection_of(settings, max_weight).require_feasible(sampled, parameters)


def require_same_run(out: Path, settings: Settings) -> None:
    """Refuse to go on in a folder with the run of other settings; a folder without a run is fine.

    Raises:
        UsageError: the message names what differs.
    """
    if not (out / CONFIG).is_file():
        return
    if refused := sorted(_changed(load_settings(out / CONFIG), settings)):
        raise UsageError(f"{out} holds a run with another {', '.join(refused)}: name another folder, or remove it")


def state_of_run(out: Path, settings: Settings, task: Task) -> RunState | None:
    """How far the run in `out` has come; None where no round is done. Raises UsageError when it is not this run."""
    if not (out / CHECKPOINT).exists():
        return None
    state = load_checkpoint(out / CHECKPOINT, initial_model(settings, task), run_digest(settings))
    if state.completed > settings.rounds:
        raise UsageError(f"{out} has done {state.completed} rounds already, more than {settings.rounds}")
    return state


def settings_to_resume(out: Path, overrides: Mapping[str, Any]) -> Settings:
    """The settings of the run in `out`, with the few changes that leave its rounds as they would have been.

    Raises:
        UsageError: the folder holds no run, or an override would make another run of it.
    """
    if not (out / CONFIG).is_file():
        raise UsageError(f"{out} holds no run to resume: {CONFIG} is missing")
    before = load_settings(out / CONFIG)
    after = load_settings(base=before, overrides=overrides)
    if refused := sorted(_changed(before, after)):
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in refused)
        raise UsageError(f"{flags} would make another run of {out}; start a new one without --resume")
    return after


def _changed(before: Settings, after: Settings) -> set[str]:
    """The settings that differ and make another run of it."""
    changed = {key for key in Settings.model_fields if getattr(before, key) != getattr(after, key)}
    # The cosine reaches zero after the last round, so each round depends on how many there are.
    return changed - (MAY_CHANGE_ON_RESUME - ({"rounds"} if before.lr_schedule == "cosine" else set()))


def _prepare_registry(options: RunOptions) -> None:
    if options.registration is not None and (notice := options.registration.prepare()):
        _log.warning("%s", notice)


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
