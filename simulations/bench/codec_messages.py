"""What the secure protocol itself costs on the wire: every message of a small run, split by exchange.

An upload's masked vector, and the model that goes out with its request, are counted apart: they are the codec's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from propolis.flower import quiet_flower, wire_size
from propolis.messages import broadcast_in, open_record
from propolis.secure.graph import sharing
from propolis.secure.secagg.messages import UploadReply, from_bytes
from propolis.secure.secagg.states import Exchange
from propolis.server.app import FederatedRun, Members
from propolis.server.exchange import GridWrapper
from propolis.settings import Settings, load_settings
from propolis.simulations.apps import client_app, largest_device, load_data
from propolis.simulations.federation import DevicesInMemory, make_federation
from propolis.simulations.local import LocalGrid

_ROUNDS = 3
# Exchanges that come once a run; the others come every round.
_ONCE = (Exchange.HELLO,)


@dataclass(slots=True)
class Traffic:
    """Messages of one exchange in one direction.

    Attributes:
        messages: how many.
        protocol: their bytes without the codec's.
        codec: bytes of vectors, or of models.
    """

    messages: int = 0
    protocol: int = 0
    codec: int = 0

    def add(self, size: int, codec: int) -> None:
        """Count one more message, `codec` of whose `size` bytes are the codec's."""
        self.messages += 1
        self.protocol += size - codec
        self.codec += codec


def _traffic() -> defaultdict[Exchange, Traffic]:
    return defaultdict(Traffic)


@dataclass(slots=True)
class Meter:
    """Traffic of a run by exchange."""

    up: defaultdict[Exchange, Traffic] = field(default_factory=_traffic)
    down: defaultdict[Exchange, Traffic] = field(default_factory=_traffic)


class ExchangeGrid(GridWrapper):
    """Reads off every message that crosses the wire of the grid that it wraps which exchange it belongs to.

    Attributes:
        meter: what has crossed so far.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.meter = Meter()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push and count."""
        outgoing = list(messages)
        ids = super().push_messages(outgoing)
        for message in outgoing:  # now that they carry their ids
            exchange, _ = open_record(message.content)
            self.meter.down[exchange].add(wire_size([message]), _model_bytes(message))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and count; error replies belong to no exchange."""
        for message in super().pull_messages(message_ids):
            if message.has_content():
                exchange, body = open_record(message.content)
                self.meter.up[exchange].add(wire_size([message]), _vector_bytes(exchange, body))
            yield message


def measure_messages(devices: int) -> dict[str, Any]:
    """The protocol's bytes, against an honest and against a lying server.

    Returns:
        By kind of server: the number of neighbours, and by exchange and direction the bytes per device.
    """
    return {name: _measure(devices, malicious) for name, malicious in (("secagg", False), ("malicious", True))}


def _measure(devices: int, malicious: bool) -> dict[str, Any]:
    sizes = {"clients": devices, "min_clients": devices, "rounds": _ROUNDS, "epochs": 1}
    kind = {"protection": "secagg", "codec": "dense", "malicious": malicious}
    settings = load_settings(overrides={"task": "digits", **sizes, **kind})
    meter = _run(settings)
    shared = sharing(devices, settings.assume_corrupted, settings.assume_dropped, malicious)
    exchanges = {
        exchange.label: {"once": exchange in _ONCE, **_per_device(meter, exchange, devices, shared.degree)}
        for exchange in Exchange
        if exchange in meter.down
    }
    return {"devices": devices, "neighbours": shared.degree, "rounds": _ROUNDS, "exchanges": exchanges}


def _run(settings: Settings) -> Meter:
    """A real run of the digits task, metered."""
    quiet_flower()
    task, data = load_data(settings.task, settings.data)
    federation = make_federation(settings.clients, settings.seed)
    members = Members(federation.verified_roster, largest_device(settings, data, settings.clients))
    run = FederatedRun(settings, task, data.test, device=torch.device("cpu"), members=members)
    apps = partial(client_app, settings, DevicesInMemory(federation.devices))
    with LocalGrid(apps, settings.clients, workers=0) as grid:
        metered = ExchangeGrid(grid)
        run.run(metered)
    return metered.meter


def _per_device(meter: Meter, exchange: Exchange, devices: int, neighbours: int) -> dict[str, Any]:
    """Bytes per device and round (or once), and what of that is for a neighbour."""
    times = devices if exchange in _ONCE else devices * _ROUNDS
    directions = {"up": meter.up[exchange], "down": meter.down[exchange]}
    return {
        way: {
            "protocol": traffic.protocol / times,
            "per_neighbour": traffic.protocol / times / neighbours,
            "codec": traffic.codec / times,
            "counted": asdict(traffic),
        }
        for way, traffic in directions.items()
    }


def _model_bytes(message: Message) -> int:
    """Of the model in a request, as a step or as it is."""
    arrays = (array for record in message.content.array_records.values() for array in record.values())
    return len(broadcast_in(message.content)) + sum(len(array.data) for array in arrays)


def _vector_bytes(exchange: Exchange, body: bytes) -> int:
    return len(from_bytes(UploadReply, body, len(body)).vector) if exchange is Exchange.UPLOAD else 0
