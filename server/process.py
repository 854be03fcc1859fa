"""The server process: waits for its devices, runs the job over the link, and goes on after a crash where it was."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.serverapp import ServerApp
from rich.console import Console

from propolis.flower import SERVER_NODE_ID, quiet_flower
from propolis.link.authority import Authority
from propolis.link.certificates import Tls, fault_of, load_tls
from propolis.link.spool import Spools
from propolis.references import load_attribute
from propolis.secure.errors import PropolisError, TooFewPeersError, UsageError
from propolis.server.checkpoint import RunState
from propolis.server.config import NOWHERE, Served, ServerConfig
from propolis.server.delivery import Delivery
from propolis.server.enroll import Enrolment
from propolis.server.he_served import KEY_FOLDER, ServedKey
from propolis.server.inference import inference
from propolis.server.job import (
    Job,
    Rounds,
    RunOptions,
    registered,
    require_feasible,
    require_same_run,
    run_job,
    state_of_run,
)
from propolis.server.link import LinkOptions, LinkServer
from propolis.server.link_grid import LinkGrid
from propolis.server.membership import Membership
from propolis.server.opening import open_registry
from propolis.server.post import Post
from propolis.server.protected_members import members_of
from propolis.server.registration import Registration
from propolis.server.report import CONFIG, result_of, write_results
from propolis.server.reports import Reports
from propolis.server.shelf import Shelf
from propolis.settings import Settings
from propolis.storage import alone
from propolis.task import check_task, choose_device, load_task

JOURNAL = "round.journal"
_PROCESS_LOCK = "server.lock"
_LOOK_S = 0.5
# Settings that are this machine's own, or that devices have no use for.
_OURS = frozenset({"data", "device", "clients", "backend", "workers", "ray_cpus", "dropout", "partition"})
_log = logging.getLogger("propolis.server")


@dataclass(frozen=True, slots=True)
class Ends:
    """What the link needs.

    Attributes:
        tls: the server's certificate and key.
        membership: who may connect.
        enrolment: answers newcomers, where there are to be any.
        he_key: of homomorphic encryption, for rounds and for the devices.
    """

    tls: Tls
    membership: Membership
    enrolment: Enrolment | None
    he_key: ServedKey


def serve(served: Served, passphrase: bytes | None = None, console: Console | None = None) -> dict[str, Any] | None:
    """Run the job that `served` describes over the devices that connect.

    Args:
        served: what the process was told.
        passphrase: of the private keys in the federation's folder.
        console: where rounds are shown; None shows log lines alone.

    Returns:
        The content of result.json; None where a ServerApp of the user's took the place of the ready one.

    Raises:
        UsageError: something that was given is not usable; nothing has been written.
        TooFewPeersError: too few devices came, or survived a round.
        PropolisError: the run failed.
        KeyboardInterrupt: somebody stopped it; the rounds completed so far are in the folder.
    """
    quiet_flower()
    registration = _registration(served)
    with _prepared(served.config, passphrase) as ends:
        if served.config.app is None:
            return _run_ready(served, ends, console, registration)
        _run_app(load_server_app(served.config.app), served, ends)
        return None


def stay(served: Served, passphrase: bytes | None = None) -> None:
    """Let devices enrol and fetch models, and run nothing, until somebody stops it.

    Args:
        served: what the process was told.
        passphrase: of the private keys in the federation's folder.

    Raises:
        UsageError: something that was given is not usable.
        PropolisError: the link has failed.
    """
    quiet_flower()
    with suppress(KeyboardInterrupt), _prepared(served.config, passphrase) as ends:
        with _linked(served.config, {}, ends) as (_, link):
            _log.info("staying: devices may enrol and fetch models")
            while link.is_up:
                time.sleep(_LOOK_S)
        raise PropolisError("the link has failed: its log says why")


@contextmanager
def _prepared(config: ServerConfig, passphrase: bytes | None) -> Iterator[Ends]:
    """What the link needs, looked at before anything listens, and its folder, which no other server works in."""
    tls, membership = _ourselves(config, passphrase)
    enrolment, out = _enrolment(config, membership, passphrase), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with alone(out / _PROCESS_LOCK, f"another server works in {out}: name another folder"):
        yield Ends(tls, membership, enrolment, _he_key(config, membership))


def _run_app(app: ServerApp, served: Served, ends: Ends) -> None:
    """A user's ServerApp over the devices that connect."""
    config = served.config
    with _linked(config, served.run_config, ends) as (grid, link):
        _wait_for_devices(link, served.settings.clients, config.wait_seconds)
        app(grid, Context(grid.run.run_id, SERVER_NODE_ID, {}, RecordDict(), dict(served.run_config)))


def load_server_app(reference: str) -> ServerApp:
    """A user's ServerApp; raises UsageError when the reference leads to none."""
    app = load_attribute(reference, "app")
    if not isinstance(app, ServerApp):
        raise UsageError(f"app '{reference}' is no ServerApp of Flower, it is a {type(app).__name__}")
    return app


def devices_config(settings: Settings) -> dict[str, UserConfigValue]:
    """What devices are told of the run, as Flower's run configuration."""
    told = settings.model_dump(exclude=set(_OURS), exclude_none=True)
    return {name.replace("_", "-"): value for name, value in told.items()}


