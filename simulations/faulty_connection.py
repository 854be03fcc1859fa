"""One connection through a bad network: what `propolis.simulations.faults` does to bytes that are under way."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

Way = Literal["up", "down"]
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]

WAYS: tuple[Way, ...] = get_args(Way)
CHUNK = 2**14
_STEP_S = 0.02  # how soon a changed fault is felt by what waits
_CUT_TICK_S = 0.1
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER on, with zero seconds: closing sends a reset and drops what is unsent


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to every connection of a proxy; the default is nothing.

    Attributes:
        latency_s: seconds that a byte is under way.
        bytes_per_s: bytes per second.
        shared: whether all connections share that rate; else each has its own.
        corrupt_every: one bit of every byte at this distance is flipped.
        stalled: nothing is forwarded, and as soon as the window is full nothing is read: a slow reader. When it ends,
            the stream goes on and nothing is lost.
        black_hole: all is read and nothing is forwarded. A stream that lost bytes so stays silent for good.
        ways: directions that the faults above are for; "up" is from the devices to the server.
        cut_after: bytes in one direction after which a connection is cut.
        cut_at_connect: chance that a new connection is cut at once.
        cuts_per_s: chance that a connection is cut within a second.
        refuse: new connections are refused, as by a server that is not there; open ones stay.
        seed: of the chances and the flipped bits.
    """

    latency_s: float = 0.0
    bytes_per_s: float | None = None
    shared: bool = False
    corrupt_every: int | None = None
    stalled: bool = False
    black_hole: bool = False
    ways: tuple[Way, ...] = WAYS
    cut_after: int | None = None
    cut_at_connect: float = 0.0
    cuts_per_s: float = 0.0
    refuse: bool = False
    seed: int = 0


class Network:
    """What all connections of a proxy share: the faults of the moment, the counters, the rate.

    Args:
        faults: to begin with.
        window: bytes that a connection may have under way in one direction.
    """

    def __init__(self, faults: Faults, window: int) -> None:
        self.faults = faults
        self.window = window
        self.carried: dict[Way, int] = dict.fromkeys(WAYS, 0)
        self.cuts = 0
        self.paces: dict[Way, Pace] = {way: Pace() for way in WAYS}


class Pace:
    """Lets bytes through at a rate."""

    def __init__(self) -> None:
        self._free_at = 0.0

    async def pass_through(self, size: int, bytes_per_s: float) -> None:
        """Return when `size` bytes have been sent after all that came before."""
        self._free_at = max(self._free_at, time.monotonic()) + size / bytes_per_s
        await asyncio.sleep(self._free_at - time.monotonic())


class Connection:
    """A device's connection and the one to the server that belongs to it.

    Args:
        network: what it shares with others.
        device: the device's end.
        server: the server's end.
        random: decides when it is cut and which bits are flipped.
    """

    def __init__(self, network: Network, device: Ends, server: Ends, random: Random) -> None:
        self._network = network
        self._random = random
        self._writers = (device[1], server[1])
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: dict[Way, Stream] = {
            "up": Stream(self, network, "up", device[0], server[1], Random(random.random())),  # noqa: S311
            "down": Stream(self, network, "down", server[0], device[1], Random(random.random())),  # noqa: S311
        }

    async def run(self) -> None:
        """Forward both ways until both have ended, or one end or the network has cut the connection."""
        works = [work for stream in self.streams.values() for work in (stream.read(), stream.write())]
        self._tasks = [asyncio.create_task(work) for work in works]
        watch = asyncio.create_task(self._cut_by_chance())
        try:
            await asyncio.gather(*self._tasks)
        except (OSError, asyncio.CancelledError):  # an end reset it, or we were cut
            return
        finally:
            for task in (*self._tasks, watch):
                task.cancel()
            for writer in self._writers:
                reset(writer)

    def cut(self) -> bool:
        """Reset both ends; whether there was something to cut."""
        if all(task.done() for task in self._tasks):
            return False
        self._network.cuts += 1
        for writer in self._writers:
            reset(writer)
        for task in self._tasks:
            task.cancel()
        return True

    async def _cut_by_chance(self) -> None:
        while True:
            await asyncio.sleep(_CUT_TICK_S)
            survives = (1 - self._network.faults.cuts_per_s) ** _CUT_TICK_S
            if self._random.random() >= survives:
                self.cut()


class Stream:
    """One direction of a connection; `read` and `write` run side by side with a bounded number of bytes between."""

    def __init__(
        self,
        connection: Connection,
        network: Network,
        way: Way,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        random: Random,
    ) -> None:
        self._connection, self._network, self._way = connection, network, way
        self._source, self._sink, self._random = source, sink, random
        self._under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()  # when each is due; b"" is the end
        self._held = 0
        self._room = asyncio.Event()
        self._pace = Pace()
        self._position = 0
        self._ended = self._lost = False
        sink.transport.set_write_buffer_limits(high=CHUNK)

    async def read(self) -> None:
        """Take from the source as long as there is room."""
        data = b" "
        while data:
            data = await self._source.read(CHUNK)
            latency = self._active.latency_s
            self._under_way.put_nowait((time.monotonic() + latency, data))
            self._held += len(data)
            while self._held >= self._network.window:
                self._room.clear()
                await self._room.wait()

    async def write(self) -> None:
        """Give to the sink what is due."""
        while True:
            due, data = await self._under_way.get()
            await asyncio.sleep(due - time.monotonic())
            if not data:
                self.end()
                return
            for piece in self._pieces(data):
                await self._forward(piece)
            self._held -= len(data)
            self._room.set()

    def end(self) -> None:
        """Close this direction in good order; what still comes for it is lost."""
        if not self._ended and not self._lost:
            with suppress(OSError):
                self._sink.write_eof()
        self._ended = True

    @property
    def _active(self) -> Faults:
        """The faults of the moment, where they are for this direction."""
        faults = self._network.faults
        return faults if self._way in faults.ways else Faults(cut_after=faults.cut_after)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """The data in parts that take no longer than a step each at the rate of the moment."""
        while data:
            rate, limit = self._active.bytes_per_s, self._active.cut_after
            size = CHUNK if rate is None else max(1, int(rate * _STEP_S))
            size = size if limit is None else max(1, min(size, limit - self._position))
            yield data[:size]
            data = data[size:]

    async def _forward(self, piece: bytes) -> None:
        while self._active.stalled:
            await asyncio.sleep(_STEP_S)
        faults = self._active
        if faults.bytes_per_s is not None:
            pace = self._network.paces[self._way] if faults.shared else self._pace
            await pace.pass_through(len(piece), faults.bytes_per_s)
        self._lost = self._lost or faults.black_hole
        if self._lost or self._ended:
            return
        self._sink.write(self._corrupted(piece, faults.corrupt_every))
        await self._sink.drain()
        self._position += len(piece)
        self._network.carried[self._way] += len(piece)
        if faults.cut_after is not None and self._position >= faults.cut_after:
            self._connection.cut()

    def _corrupted(self, piece: bytes, every: int | None) -> bytes:
        if every is None:
            return piece
        changed = bytearray(piece)
        for index in range(every - 1 - self._position % every, len(piece), every):
            changed[index] ^= 1 << self._random.randrange(8)
        return bytes(changed)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection at once; its other end sees a reset, as after a cut cable or a crash."""
    with suppress(OSError):  # it is closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
