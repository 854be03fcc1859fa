"""Anybody may connect to the port for enrolment: a stranger takes little of the server, and nothing for long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from enrolling import Applicant, Site, serving

from propolis.link.address import Address
from propolis.secure.errors import StorageError

ENROLL, GET_AUTHORITY = "/propolis.link.v1.Enrolment/Enroll", "/propolis.link.v1.Enrolment/GetAuthority"
WAIT_S = 30.0


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