def _ourselves(config: ServerConfig, passphrase: bytes | None) -> tuple[Tls, Membership]:
    """The server's certificate and the federation, looked at before anything listens."""
    folder = Path(config.federation)
    tls, membership = load_tls(folder, passphrase), Membership(folder)
    if (fault := fault_of(tls, time.time())) is not None:
        raise UsageError(f"{folder}: {fault}")
    return tls, membership


def _enrolment(config: ServerConfig, membership: Membership, passphrase: bytes | None) -> Enrolment | None:
    if config.enroll == NOWHERE:
        return None
    authority = Authority.load(Path(config.federation), passphrase)
    return Enrolment(membership, authority, f":{config.listen.rpartition(':')[2]}")


def _run_ready(
    served: Served,
    ends: Ends,
    console: Console | None,
    registration: Registration | None,
) -> dict[str, Any]:
    """The ready ServerApp over the devices that connect; a run that is complete is left as it is."""
    settings, config, out = served.settings, served.config, Path(served.config.out)
    require_same_run(out, settings)
    task = load_task(settings.task, settings.data)
    start = state_of_run(out, settings, task)
    begun_before = (out / CONFIG).is_file()  # and ended before its first round did
    logger = None if console else _log.name
    options = RunOptions(out, start is not None, begun_before, console, logger, registration)
    federation = ends.membership.roster.roster.federation
    if start is not None and start.completed >= settings.rounds:
        _log.info("the run in %s is complete: nothing is left to do", out)
        return _result_again(settings, start, options, federation)
    members = members_of(settings, ends.membership, ends.he_key, out / JOURNAL)
    if members is not None and members.he_key is None:
        require_feasible(settings, task, settings.clients, members.max_weight)
    job = Job(task, check_task(task).test, choose_device(settings.device), members, federation)
    torch.set_num_threads(1)

    def over(rounds: Rounds, _: threading.Event) -> None:
        with _linked(config, devices_config(settings), ends) as (grid, link):
            left = sum(not entry.revoked for entry in ends.membership.roster.roster.entries)
            # A run that is gone on with does not wait for those that were revoked since.
            count = settings.clients if start is None else max(settings.min_clients, min(settings.clients, left))
            _wait_for_devices(link, count, config.wait_seconds)
            rounds(grid)

    return run_job(settings, options, job, over)


def _result_again(settings: Settings, state: RunState, options: RunOptions, federation: bytes) -> dict[str, Any]:
    """Of a run that is complete; a crash may have come between its last round and its registration."""
    if options.registration is not None:
        options.registration.prepare()
        write_results(options.out, settings, state, "completed")
    return result_of(settings, state, "completed") | registered(options, federation)


def _registration(served: Served) -> Registration | None:
    config = served.config
    registration = Registration.asked(config.registry, config.model, served.settings.task)
    if registration is not None and config.app is not None:
        raise UsageError("registry: a ServerApp of your own keeps its model itself; register it with `propolis models`")
    return registration


def _he_key(config: ServerConfig, membership: Membership) -> ServedKey:
    return ServedKey(Path(config.he_key) if config.he_key else Path(config.federation) / KEY_FOLDER, membership)


@contextmanager
def _linked(
    config: ServerConfig,
    run_config: Mapping[str, UserConfigValue],
    ends: Ends,
) -> Iterator[tuple[LinkGrid, LinkServer]]:
    """The grid over a link that is up meanwhile; devices are told how it ended."""
    run_id = secrets.randbits(62) + 2
    limit = config.largest_message * 2**20
    enroll = None if ends.enrolment is None else config.enroll
    options = LinkOptions(config.listen, run_id, run_config, config.heartbeat, limit, enroll)
    post = Post(limit, Spools(Path(config.out)))  # large replies wait on a disk, and not in memory as in some /tmp
    delivery = _delivery(config, ends)
    with (
        inference(config, ends.tls, ends.membership),
        LinkServer(options, ends.tls, ends.membership, post, ends.enrolment, delivery) as link,
    ):
        _log.info("listening", extra={"port": link.port, "enroll_port": link.enroll_port or None})
        yield LinkGrid(post, link.wake, run_id), link


def _delivery(config: ServerConfig, ends: Ends) -> Delivery:
    """What gives devices their models and keys; with a registry also those that enrolled after a package was sealed."""
    folder = Path(config.federation)

    def content_key(manifest: bytes) -> bytes | None:
        return None if config.registry is None else open_registry(config.registry).content_key(manifest)

    shelf = Shelf(folder, ends.membership, content_key)
    return Delivery(shelf, ends.membership, Reports(folder), config.delivery_rate * 2**10, ends.he_key)


def _wait_for_devices(link: LinkServer, count: int, seconds: float) -> None:
    """Wait until enough devices are connected.

    Raises:
        TooFewPeersError: they did not come in time.
    """
    _log.info("waiting for devices", extra={"needed": count})
    found = link.wait_for_devices(count, seconds)
    if found < count:
        raise TooFewPeersError(f"{found} devices connected within {seconds:g} s, {count} are needed")
