"""A bad network between devices and a server: a TCP proxy on loopback that delays, slows, cuts and corrupts.

It knows nothing of what it carries, so TLS, gRPC and plain sockets meet the same faults::

    with Proxy("127.0.0.1", 9092, Faults(latency_s=0.2)) as proxy:
        connect(proxy.address)
        proxy.faults = Faults(stalled=True)
        proxy.cut()

What a fault does is decided by `Faults.seed`, a connection's number and the position of a byte, never by timing;
only the moment of a cut under `Faults.cuts_per_s` is the clock's. A new connection itself is not delayed.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any, Self, TypeVar

from propolis.simulations.faulty_connection import CHUNK, Connection, Ends, Faults, Network, Way, reset

__all__ = ["Counters", "Faults", "Proxy"]

_Result = TypeVar("_Result")

_SOCKET_BUFFER = 2**16  # the kernel's own default grows to megabytes, which would hide a slow peer from a fast one
_DEADLINE_S = 10.0


@dataclass(frozen=True, slots=True)
class Counters:
    """What went through a proxy until now.

    Attributes:
        connections: accepted.
        open: of them, now.
        cuts: connections that the proxy ended.
        bytes_up: forwarded to the server.
        bytes_down: forwarded to the devices.
    """

    connections: int
    open: int
    cuts: int
    bytes_up: int
    bytes_down: int


class Proxy:
    """Forwards connections to a server through faults, in a thread of its own, while it is entered.

    Args:
        host: of the server.
        port: of the server.
        faults: to begin with.
        window: bytes that a connection may have under way in one direction; with a latency it bounds the
            throughput, as a TCP window does.
    """

    def __init__(self, host: str, port: int, faults: Faults | None = None, *, window: int = 2**19) -> None:
        self._target = (host, port)
        self._network = Network(faults or Faults(), window)
        self._connections: set[Connection] = set()
        self._accepted = 0
        self._server: asyncio.Server | None = None

    def __enter__(self) -> Self:
        # Keeps the port ours while connections to it are refused: a socket that is bound but does not listen.
        self._port = _bound(("127.0.0.1", 0))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faults", daemon=True)
        self._thread.start()
        self.faults = self._network.faults
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_DEADLINE_S)
        self._loop.close()
        self._port.close()

    @property
    def address(self) -> str:
        """Where devices connect, as HOST:PORT."""
        host, port = self._port.getsockname()
        return f"{host}:{port}"

    @property
    def faults(self) -> Faults:
        """What happens now; what is assigned holds from then on, for open connections too."""
        return self._network.faults

    @faults.setter
    def faults(self, faults: Faults) -> None:
        self._wait(self._apply(faults))

    @property
    def counters(self) -> Counters:
        """What went through until now."""
        network = self._network
        return Counters(
            self._accepted, len(self._connections), network.cuts, network.carried["up"], network.carried["down"]
        )

    def cut(self) -> int:
        """Reset all open connections, and say how many those were."""

        async def cut_all() -> int:
            return sum(connection.cut() for connection in self._connections)

        return self._wait(cut_all())

    def half_close(self, way: Way) -> None:
        """End one direction of all open connections in good order; what comes for it later is lost."""

        async def end_all() -> None:
            for connection in self._connections:
                connection.streams[way].end()

        self._wait(end_all())

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_DEADLINE_S)

    async def _apply(self, faults: Faults) -> None:
        self._network.faults = faults
        if faults.refuse and self._server is not None:
            self._server.close()
            self._server = None
        elif not faults.refuse and self._server is None:
            listener = _bound(self._port.getsockname())
            self._server = await asyncio.start_server(self._accept, sock=listener, limit=CHUNK)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, *device: Any) -> None:
        number, self._accepted = self._accepted, self._accepted + 1
        random = Random(f"{self.faults.seed}/{number}")  # noqa: S311 (chances, not secrets)
        try:
            if random.random() < self.faults.cut_at_connect:
                self._network.cuts += 1
                return
            await self._serve(device, random)
        finally:
            reset(device[1])

    async def _serve(self, device: Ends, random: Random) -> None:
        with suppress(OSError, TimeoutError):  # the device sees by the reset that there is no server
            server = await asyncio.wait_for(asyncio.open_connection(*self._target, limit=CHUNK), _DEADLINE_S)
            _bound_buffers(server[1].get_extra_info("socket"))
            connection = Connection(self._network, device, server, random)
            self._connections.add(connection)
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)


def _bound(address: tuple[str, int]) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    _bound_buffers(bound)  # what it accepts inherits them
    bound.bind(address)
    return bound


def _bound_buffers(end: socket.socket) -> None:
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        end.setsockopt(socket.SOL_SOCKET, buffer, _SOCKET_BUFFER)
