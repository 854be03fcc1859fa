"""The ready apps over simulated devices: for our own grids, and for ``flwr run .`` on this repository."""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from propolis.client.app import Participant, hold_out, make_client_app
from propolis.client.train import LocalTrainer, choose_device, derive_seed
from propolis.secure.errors import UsageError
from propolis.server.app import FederatedRun
from propolis.settings import Settings, load_settings
from propolis.simulations.partition import Partition
from propolis.task import DataSet, Task, check_task, load_task


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


def client_app(settings: Settings) -> ClientApp:
    """The ClientApp of simulated devices; it loads task and data in the process where it first runs."""
    return make_client_app(partial(_participant, settings))


# What follows is for Flower's own runtimes, which import this module and look for two apps by name. Settings come
# from [tool.flwr.app.config] in pyproject.toml and from `flwr run --run-config`.


def _participant_of_run(context: Context) -> Participant:
    if "partition-id" not in context.node_config:
        raise UsageError("this app simulates devices: run it with Flower's simulation runtime")
    return _participant(load_settings(overrides=_known(context)), context)


def _known(context: Context) -> dict[str, object]:
    return {key: value for key, value in context.run_config.items() if key != "out"}


client = make_client_app(_participant_of_run)

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """The ServerApp of ``flwr run .``; ``out`` in the run's configuration names a folder for the results."""
    from propolis.simulations.report import LogReport, write_results

    settings = load_settings(overrides=_known(context))
    task, data = load_data(settings.task, settings.data)
    run = FederatedRun(settings, task, data.test, device=choose_device(settings.device))
    state = run.run(grid, LogReport(settings.rounds))
    if out := context.run_config.get("out"):
        write_results(Path(str(out)), settings, state, status="completed")
