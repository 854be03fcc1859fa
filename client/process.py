"""The device process: one outbound connection for ever, and the app that answers what comes over it."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.clientapp import ClientApp

from propolis.client.agent import Agent, AgentOptions
from propolis.client.config import ClientConfig
from propolis.client.deliveries import Deliveries, Taking
from propolis.client.he_fetch import KeyFetcher
from propolis.client.infer import probe_of_this_device
from propolis.client.opening import Opening
from propolis.client.runner import AppRunner, Worker
from propolis.client.state import FOLDER_KEY
from propolis.flower import quiet_flower
from propolis.link.certificates import DeviceName, Tls, fault_of, load_tls
from propolis.link.spool import Spools
from propolis.references import load_attribute
from propolis.secure.errors import UsageError
from propolis.secure.manifest import Manifest
from propolis.storage import alone

_PROCESS_LOCK = "agent.lock"
_log = logging.getLogger("propolis.client")


@dataclass(frozen=True, slots=True)
class Attendance:
    """How long a device stays.

    Attributes:
        once: until a run is over, in place of for ever.
        patience: with `once`, seconds without a connection after which it gives up.
    """

    once: bool = False
    patience: float = 60.0


def attend(folder: Path, config: ClientConfig, attendance: Attendance, passphrase: bytes | None = None) -> None:
    """Serve the federation as the device in a folder; the app may still be at work when this ends.

    Args:
        folder: the device's.
        config: what it was told.
        attendance: how long.
        passphrase: of its keys and its state.

    Raises:
        UsageError: something that was given is not usable.
        RefusedByServerError: the server does not take this device, or could not be reached.
        KeyboardInterrupt: somebody stopped it.
    """
    quiet_flower()
    server, tls = _ends(folder, config, passphrase)
    app = load_client_app(config.app) if config.app else _ready_app(config)
    node_config = {FOLDER_KEY: str(folder.resolve()), **config.node}
    keys = KeyFetcher(folder, server, tls, passphrase)
    runner = AppRunner(app, DeviceName.of(tls.certificate).node_id, node_config, keys.prepare)
    options = AgentOptions(server, attendance.once, attendance.patience, largest_message=config.largest_message * 2**20)
    deliveries = _deliveries(folder, config, server, tls, passphrase) if config.install else None
    asking: list[Deliveries | KeyFetcher] = [keys] if deliveries is None else [keys, deliveries]

    def news(spread_s: float) -> None:
        for each in asking:
            each.news(spread_s)

    with alone(folder / _PROCESS_LOCK, f"another process is this device already: it runs with {folder}"):
        asyncio.run(_run(Agent(options, tls, runner, Worker(), Spools(folder), news), asking))


def fetch(folder: Path, config: ClientConfig, passphrase: bytes | None = None) -> list[Manifest]:
    """Ask the server once for models, as the device in a folder, and install them.

    Args:
        folder: the device's.
        config: what it was told.
        passphrase: of its keys and its state.

    Returns:
        What was installed.

    Raises:
        UsageError: something that was given is not usable.
        PropolisError: the server cannot be reached or does not take this device, or a model could not be taken.
    """
    return asyncio.run(_deliveries(folder, config, *_ends(folder, config, passphrase), passphrase).look())


def _deliveries(folder: Path, config: ClientConfig, server: str, tls: Tls, passphrase: bytes | None) -> Deliveries:
    taking = Taking(
        server,
        config.largest_model * 2**20,
        config.download_rate * 2**10,
        config.store_plain,
        probe_of_this_device(),
        Opening.told(config),
    )
    return Deliveries(folder, tls, taking, passphrase)


def _ends(folder: Path, config: ClientConfig, passphrase: bytes | None) -> tuple[str, Tls]:
    """Where the server is, and the device's certificate and key, looked at before anything connects."""
    if config.server is None:
        raise UsageError(f"{folder} names no server: give --server HOST:PORT")
    tls = load_tls(folder, passphrase)
    if (fault := fault_of(tls, time.time())) is not None:
        raise UsageError(f"{folder}: {fault}")
    return config.server, tls


def load_client_app(reference: str) -> ClientApp:
    """A user's ClientApp; raises UsageError when the reference leads to none."""
    app = load_attribute(reference, "app")
    if not isinstance(app, ClientApp):
        raise UsageError(f"app '{reference}' is no ClientApp of Flower, it is a {type(app).__name__}")
    return app


def _ready_app(config: ClientConfig) -> ClientApp:
    from propolis.client.ready import ready_app  # torch takes seconds, and a user's own app may not need it

    if config.task is None or config.data is None:
        raise UsageError("the ready app needs a task and the device's data: give --task and --data, or an --app")
    return ready_app(config.task, Path(config.data), config.device, config.threads)


async def _run(agent: Agent, asking: Sequence[Deliveries | KeyFetcher]) -> None:
    """Run the agent until it ends, or a signal says so; what is fetched then goes on the next time."""
    loop, stopped_by = asyncio.get_running_loop(), list[signal.Signals]()

    def stop(sign: signal.Signals) -> None:
        stopped_by.append(sign)
        agent.stop()

    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, stop, sign)
    tasks = [asyncio.create_task(each.run()) for each in asking]
    try:
        await agent.run()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if stopped_by:
        raise KeyboardInterrupt
