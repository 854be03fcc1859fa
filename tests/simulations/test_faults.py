"""Each fault over plain sockets on loopback. Where time appears, it is what a fault takes at least."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace

import pytest

from propolis.simulations.faults import Faults, Proxy

END_AFTER_S = 20.0
PAYLOAD = bytes(range(256)) * 400


class Echo:
    """Sends back what it receives; `open` holds its ends of the connections."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            self.open.append(end)
            threading.Thread(target=self._answer, args=(end,), daemon=True).start()

    @staticmethod
    def _answer(end: socket.socket) -> None:
        try:
            while data := end.recv(2**16):
                end.sendall(data)
            end.shutdown(socket.SHUT_WR)
        except OSError:
            end.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self.open:
            end.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


@pytest.fixture
def connect() -> Iterator[Callable[[Proxy], socket.socket]]:
    ends: list[socket.socket] = []

    def open_one(proxy: Proxy) -> socket.socket:
        host, port = proxy.address.split(":")
        ends.append(socket.create_connection((host, int(port)), END_AFTER_S))
        return ends[-1]

    yield open_one
    for end in ends:
        end.close()


Connect = Callable[[Proxy], socket.socket]


def receive(end: socket.socket, size: int) -> bytes:
    """`size` bytes, or fewer where the stream ends or is reset before."""
    data = b""
    try:
        while len(data) < size and (part := end.recv(size - len(data))):
            data += part
    except ConnectionResetError:
        pass
    return data


def echoed(end: socket.socket, data: bytes) -> bytes:
    sender = threading.Thread(target=send_quietly, args=(end, data))
    sender.start()
    answer = receive(end, len(data))
    sender.join(END_AFTER_S)
    return answer


