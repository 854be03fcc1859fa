"""The devices of a measured secure sum: real ones with made-up updates, timed by what they do themselves.

They live in this process, or apart from it in one of their own, so that this process's memory is the server's, and
neither side profits from what the other one has verified.
"""

from __future__ import annotations

import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from numpy.typing import NDArray

from propolis.flower import message_to_bytes, set_identity
from propolis.messages import RECORD, model_digest, model_in, protocol_record, shared_input_of
from propolis.secure.codec.pipeline import Pipeline
from propolis.secure.codec.update import Update, encode_update
from propolis.secure.errors import PropolisError
from propolis.secure.identity import Signed, forget_signatures, trusted_roster
from propolis.secure.secagg.addition import RingVector
from propolis.secure.secagg.device import Device, Upload
from propolis.secure.secagg.plan import terms_of
from propolis.secure.secagg.states import Exchange
from propolis.simulations.federation import SIMULATED, make_federation

# The one array of the model.
NAME = "update"
# Updates are normal and cut off at five deviations, which is the range that the fixed-point grid is fit to.
_DEVIATION, RANGE = 0.02, 0.1
_RUN_ID, _NODE_ID = 1, 1 << 63
# The longest that a device apart may take to answer, in seconds.
_PATIENCE_S = 300.0


def update_of(index: int, dimension: int) -> NDArray[np.float32]:
    """What a device has learnt: (dimension,) float32, the same every time."""
    drawn = np.random.default_rng(index).standard_normal(dimension, np.float32) * np.float32(_DEVIATION)
    return np.clip(drawn, -RANGE, RANGE, out=drawn)


class Devices(Protocol):
    """Some devices that answer at once.

    Attributes:
        root_key, roster: of their federation.
    """

    root_key: bytes
    roster: Signed

    def answer(self, exchange: Exchange, index: int, request: bytes) -> bytes:
        """A device's reply."""

    def costs(self) -> Mapping[int, tuple[float, int]]:
        """Seconds that each device has worked, and bytes that it has sent."""


class DevicesHere:
    """Devices in this process.

    Args:
        count: how many.
        dimension: length of their updates.
    """

    def __init__(self, count: int, dimension: int) -> None:
        set_identity(_RUN_ID)
        federation = make_federation(count)
        self.root_key, self.roster = federation.root_key, federation.roster
        self._states, self._dimension = federation.devices, dimension
        self._content = content_of(dimension)
        self._seconds: dict[int, float] = defaultdict(float)
        self._bytes: dict[int, int] = defaultdict(int)

    def answer(self, exchange: Exchange, index: int, request: bytes) -> bytes:
        """A device's reply, computed without what the other devices have left in the process's memory."""
        forget_signatures()
        trusted_roster.cache_clear()
        terms_of.cache_clear()
        update = update_of(index, self._dimension) if exchange is Exchange.UPLOAD else np.zeros(0, np.float32)
        device = Device(self._states[index], SIMULATED, time.time())
        began = time.perf_counter()
        if exchange is Exchange.UPLOAD:
            reply = self._upload(device, request, update)
        else:
            reply = getattr(device, exchange.label)(request)
        self._seconds[index] += time.perf_counter() - began
        self._bytes[index] += _size_on_wire(exchange, reply)
        return reply

    def costs(self) -> Mapping[int, tuple[float, int]]:
        """See `Devices.costs`."""
        return {index: (self._seconds[index], self._bytes[index]) for index in self._seconds}

    def _upload(self, device: Device, request: bytes, update: NDArray[np.float32]) -> bytes:
        """What `propolis.client.update` does around an app's training."""
        digest = model_digest(model_in(self._content))
        shared_input = shared_input_of(self._content, digest, "")
        device.begin_upload(request, shared_input)
        terms = device.terms
        rng = np.random.default_rng(int.from_bytes(device.rounding_seed(terms.kind, terms.plan.round), "big"))
        weighted = Update({NAME: update}, 1.0, {})
        pipeline = Pipeline(terms.encoding, len(terms.cohort), {NAME: (self._dimension,)}, {})
        vector, lanes, metrics = encode_update(weighted, pipeline, terms.place(device.state.index), rng)
        encoded = RingVector(vector, terms.grid.ring)
        return device.upload(request, Upload(shared_input, digest, encoded, lanes, metrics))


def content_of(dimension: int) -> RecordDict:
    """What a strategy sends to all devices: a model."""
    return RecordDict({"arrays": ArrayRecord({NAME: Array(np.zeros(dimension, np.float32))})})


def _size_on_wire(exchange: Exchange, reply: bytes) -> int:
    """Bytes of a reply as the Flower message that `propolis.client.update` makes of it."""
    asked = Message(RecordDict(), _NODE_ID, "train", group_id="1")
    return len(message_to_bytes(Message(RecordDict({RECORD: protocol_record(exchange, reply)}), reply_to=asked)))


class DevicesApart:
    """Devices in `process`, at the other end of `connection`; see `devices_apart`."""

    def __init__(self, connection: Connection, process: BaseProcess) -> None:
        self._connection, self.process = connection, process
        self.root_key, self.roster = self._receive()

    def answer(self, exchange: Exchange, index: int, request: bytes) -> bytes:
        """See `Devices.answer`."""
        reply: bytes = self._ask((exchange, index, request))
        return reply

    def costs(self) -> Mapping[int, tuple[float, int]]:
        """See `Devices.costs`."""
        costs: Mapping[int, tuple[float, int]] = self._ask(None)
        return costs

    def _ask(self, request: object) -> Any:
        with suppress(OSError):  # it has ended: receiving finds that out, too
            self._connection.send(request)
        return self._receive()

    def _receive(self) -> Any:
        try:
            if self._connection.poll(_PATIENCE_S):
                return self._connection.recv()
        except (EOFError, OSError):
            raise PropolisError("the process of the devices has ended") from None
        raise PropolisError(f"a device did not answer in {_PATIENCE_S:g} s")


@contextmanager
def devices_apart(count: int, dimension: int) -> Iterator[DevicesApart]:
    """Devices in a new process, which ends with the context."""
    spawning = get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=_serve, args=(theirs, count, dimension), daemon=True)
    process.start()
    theirs.close()
    try:
        yield DevicesApart(ours, process)
    finally:
        ours.close()  # which it notices between two answers
        process.join(1.0)
        process.kill()
        process.join()


def _serve(connection: Connection, count: int, dimension: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    devices = DevicesHere(count, dimension)
    connection.send((devices.root_key, devices.roster))
    try:
        while True:
            asked = connection.recv()
            connection.send(devices.costs() if asked is None else devices.answer(*asked))
    except (EOFError, OSError):
        return
