"""The ready apps over simulated devices: for our own grids, and for ``flwr run .`` on this repository."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp

from propolis.client.app import Participant, hold_out, make_client_app
from propolis.client.state import FOLDER_KEY
from propolis.client.train import LocalTrainer, derive_seed
from propolis.client.update import SecureMod, StoreOf, secure_mod
from propolis.secure.errors import UsageError
from propolis.server.app import FederatedRun, Members
from propolis.server.he_served import KEY_FOLDER, ServedKey
from propolis.server.membership import Membership
from propolis.server.protected_members import under_key
from propolis.settings import Settings, load_settings
from propolis.simulations.federation import SIMULATED, Federation, federation_of_run, parameters_of, simulated_mod
from propolis.simulations.partition import Partition
from propolis.task import DataSet, Task, check_task, choose_device, load_task


@lru_cache(maxsize=1)
def load_data(reference: str, data: str | None) -> tuple[Task, DataSet]:
    """A checked task and its whole data, once per process: server and devices of one process share them."""
    task = load_task(reference, data)
    return task, check_task(task)


class Fleet:
    """All the devices that one process simulates: one task, one model, and each device's share of the data."""

    def __init__(self, settings: Settings, clients: int) -> None:
        torch.set_num_threads(1)  # small models run slower on more, and sums would depend on the number
        task, data = load_data(settings.task, settings.data)
        self._settings = settings
        self._examples = data.train
        self._parts = Partition.parse(settings.partition).split(self._examples, clients, settings.seed)
        self._trainer = LocalTrainer(task, choose_device(settings.device))
        self._participants: dict[int, Participant] = {}

    def participant(self, index: int) -> Participant:
        """The device with partition `index`, made on first use."""
        if index not in self._participants:
            own = self._examples.subset(self._parts[index])
            share = self._settings.holdout if self._settings.evaluate_fraction else 0.0
            train, held_out = hold_out(own, share, derive_seed("holdout", self._settings.seed, index))
            self._participants[index] = Participant(self._trainer, train, held_out, str(index))
        return self._participants[index]


@lru_cache(maxsize=1)
def _fleet(settings: Settings, clients: int) -> Fleet:
    return Fleet(settings, clients)


def _participant(settings: Settings, context: Context) -> Participant:
    clients = int(context.node_config["num-partitions"])
    return _fleet(settings, clients).participant(int(context.node_config["partition-id"]))


def client_app(settings: Settings, stores: StoreOf | None = None) -> ClientApp:
    """The ClientApp of simulated devices; it loads task and data in the process where it first runs.

    Args:
        settings: of the run.
        stores: of the devices, where the run is protected.
    """
    logging.getLogger("propolis.client").filters[:] = [_FirstOfEachReason()]
    return make_client_app(partial(_participant, settings), [SecureMod(stores)] if stores else [])


class _FirstOfEachReason(logging.Filter):
    """Lets through what no device of this process has said before: a thousand of them fail alike."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[object] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.args[0] if isinstance(record.args, tuple) and record.args else None
        reason = getattr(said, "refusal", record.msg)
        is_new = reason not in self._seen
        self._seen.add(reason)
        return is_new


def largest_device(settings: Settings, data: DataSet, clients: int) -> int:
    """The number of examples of the device that has most: what a simulation makes the public maximum weight."""
    parts = Partition.parse(settings.partition).split(data.train, clients, settings.seed)
    return max(len(part) for part in parts)


# What follows is for Flower's own runtimes, which import this module and look for two apps by name. Settings come
# from [tool.flwr.app.config] in pyproject.toml and from `flwr run --run-config`.


def _participant_of_run(context: Context) -> Participant:
    if "partition-id" not in context.node_config:
        raise UsageError("this app simulates devices: run it with Flower's simulation runtime")
    return _participant(load_settings(overrides=_known(context)), context)


_NOT_SETTINGS = frozenset({"out", "federation"})


def _known(context: Context) -> dict[str, object]:
    return {key: value for key, value in context.run_config.items() if key not in _NOT_SETTINGS}


def _mod_of_run(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """A device with keys of its own is always protected; a simulated one, where the run is."""
    if FOLDER_KEY in context.node_config:
        return secure_mod(message, context, call_next)
    if load_settings(overrides=_known(context)).is_protected:
        return simulated_mod(message, context, call_next)
    return call_next(message, context)


@contextmanager
def _members_of_run(
    settings: Settings, data: DataSet, grid: Grid, context: Context
) -> Iterator[tuple[Members | None, Federation | None]]:
    """Who may take part: the federation in a folder, or one that is made for a simulation."""
    if not settings.is_protected:
        yield None, None
        return
    devices = len(list(grid.get_node_ids()))
    if folder := str(context.run_config.get("federation") or ""):
        yield _members_in(Path(folder), settings, data), None
        return
    if devices < SIMULATED.min_cohort:
        raise UsageError(f"a secure sum takes {SIMULATED.min_cohort} devices or more: this federation has {devices}")
    he, masked = parameters_of(settings, devices), settings.is_masked
    with federation_of_run(context.run_id, devices, settings.seed, he, masked=masked) as federation:
        he_key = federation.he.public if federation.he else None
        largest = largest_device(settings, data, devices)
        yield Members(federation.verified_roster, largest, settings.seed, he_key=he_key), federation


def _members_in(folder: Path, settings: Settings, data: DataSet) -> Members:
    """Those of the federation in a server's folder, with the key in ``he`` there where updates are encrypted."""
    membership = Membership(folder)
    roster = membership.roster
    members = Members(roster, largest_device(settings, data, len(roster.roster.entries)))
    if not settings.is_encrypted:
        return members
    return under_key(members, ServedKey(folder / KEY_FOLDER, membership), settings)[0]


client = make_client_app(_participant_of_run, [_mod_of_run])

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The ServerApp of ``flwr run .``.

    In the run's configuration, ``out`` names a folder for the results, and ``federation`` the one with the roster
    of real devices; without it, a protected run makes a federation for simulated ones.
    """
    from propolis.server.report import LogReport, write_results
    from propolis.simulations.witness import Witness

    settings = load_settings(overrides=_known(context))
    task, data = load_data(settings.task, settings.data)
    device = choose_device(settings.device)
    with _members_of_run(settings, data, grid, context) as (members, federation):
        run = FederatedRun(settings, task, data.test, device=device, members=members)
        witness = Witness(federation, task, data.test, device) if federation and federation.he else None
        state = run.run(grid, LogReport(settings.rounds), *([witness] if witness else []))
    if out := context.run_config.get("out"):
        write_results(Path(str(out)), settings, state, status="completed")
        if witness:
            witness.report(Path(str(out)))