def send_quietly(end: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        end.sendall(data)


def is_reset(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b"never"
    except ConnectionResetError:
        return True


def lives(connect: Connect, proxy: Proxy) -> bool:
    try:
        return echoed(connect(proxy), b"ping") == b"ping"
    except ConnectionResetError:  # so early that connecting saw it
        return False


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + END_AFTER_S
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_without_faults_it_is_not_there(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port) as proxy:
        first, second = connect(proxy), connect(proxy)
        assert echoed(first, PAYLOAD) == echoed(second, PAYLOAD) == PAYLOAD
        assert eventually(lambda: proxy.counters.bytes_down == 2 * len(PAYLOAD))
        assert proxy.counters.bytes_up == 2 * len(PAYLOAD)
        assert (proxy.counters.connections, proxy.counters.open, proxy.counters.cuts) == (2, 2, 0)
        first.shutdown(socket.SHUT_WR)
        assert first.recv(1) == b""
        assert eventually(lambda: proxy.counters.open == 1)
    assert is_reset(second)


def test_bytes_are_late_each_way(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(latency_s=0.1)) as proxy:
        end, began = connect(proxy), time.monotonic()
        assert echoed(end, b"ping") == b"ping"
        assert time.monotonic() - began >= 0.2


@pytest.mark.parametrize("shared", [False, True])
def test_bytes_come_no_faster_than_the_rate(echo: Echo, connect: Connect, shared: bool) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(bytes_per_s=40_000, shared=shared, ways=("up",))) as proxy:
        ends, began = [connect(proxy), connect(proxy)], time.monotonic()
        for end in ends:
            end.sendall(bytes(10_000))
        assert [len(receive(end, 10_000)) for end in ends] == [10_000, 10_000]
        assert time.monotonic() - began >= (0.5 if shared else 0.25)


def test_faults_change_while_bytes_are_under_way(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(bytes_per_s=100)) as proxy:
        end = connect(proxy)
        end.sendall(PAYLOAD)  # would take a quarter of an hour
        proxy.faults = Faults()
        assert receive(end, len(PAYLOAD)) == PAYLOAD


def test_a_cut_resets_both_ends(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port) as proxy:
        end = connect(proxy)
        assert echoed(end, b"ping") == b"ping"
        assert proxy.cut() == 1
        assert is_reset(end)
        assert eventually(lambda: proxy.counters.open == 0)
        assert eventually(lambda: echo.open[0].fileno() == -1)
        assert (proxy.cut(), proxy.counters.cuts) == (0, 1)
        assert echoed(connect(proxy), b"again") == b"again"


def test_a_connection_is_cut_after_so_many_bytes(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(cut_after=50_000, ways=())) as proxy:
        end = connect(proxy)
        assert len(echoed(end, bytes(49_999))) == 49_999
        end.sendall(bytes(2))
        receive(end, 2)
        assert eventually(lambda: proxy.counters.cuts == 1)
        assert proxy.counters.bytes_up == 50_000


def test_the_seed_says_which_connections_are_cut(echo: Echo, connect: Connect) -> None:
    def outcomes(seed: int) -> list[bool]:
        with Proxy("127.0.0.1", echo.port, Faults(cut_at_connect=0.4, seed=seed)) as proxy:
            lived = [lives(connect, proxy) for _ in range(20)]
            assert proxy.counters.cuts == lived.count(False)
        return lived

    first = outcomes(seed=1)
    assert 0 < first.count(False) < 20
    assert outcomes(seed=1) == first
    assert outcomes(seed=2) != first


def test_connections_are_cut_by_chance_while_they_are_open(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(cuts_per_s=1.0)) as proxy:
        assert is_reset(connect(proxy))
        assert proxy.counters.cuts == 1


@pytest.mark.parametrize("way", ["up", "down"])
def test_one_direction_ends_and_the_other_stays(echo: Echo, connect: Connect, way: str) -> None:
    with Proxy("127.0.0.1", echo.port) as proxy:
        device = connect(proxy)
        assert echoed(device, b"ping") == b"ping"
        server = echo.open[0]
        if way == "down":
            proxy.half_close("down")
            device.sendall(b"still heard")
            assert device.recv(1) == b""
            assert eventually(lambda: proxy.counters.bytes_up == len(b"pingstill heard"))
        else:
            proxy.half_close("up")
            assert device.recv(1) == b""  # the echo ends when its input has ended
            device.sendall(b"lost")
            assert proxy.counters.bytes_up == 4
            assert server.fileno() != -1
        assert proxy.counters.cuts == 0


def test_every_kth_byte_has_one_bit_flipped(echo: Echo, connect: Connect) -> None:
    def corrupted(seed: int) -> bytes:
        with Proxy("127.0.0.1", echo.port, Faults(corrupt_every=1000, ways=("down",), seed=seed)) as proxy:
            return echoed(connect(proxy), PAYLOAD)

    damaged = corrupted(seed=1)
    flipped = [(index, before ^ after) for index, (before, after) in enumerate(zip(PAYLOAD, damaged, strict=True))]
    changes = {index: bits for index, bits in flipped if bits}
    assert sorted(changes) == list(range(999, len(PAYLOAD), 1000))
    assert all(bits.bit_count() == 1 for bits in changes.values())
    assert corrupted(seed=1) == damaged
    assert corrupted(seed=2) != damaged


def test_a_slow_reader_holds_the_sender_back_and_loses_nothing(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(stalled=True), window=2**17) as proxy:
        end = connect(proxy)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        end.settimeout(0.5)
        sent = 0
        with suppress(TimeoutError):
            while sent < 2**24:
                sent += end.send(bytes(2**14))
        assert sent < 2**20
        assert proxy.counters.bytes_up == 0
        proxy.faults = Faults()
        end.settimeout(END_AFTER_S)
        assert receive(end, sent) == bytes(sent)


def test_a_device_that_does_not_read_holds_the_server_back(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, window=2**17) as proxy:
        end = connect(proxy)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        sender = threading.Thread(target=send_quietly, args=(end, bytes(2**25)), daemon=True)
        sender.start()
        assert eventually(lambda: proxy.counters.bytes_down > 0)
        time.sleep(0.5)
        assert proxy.counters.bytes_down < 2**22
        proxy.cut()
        sender.join(END_AFTER_S)


def test_a_black_hole_takes_all_and_gives_nothing(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(black_hole=True, ways=("up",))) as proxy:
        end = connect(proxy)
        end.sendall(bytes(2**22))
        proxy.faults = Faults()
        end.sendall(b"out of order")
        end.settimeout(0.3)
        with pytest.raises(TimeoutError):
            end.recv(1)
        assert proxy.counters.bytes_up == 0
        assert echoed(connect(proxy), b"ping") == b"ping"


def test_new_connections_are_refused_and_open_ones_stay(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port) as proxy:
        end = connect(proxy)
        assert echoed(end, b"ping") == b"ping"
        proxy.faults = replace(proxy.faults, refuse=True)
        with pytest.raises(ConnectionRefusedError):
            connect(proxy)
        assert echoed(end, b"pong") == b"pong"
        proxy.faults = replace(proxy.faults, refuse=False)
        assert echoed(connect(proxy), b"ping") == b"ping"


def test_a_server_that_is_not_there_is_a_reset(connect: Connect) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with Proxy("127.0.0.1", unused.getsockname()[1]) as proxy:
            assert not lives(connect, proxy)


def test_leaving_ends_the_thread(echo: Echo, connect: Connect) -> None:
    with Proxy("127.0.0.1", echo.port, Faults(stalled=True)) as proxy:
        connect(proxy).sendall(b"held")
        assert any(thread.name == "faults" for thread in threading.enumerate())
    assert not any(thread.name == "faults" for thread in threading.enumerate())
