"""Whoever is not the invited device gets no place, and whoever is not the token's server learns nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from attacks.fuzzing import CASES, fuzz
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from enrolling import DAY_S, HOUR_S, Applicant, Site, enrolling, serving

from propolis.client.enroll import SETTINGS_FILE, enroll
from propolis.link.authority import Authority
from propolis.link.certificates import DeviceName, new_tls_key, parse_certificate, signing_request, to_der, to_pem
from propolis.link.enrolment import EnrollReply
from propolis.link.keys import encode_private_key
from propolis.protos import identity_pb2, link_pb2_grpc
from propolis.protos import link_pb2 as pb
from propolis.secure import labels, wire
from propolis.secure.errors import PeerError, Refusal, RefusedError, TrustError, UsageError
from propolis.secure.identity import Signed, SigningKey, descriptor_digest, sign
from propolis.server.enroll import Enrolment

NOW = time.time()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


@pytest.fixture
def other(tmp_path: Path) -> Site:
    return Site(tmp_path / "other")


def refused(site: Site, request: pb.EnrollRequest, line: str, now: float = NOW) -> None:
    """This line, and nobody is let in."""
    before = {path.name: path.read_bytes() for path in (site.server / "enrolled").iterdir()}
    with pytest.raises(RefusedError, match=line):
        site.enrolment.answer(request, now)
    assert {path.name: path.read_bytes() for path in (site.server / "enrolled").iterdir()} == before


# Whoever asks.


def test_a_token_that_was_used_gives_no_second_place(site: Site) -> None:
    token = site.token()
    site.enrolment.answer(Applicant(token).request(NOW), NOW)
    refused(site, Applicant(token).request(NOW), "the token was used before, by another device: place 0 is taken")


def test_an_expired_invitation_is_refused(site: Site) -> None:
    device = Applicant(site.token("clinic", HOUR_S, NOW))
    late = NOW + HOUR_S + 2
    refused(site, device.request(late), "the invitation of clinic has expired: ask for a new one", late)


def test_an_expired_invitation_of_a_used_place_lets_no_other_device_in(site: Site) -> None:
    token = site.token("clinic", HOUR_S, NOW)
    site.enrolment.answer(Applicant(token).request(NOW), NOW)
    late = NOW + HOUR_S + 2
    refused(site, Applicant(token).request(late), "has expired", late)


def test_an_invitation_that_was_taken_back_is_refused(site: Site) -> None:
    device = Applicant(site.token())
    site.federation.revoke("clinic")
    refused(site, device.request(NOW), r"device 0 \(clinic\) is revoked")


def test_under_an_expired_roster_nobody_enrols(site: Site) -> None:
    late = NOW + 366 * DAY_S
    refused(site, Applicant(site.token("clinic", 900 * DAY_S)).request(late), "roster 2 has expired", late)


def test_an_invitation_of_another_federation_is_refused(site: Site, other: Site) -> None:
    site.token()
    refused(site, Applicant(other.token()).request(NOW), "the invitation is not one of this federation")


def test_an_invitation_that_the_roster_does_not_have_is_refused(site: Site) -> None:
    """The root made it, but what the root says now is the roster."""
    roster = site.federation.roster
    with site.federation._changing() as root:
        _, invitation, key = root.invite(roster, "eve")
    token = replace(site.token(), invitation=invitation, private_key=key.private)
    refused(site, Applicant(token).request(NOW), "place 0 of the roster has another invitation")


def test_an_invitation_beyond_the_roster_is_refused(site: Site, tmp_path: Path) -> None:
    token = site.token()
    (site.server / "roster.bin").write_bytes(first_roster(site))
    late_server = Site(site.folder)
    refused(late_server, Applicant(token).request(NOW), "device 0 is not in the roster 1")


def first_roster(site: Site) -> bytes:
    roster = replace(site.federation.roster, number=1, entries=())
    with site.federation._changing() as root:
        return wire.encode(root.sign_roster(roster), identity_pb2.Signed)


def resigned(device: Applicant) -> Signed:
    """The descriptor of another device's keys, signed with a key that is not the invitation's."""
    return sign(labels.DESCRIPTOR, SigningKey.generate().private, device.state.own_descriptor, identity_pb2.Descriptor)


def flipped(device: Applicant) -> Signed:
    payload = bytearray(device.state.descriptor.payload)
    payload[-1] ^= 1
    return replace(device.state.descriptor, payload=bytes(payload))


@pytest.mark.parametrize("forge", [resigned, flipped])
def test_a_descriptor_that_the_invitation_did_not_sign_is_refused(
    site: Site, forge: Callable[[Applicant], Signed]
) -> None:
    device = Applicant(site.token())
    refused(site, device.request(NOW, descriptor=forge(device)), "signature on a descriptor does not hold")


def test_a_descriptor_of_another_place_is_refused(site: Site) -> None:
    device, ward = Applicant(site.token()), Applicant(site.token("ward"))
    refused(site, device.request(NOW, descriptor=ward.state.descriptor), "signature on a descriptor does not hold")
    moved = replace(device.state.own_descriptor, index=1)
    token = site.token()
    signed = sign(labels.DESCRIPTOR, token.private_key, moved, identity_pb2.Descriptor)
    refused(site, device.request(NOW, descriptor=signed), "the descriptor is for another place")


def test_who_knows_a_members_public_words_gets_no_certificate_in_its_name(site: Site) -> None:
    """Members see each other's descriptors, and the server sees invitations."""
    victim, thief = Applicant(site.token()), Applicant(site.token("thief"))
    site.enrolment.answer(victim.request(NOW), NOW)
    stolen = victim.request(NOW)
    stolen.signing_request = signing_request(thief.tls_key)
    refused(site, stolen, "the request was not made by the device of its descriptor")
    forged = thief.request(NOW, invitation=victim.invitation, descriptor=victim.state.descriptor)
    refused(site, forged, "the request was not made by the device of its descriptor")


