"""Anybody may connect to the port for enrolment: a stranger takes little of the server, and nothing for long."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from enrolling import Applicant, Site, enrolling, serving

from propolis.client.enroll import Enrolling, enroll
from propolis.link.address import Address
from propolis.link.certificates import load_tls
from propolis.protos import link_pb2 as pb
from propolis.protos import link_pb2_grpc
from propolis.secure.errors import StorageError, UsageError
from propolis.server.enroll import Hospitality

ENROLL, GET_AUTHORITY = "/propolis.link.v1.Enrolment/Enroll", "/propolis.link.v1.Enrolment/GetAuthority"
# Far more than the tests wait, of what they do not look at.
LONG_S, WAIT_S = 300.0, 30.0
# What a client of HTTP/2 says first, with empty settings.
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


@contextmanager
def channel_to(site: Site, address: Address, **options: Any) -> Iterator[grpc.Channel]:
    """As a stranger opens one, with gRPC's own limits; never another test's connection."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(site.authority.pem)
    with grpc.secure_channel(str(address), credentials, options=own, **options) as channel:
        yield channel


def connected(site: Site, address: Address) -> ssl.SSLSocket:
    """A connection that has said what it must, and asks for nothing."""
    context = ssl.create_default_context(cadata=site.authority.pem.decode())
    context.set_alpn_protocols(["h2"])
    raw = socket.create_connection(("127.0.0.1", address.port), timeout=WAIT_S)
    stream = context.wrap_socket(raw, server_hostname="localhost")
    stream.sendall(PREFACE)
    return stream


def ends(stream: ssl.SSLSocket) -> bool:
    """Whether the server closes it within the time of the test."""
    try:
        while stream.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


# What is written down.


def test_a_request_that_is_none_is_refused_without_a_stack_trace(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with serving(site) as address, channel_to(site, address) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(ENROLL)(b"\xff", timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        channel.unary_unary(GET_AUTHORITY)(b"\xff", timeout=WAIT_S)
    assert [record.name for record in caplog.records] == ["propolis.server"]
    assert "EnrollRequest: the bytes are no such message" in caplog.text


def test_many_refusals_are_few_lines_that_say_how_many(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("propolis.server.enroll.time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    with serving(site) as address:
        for clock[0] in (10.0, 10.1, 10.9, 11.1, 20.0):
            with channel_to(site, address) as channel, pytest.raises(grpc.RpcError):
                channel.unary_unary(ENROLL)(b"\xff", timeout=WAIT_S)
    lines = [record.getMessage().partition("message")[2] for record in caplog.records]
    assert lines == ["", " (and 2 more before)", ""]


def test_a_refusal_hides_no_trouble_of_the_servers_own(
    site: Site, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr("propolis.server.membership.write_atomically", full)
    request = Applicant(site.token()).request().SerializeToString()
    with serving(site) as address, channel_to(site, address) as channel:
        for each in (b"\xff", request):
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(ENROLL)(each, timeout=WAIT_S)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "no space left on device" in caplog.text


# What is small on the wire and large in memory.


def test_a_compressed_request_is_not_inflated(site: Site) -> None:
    request = Applicant(site.token()).request()
    request.signing_request = bytes(2**17)  # twice the limit; hundreds of bytes on the wire
    with serving(site) as address, channel_to(site, address, compression=grpc.Compression.Gzip) as channel:
        with pytest.raises(grpc.RpcError) as refused:
            link_pb2_grpc.EnrolmentStub(channel).Enroll(request, timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert site.asked == []


class _InBetween(link_pb2_grpc.EnrolmentServicer):
    """Whoever can redirect the device: shows as much as it likes where the authority's certificate should be."""

    def __init__(self, size: int) -> None:
        self._size = size

    def GetAuthority(self, request: Any, context: Any) -> pb.AuthorityReply:  # noqa: N802
        return pb.AuthorityReply(certificate=bytes(self._size))


@contextmanager
def in_between(site: Site, size: int, compression: grpc.Compression) -> Iterator[Address]:
    server = grpc.server(ThreadPoolExecutor(1), compression=compression)
    link_pb2_grpc.add_EnrolmentServicer_to_server(_InBetween(size), server)
    tls = load_tls(site.server)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(tls.private_key, tls.certificate)]))
    server.start()
    try:
        yield Address("localhost", port)
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize(
    ("size", "compression"), [(2**15, grpc.Compression.NoCompression), (2**13, grpc.Compression.Gzip)]
)
def test_before_the_pin_a_device_takes_one_small_uncompressed_certificate(
    site: Site, tmp_path: Path, size: int, compression: grpc.Compression
) -> None:
    with in_between(site, size, compression) as address, pytest.raises(UsageError) as told:
        enroll(enrolling(address, site.token(), tmp_path / "device"))
    assert "cannot talk to" in str(told.value)


# Who stays.


def test_a_connection_that_asks_for_nothing_is_closed(site: Site) -> None:
    with serving(site, hospitality=Hospitality(idle=0.3, age=LONG_S)) as address, connected(site, address) as stream:
        assert ends(stream)


def test_an_old_connection_is_closed(site: Site) -> None:
    hospitality = Hospitality(idle=LONG_S, age=0.3, grace=0.3)
    with serving(site, hospitality=hospitality) as address, connected(site, address) as stream:
        assert ends(stream)


def never(over: threading.Event) -> Iterator[bytes]:
    """A request whose sender takes its time."""
    over.wait(2 * WAIT_S)
    yield b""


def test_one_connection_has_two_requests_at_a_time(site: Site) -> None:
    over = threading.Event()
    with serving(site) as address, channel_to(site, address) as channel:
        grpc.channel_ready_future(channel).result(WAIT_S)  # the server has said its limits
        halves = [channel.stream_unary(ENROLL).future(never(over)) for _ in range(2)]
        with pytest.raises(grpc.RpcError) as refused:
            channel.unary_unary(GET_AUTHORITY)(b"", timeout=0.5)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
        halves[0].cancel()
        assert channel.unary_unary(GET_AUTHORITY)(b"", timeout=WAIT_S)
        over.set()


def test_half_sent_requests_keep_a_device_out_for_a_moment_only(site: Site, tmp_path: Path) -> None:
    hospitality, over = Hospitality(idle=LONG_S, age=1.0, grace=0.5), threading.Event()

    with serving(site, hospitality=hospitality) as address, ExitStack() as stack:
        stack.callback(over.set)
        halves = []
        for _ in range(32):
            channel = stack.enter_context(channel_to(site, address))
            halves += [channel.stream_unary(ENROLL).future(never(over), timeout=2 * WAIT_S) for _ in range(2)]
        for half in halves:
            assert half.code() is grpc.StatusCode.UNAVAILABLE
        enroll_within(WAIT_S, enrolling(address, site.token(), tmp_path / "device"))


def enroll_within(seconds: float, asked: Enrolling) -> None:
    """As a person does: again, when the server has no time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            enroll(asked)
        except UsageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def test_strangers_connections_are_limited_and_leave_the_files_to_the_run(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("propolis.server.enroll._MOST_CONNECTIONS", 3)
    with serving(site) as address:
        with ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connected(site, address))
            with pytest.raises(OSError, match=r"EOF|reset"):
                connected(site, address)
        enroll_within(WAIT_S, enrolling(address, site.token(), tmp_path / "device"))
