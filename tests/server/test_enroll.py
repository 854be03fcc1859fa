"""Enrolment at the server: what it asks of a device before it lets it in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from enrolling import HOUR_S, Applicant, Site, serving

from propolis.link.certificates import DeviceName, is_issued_by, load_tls, parse_certificate, to_der
from propolis.protos import link_pb2 as pb
from propolis.protos import link_pb2_grpc
from propolis.secure.errors import PeerError, StorageError, TrustError, UsageError
from propolis.secure.identity import descriptor_digest
from propolis.secure.wire import read
from propolis.server.enroll import make_enrolment_server

NOW = time.time()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


@pytest.fixture
def device(site: Site) -> Applicant:
    return Applicant(site.token("clinic", HOUR_S, NOW))


def test_an_invited_device_gets_its_certificate_and_the_roster(site: Site, device: Applicant) -> None:
    reply = site.enrolment.answer(device.request(NOW), NOW)
    certificate = parse_certificate(reply.certificate)
    assert certificate.public_key() == device.tls_key.public_key()
    assert is_issued_by(certificate, parse_certificate(site.authority.pem))
    name = DeviceName.of(reply.certificate)
    assert (name.index, name.descriptor) == (0, descriptor_digest(device.state.descriptor))
    site.membership.require(name)
    assert reply.roster == site.membership.roster.signed
    assert reply.link_address == ":7443"


def test_a_roster_that_was_copied_a_moment_ago_counts(site: Site) -> None:
    enrolment = site.enrolment
    assert enrolment.answer(Applicant(site.token("new")).request(NOW), NOW).certificate


def test_a_revocation_that_an_enrolment_finds_first_is_still_news_to_the_link(site: Site, device: Applicant) -> None:
    """The link puts devices out when it hears of a newer roster."""
    site.membership.refresh()
    site.federation.revoke("clinic")
    with pytest.raises(TrustError, match="is revoked"):
        site.enrolment.answer(device.request(NOW), NOW)
    assert site.membership.refresh()
    assert not site.membership.refresh()


def test_the_roots_key_is_not_needed(site: Site, device: Applicant) -> None:
    (site.folder / "root.key").unlink()
    assert site.enrolment.answer(device.request(NOW), NOW).certificate


def test_asked_again_with_the_same_keys_the_place_is_the_same(site: Site, device: Applicant) -> None:
    first = site.enrolment.answer(device.request(NOW), NOW)
    late = NOW + 2 * HOUR_S  # the invitation is over, but the device is in: it may not have heard so
    second = site.enrolment.answer(device.request(late), late)
    assert DeviceName.of(first.certificate) == DeviceName.of(second.certificate)


@pytest.mark.parametrize("difference", [-599, 599])
def test_a_clock_that_is_a_little_off_is_no_matter(site: Site, device: Applicant, difference: int) -> None:
    assert site.enrolment.answer(device.request(NOW + difference), NOW).certificate


@pytest.mark.parametrize(
    ("difference", "line"),
    [
        (3600, "the device's clock is 60 minutes ahead of the server's: set it right"),
        (-3600 * 5, "the device's clock is 5 hours behind the server's"),
        (-NOW, "days behind the server's"),
    ],
    ids=["an hour ahead", "hours behind", "of 1970"],
)
def test_a_clock_that_is_off_is_told_in_words(site: Site, device: Applicant, difference: float, line: str) -> None:
    with pytest.raises(TrustError, match=line):
        site.enrolment.answer(device.request(NOW + difference), NOW)
    assert site.membership.enrolled(0) is None


def test_another_version_is_told(site: Site, device: Applicant) -> None:
    with pytest.raises(PeerError, match="the device enrols by version 2, the server by 1"):
        site.enrolment.answer(device.request(NOW, version=2), NOW)


def test_a_member_that_cannot_be_kept_gets_no_certificate(
    site: Site, device: Applicant, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageError("cannot write: no space left on device")

    monkeypatch.setattr("propolis.server.membership.write_atomically", full)
    with pytest.raises(StorageError):
        site.enrolment.answer(device.request(NOW), NOW)


# On the wire.


@pytest.fixture
def stub(site: Site) -> Iterator[Any]:
    with serving(site) as address:
        credentials = grpc.ssl_channel_credentials(site.authority.pem)
        with grpc.secure_channel(str(address), credentials) as channel:
            yield link_pb2_grpc.EnrolmentStub(channel)


def test_the_authority_is_shown_to_everybody(site: Site, stub: Any) -> None:
    assert stub.GetAuthority(pb.AuthorityRequest(), timeout=10).certificate == to_der(
        parse_certificate(site.authority.pem)
    )


def test_a_refusal_has_its_reason_and_its_code(site: Site, device: Applicant, stub: Any) -> None:
    site.federation.revoke("clinic")
    for request, code, reason in (
        (device.request(), grpc.StatusCode.PERMISSION_DENIED, "device 0 (clinic) is revoked"),
        (pb.EnrollRequest(version=1), grpc.StatusCode.INVALID_ARGUMENT, "EnrollRequest.invitation is missing"),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            stub.Enroll(request, timeout=10)
        assert (refused.value.code(), refused.value.details()) == (code, reason)  # type: ignore[attr-defined]


def test_the_servers_own_troubles_are_not_told_to_strangers(
    site: Site, device: Applicant, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        raise StorageError(f"cannot write {path}: no space left on device")

    monkeypatch.setattr("propolis.server.membership.write_atomically", full)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Enroll(device.request(), timeout=10)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]
    assert str(site.folder) not in str(refused.value.details())  # type: ignore[attr-defined]


def test_a_request_that_is_too_large_is_not_read(site: Site, device: Applicant, stub: Any) -> None:
    request = device.request()
    request.signing_request = bytes(2**16)
    with pytest.raises(grpc.RpcError) as refused:
        stub.Enroll(request, timeout=10)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert site.asked == []


def test_an_address_that_is_taken_is_one_line(site: Site) -> None:
    async def listen(address: str) -> None:
        make_enrolment_server(site.enrolment, address, load_tls(site.server))

    with serving(site) as taken:
        for address in (f"127.0.0.1:{taken.port}", "192.0.2.1:0"):
            with pytest.raises(UsageError, match=f"cannot listen on {address}"):
                asyncio.run(listen(address))


def test_what_is_kept_is_what_was_sent(site: Site, device: Applicant, stub: Any) -> None:
    stub.Enroll(device.request(), timeout=10)
    (asked,) = site.asked
    assert site.membership.enrolled(0) == device.state.descriptor
    assert read(type(device.state.descriptor), asked.descriptor) == device.state.descriptor