def test_a_request_is_fresh(site: Site) -> None:
    """The clock is under the proof: who has recorded a request cannot make it young again."""
    device = Applicant(site.token())
    recorded = device.request(NOW - 3600)
    refused(site, recorded, "the device's clock is 60 minutes behind")
    recorded.clock = int(NOW)
    refused(site, recorded, "the request was not made by the device of its descriptor")


def test_a_tls_key_that_the_device_does_not_have_is_refused(site: Site) -> None:
    device = Applicant(site.token())
    broken = bytearray(signing_request(device.tls_key))
    broken[-1] ^= 1
    refused(site, device.request(NOW, csr=bytes(broken)), "the signature on the request for a certificate")


def test_no_request_smuggles_another_identity_into_a_certificate(site: Site) -> None:
    victim = Applicant(site.token())
    site.enrolment.answer(victim.request(NOW), NOW)
    name = DeviceName(site.federation.roster.federation, 0, descriptor_digest(victim.state.descriptor))
    thief = Applicant(site.token("thief"))
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    for extension in (
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name.uri), x509.DNSName("localhost")]),
        x509.BasicConstraints(ca=True, path_length=None),
    ):
        builder = builder.add_extension(extension, critical=True)
    csr = builder.sign(thief.tls_key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    reply = site.enrolment.answer(thief.request(NOW, csr=csr), NOW)
    assert DeviceName.of(reply.certificate).index == 1
    certificate = x509.load_der_x509_certificate(reply.certificate)
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_device_cannot_pose_as_the_server(site: Site, tmp_path: Path) -> None:
    """Its certificate is of the same authority, but for another use, and names no host."""
    device = Applicant(site.token())
    reply = site.enrolment.answer(device.request(NOW), NOW)
    folder = tmp_path / "posing"
    folder.mkdir()
    write_tls(folder, encode_private_key(device.tls_key), reply.certificate, site.authority)
    with serving(site, folder) as address:
        with pytest.raises(UsageError, match="the server's certificate is not for localhost but for none"):
            enroll(enrolling(address, site.token("ward"), tmp_path / "ward"))
        credentials = grpc.ssl_channel_credentials(site.authority.pem)
        with grpc.secure_channel(str(address), credentials) as channel, pytest.raises(grpc.RpcError):
            link_pb2_grpc.EnrolmentStub(channel).GetAuthority(pb.AuthorityRequest(), timeout=3)


def write_tls(folder: Path, key: bytes, certificate: bytes, authority: Authority) -> None:
    (folder / "tls.key").touch(mode=0o600)
    (folder / "tls.key").write_bytes(key)
    (folder / "tls.pem").write_bytes(to_pem(x509.load_der_x509_certificate(certificate)))
    (folder / "ca.pem").write_bytes(authority.pem)


def test_bytes_of_a_stranger_are_a_request_or_refused(site: Site) -> None:
    """Random and mutated ones; what is refused lets nobody in."""
    device, enrolment = Applicant(site.token()), site.enrolment
    valid = device.request(NOW)
    placed = {device.state.descriptor.payload}

    def answer(data: bytes) -> object:
        reply = enrolment.answer(wire.parse(pb.EnrollRequest, data), NOW)
        kept = site.membership.enrolled(0)
        assert kept is not None
        assert kept.payload in placed
        return reply

    assert fuzz("EnrollRequest", [valid.SerializeToString()], answer, RefusedError) < CASES


def test_bytes_that_are_a_certificate_name_one_device_or_none(site: Site) -> None:
    reply = site.enrolment.answer(Applicant(site.token()).request(NOW), NOW)
    assert fuzz("certificate", [reply.certificate], DeviceName.of, TrustError) < CASES
    assert fuzz("parsed", [reply.certificate], parse_certificate, ValueError) < CASES


def test_bytes_that_are_a_request_for_a_certificate_get_one_or_are_refused(site: Site) -> None:
    name = DeviceName(bytes(32), 0, bytes(32))
    csr = signing_request(new_tls_key())
    assert fuzz("csr", [csr], lambda data: site.authority.issue_for_device(data, name, NOW), PeerError) < CASES


# Whoever answers.


def test_a_server_of_another_authority_is_told_nothing(site: Site, other: Site, tmp_path: Path) -> None:
    token = site.token()
    with serving(other) as address, pytest.raises(UsageError, match=r"fingerprint differs\. This may be an attack"):
        enroll(enrolling(address, token, tmp_path / "device"))
    assert other.asked == []
    assert not (tmp_path / "device" / SETTINGS_FILE).exists()


class _Posing(Enrolment):
    """Shows an authority that is not the one of its certificate, as everybody can who has seen it."""

    def __init__(self, site: Site, shown: bytes) -> None:
        super().__init__(site.membership, site.authority, ":1")
        self.shown, self.asked = shown, 0

    @property
    def authority(self) -> bytes:
        return self.shown

    def answer(self, asked: pb.EnrollRequest, now: float) -> EnrollReply:
        self.asked += 1
        return super().answer(asked, now)


def test_a_server_that_shows_the_right_authority_without_a_certificate_of_it_is_told_nothing(
    site: Site, other: Site, tmp_path: Path
) -> None:
    posing = _Posing(other, site.authority.der)
    with (
        serving(other, enrolment=posing) as address,
        pytest.raises(UsageError, match="has no certificate of the token's authority"),
    ):
        enroll(replace(enrolling(address, site.token(), tmp_path / "device"), timeout=3))
    assert posing.asked == 0


def test_a_server_that_shows_no_certificate_at_all_is_told_nothing(site: Site, tmp_path: Path) -> None:
    posing = _Posing(site, b"")
    with serving(site, enrolment=posing) as address, pytest.raises(UsageError, match="fingerprint differs"):
        enroll(enrolling(address, site.token(), tmp_path / "device"))
    assert posing.asked == 0


class _Lying(Enrolment):
    """Answers with something else than it should."""

    def __init__(self, site: Site, lie: Callable[[Site, EnrollReply], EnrollReply]) -> None:
        super().__init__(site.membership, site.authority, ":1")
        self._site, self._lie = site, lie

    def answer(self, asked: pb.EnrollRequest, now: float) -> EnrollReply:
        return self._lie(self._site, super().answer(asked, now))


def certificate_of(site: Site, name: DeviceName, key: bytes | None = None, authority: Authority | None = None) -> bytes:
    csr = key or signing_request(new_tls_key())
    return to_der((authority or site.authority).issue_for_device(csr, name, time.time()))


def for_another_key(site: Site, reply: EnrollReply) -> EnrollReply:
    return replace(reply, certificate=certificate_of(site, DeviceName.of(reply.certificate)))


def own_request(site: Site) -> bytes:
    """The request of the device that just asked."""
    return site.asked[-1].signing_request


def in_anothers_name(site: Site, reply: EnrollReply) -> EnrollReply:
    name = replace(DeviceName.of(reply.certificate), index=1)
    return replace(reply, certificate=certificate_of(site, name, own_request(site)))


def for_other_keys(site: Site, reply: EnrollReply) -> EnrollReply:
    name = replace(DeviceName.of(reply.certificate), descriptor=bytes(32))
    return replace(reply, certificate=certificate_of(site, name, own_request(site)))


def of_another_authority(site: Site, reply: EnrollReply) -> EnrollReply:
    rogue = Authority.create(site.federation.roster.federation, time.time())
    return replace(reply, certificate=certificate_of(site, DeviceName.of(reply.certificate), own_request(site), rogue))


def not_yet_valid(site: Site, reply: EnrollReply) -> EnrollReply:
    name, later = DeviceName.of(reply.certificate), time.time() + 3 * DAY_S
    return replace(reply, certificate=to_der(site.authority.issue_for_device(own_request(site), name, later)))


def with_a_forged_roster(site: Site, reply: EnrollReply) -> EnrollReply:
    forged = sign(labels.ROSTER, SigningKey.generate().private, site.federation.roster, identity_pb2.Roster)
    return replace(reply, roster=forged)


def with_another_roster_of_the_root(site: Site, entries: tuple[object, ...], not_after: float) -> Signed:
    roster = replace(site.federation.roster, entries=entries, not_after=int(not_after))
    with site.federation._changing() as root:
        return root.sign_roster(roster)


def with_a_roster_without_it(site: Site, reply: EnrollReply) -> EnrollReply:
    return replace(reply, roster=with_another_roster_of_the_root(site, (), NOW + DAY_S))


def with_another_in_its_place(site: Site, reply: EnrollReply) -> EnrollReply:
    entry = replace(site.federation.roster.entries[0], public_key=bytes(32))
    return replace(reply, roster=with_another_roster_of_the_root(site, (entry,), NOW + DAY_S))


def with_an_old_roster(site: Site, reply: EnrollReply) -> EnrollReply:
    return replace(reply, roster=with_another_roster_of_the_root(site, site.federation.roster.entries, NOW - 5))


def with_no_certificate(site: Site, reply: EnrollReply) -> EnrollReply:
    return replace(reply, certificate=b"\x30\x00")


def with_a_strange_address(site: Site, reply: EnrollReply) -> EnrollReply:
    return replace(reply, link_address="nowhere")


@pytest.mark.parametrize(
    ("lie", "line"),
    [
        (for_another_key, "is not for the key in tls.key"),
        (in_anothers_name, "the certificate is another device's"),
        (for_other_keys, "the certificate is another device's"),
        (of_another_authority, "was not issued by the authority"),
        (not_yet_valid, "is this machine's clock right?"),
        (with_a_forged_roster, "the signature on a roster does not hold"),
        (with_a_roster_without_it, "device 0 is not in the roster 2"),
        (with_another_in_its_place, "the roster has another device in this one's place"),
        (with_an_old_roster, "roster 2 has expired"),
        (with_no_certificate, "the server's answer does not hold"),
        (with_a_strange_address, "expected HOST:PORT"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_an_answer_that_does_not_hold_is_not_kept(
    site: Site, tmp_path: Path, lie: Callable[[Site, EnrollReply], EnrollReply], line: str
) -> None:
    token, folder = site.token(), tmp_path / "device"

    class Recorded(_Lying):
        def answer(self, asked: pb.EnrollRequest, now: float) -> EnrollReply:
            site.asked.append(asked)
            return super().answer(asked, now)

    with serving(site, enrolment=Recorded(site, lie)) as address, pytest.raises(UsageError) as told:
        enroll(enrolling(address, token, folder))
    assert line in str(told.value)
    kept = ["device.lock", "device.state", "enroll.lock", "hybrid.key", "tls.key"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    with serving(site) as address:  # and a server that does not lie is still believed
        enroll(enrolling(address, token, folder))


class _Shouting(Enrolment):
    def answer(self, asked: pb.EnrollRequest, now: float) -> EnrollReply:
        raise TrustError(Refusal.IDENTITY, "\x1b[2Jpropolis: all is well\r\n" + "x" * 5000)


def test_a_servers_reason_cannot_write_over_the_terminal(site: Site, tmp_path: Path) -> None:
    shouting = _Shouting(site.membership, site.authority, ":1")
    with serving(site, enrolment=shouting) as address, pytest.raises(UsageError) as told:
        enroll(enrolling(address, site.token(), tmp_path / "device"))
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 500
