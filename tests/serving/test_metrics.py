"""The port of the metrics: what one caller may take of it."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest
from inferring import ANYWHERE, DEADLINE_S

from propolis.link.address import Address
from propolis.secure.errors import UsageError
from propolis.serving.metrics import Metrics, MetricsServer, ModelMetrics

LIMIT_S = 2.0


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    metrics = Metrics()
    metrics.add(ModelMetrics("digits", "1"))
    made = MetricsServer(metrics, ANYWHERE, LIMIT_S)
    yield made
    made.close()


def shown(server: MetricsServer) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=DEADLINE_S) as reply:
        return str(reply.read().decode())


def test_connections_are_few_and_end(server: MetricsServer) -> None:
    before, began = threading.active_count(), time.monotonic()
    callers = [socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) for _ in range(40)]
    for caller in callers[:16]:
        caller.sendall(b"GET /metrics HTTP/1.1\r\n")  # and no more
    assert callers[-1].recv(1) == b"", "there is no place for the last one"
    assert time.monotonic() - began < LIMIT_S / 2, "it is told at once"
    assert threading.active_count() - before <= 2 * 16
    assert [caller.recv(1) for caller in callers[:16]] == [b""] * 16
    assert time.monotonic() - began < DEADLINE_S / 2
    assert 'model="digits"' in shown(server)
    for caller in callers:
        caller.close()


def test_a_caller_that_sends_a_little_now_and_then_is_hung_up_on(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), DEADLINE_S) as caller:
        began = time.monotonic()
        with pytest.raises(OSError, match=r"reset|pipe"):
            drip(caller)
        assert time.monotonic() - began < DEADLINE_S / 2


def drip(caller: socket.socket) -> None:
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        caller.sendall(b"X")
        time.sleep(0.05)


def test_an_address_of_version_6_and_one_that_is_taken() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    made = MetricsServer(Metrics(), Address("::1", 0))
    try:
        with pytest.raises(UsageError, match="cannot listen on"):
            MetricsServer(Metrics(), Address("::1", made.port))
    finally:
        made.close()
