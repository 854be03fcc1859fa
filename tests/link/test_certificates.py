"""Certificates: who is at the other end, in one place and one form only."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from propolis.link.authority import AUTHORITY_DAYS, Authority, names_of
from propolis.link.certificates import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    DeviceName,
    Tls,
    fault_of,
    is_issued_by,
    load_tls,
    new_tls_key,
    parse_certificate,
    signing_request,
    to_der,
    to_pem,
)
from propolis.link.keys import encode_private_key, save_private_key
from propolis.secure.errors import PeerError, TrustError, UsageError

NOW = time.time()
DAY_S = 24 * 3600
KEY = new_tls_key()
NAME = DeviceName(bytes(range(32)), 12, b"\xff" * 32)
AUTHORITY = Authority.create(NAME.federation, NOW)
ISSUER = parse_certificate(AUTHORITY.pem)
DEVICE = AUTHORITY.issue_for_device(signing_request(KEY), NAME, NOW)
SERVER = AUTHORITY.issue_for_server(KEY.public_key(), ["cloud.example", "10.0.0.7", "::1"], 90, NOW)


def tls_of(certificate: x509.Certificate = DEVICE, authority: Authority = AUTHORITY) -> Tls:
    return Tls(encode_private_key(KEY), to_pem(certificate), authority.pem)


def test_a_devices_name_is_in_its_certificate() -> None:
    assert DeviceName.of(to_pem(DEVICE)) == DeviceName.of(to_der(DEVICE)) == NAME
    assert NAME.node_id == 2**63 - 1
    assert DeviceName(bytes(32), 0, bytes(7) + b"\x03" + bytes(24)).node_id == 1


def test_a_certificate_is_for_its_use_alone() -> None:
    uses = [c.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value for c in (DEVICE, SERVER)]
    assert [list(use) for use in uses] == [[ExtendedKeyUsageOID.CLIENT_AUTH], [ExtendedKeyUsageOID.SERVER_AUTH]]
    for leaf in (DEVICE, SERVER):
        assert leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
        assert leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign is False
    constraints = ISSUER.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)


def test_certificates_are_back_dated_and_end_with_the_authority() -> None:
    start = datetime.fromtimestamp(NOW, UTC) - timedelta(days=1)
    for each in (DEVICE, SERVER, ISSUER):
        assert abs(each.not_valid_before_utc - start) < timedelta(seconds=2)
    assert DEVICE.not_valid_after_utc == ISSUER.not_valid_after_utc
    assert abs(SERVER.not_valid_after_utc - start - timedelta(days=91)) < timedelta(seconds=2)
    late = AUTHORITY.issue_for_server(KEY.public_key(), ["a"], 2 * AUTHORITY_DAYS, NOW)
    assert late.not_valid_after_utc == ISSUER.not_valid_after_utc


def test_a_servers_names_are_in_its_certificate() -> None:
    assert names_of(SERVER) == ("cloud.example", "10.0.0.7", "::1")
    assert names_of(DEVICE) == ()


@pytest.mark.parametrize("name", ["", "a b", "-a", "*.example", "a..b", "a/b", "x" * 64, "ü.example", "host:1"])
def test_a_server_has_names_or_addresses_and_no_wildcards(name: str) -> None:
    with pytest.raises(UsageError, match="neither a DNS name nor an IP address"):
        AUTHORITY.issue_for_server(KEY.public_key(), [name], 1, NOW)
    with pytest.raises(UsageError, match="needs a name"):
        AUTHORITY.issue_for_server(KEY.public_key(), [], 1, NOW)


# What a device asks for.


def request(*extensions: x509.ExtensionType, subject: str = "") -> bytes:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else []
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(attributes))
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_what_a_request_says_besides_its_key_is_ignored() -> None:
    other = replace(NAME, index=0)
    smuggled = request(
        x509.SubjectAlternativeName([x509.UniformResourceIdentifier(other.uri), x509.DNSName("localhost")]),
        x509.BasicConstraints(ca=True, path_length=None),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
        subject="Propolis device 0",
    )
    issued = AUTHORITY.issue_for_device(smuggled, NAME, NOW)
    assert DeviceName.of(to_der(issued)) == NAME
    assert [e.oid for e in issued.extensions] == [e.oid for e in DEVICE.extensions]
    assert issued.subject == DEVICE.subject
    assert issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value == x509.ExtendedKeyUsage(
        [ExtendedKeyUsageOID.CLIENT_AUTH]
    )


def test_a_request_whose_signature_does_not_hold_is_refused() -> None:
    """Else a device could get a certificate for a key that is somebody else's."""
    broken = bytearray(request())
    broken[-1] ^= 1
    with pytest.raises(PeerError, match="the signature on the request for a certificate does not hold"):
        AUTHORITY.issue_for_device(bytes(broken), NAME, NOW)


@pytest.mark.parametrize("data", [b"", b"\x30\x03\x02\x01\x01", request()[:-1], to_der(DEVICE)])
def test_a_malformed_request_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError, match="malformed"):
        AUTHORITY.issue_for_device(data, NAME, NOW)


@pytest.mark.parametrize("key", [generate_private_key(SECP384R1()), Ed25519PrivateKey.generate()])
def test_a_key_of_another_kind_is_refused(key: object) -> None:
    digest = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    csr = builder.sign(key, digest).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]
    with pytest.raises(PeerError, match="not ECDSA P-256"):
        AUTHORITY.issue_for_device(csr, NAME, NOW)


# Names that are none.


def certificate_with(*names: x509.GeneralName) -> bytes:
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Propolis device 12")]))
        .issuer_name(ISSUER.subject)
        .public_key(KEY.public_key())
        .serial_number(7)
        .not_valid_before(datetime.now(UTC))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return to_der(builder.sign(KEY, hashes.SHA256()))


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


@pytest.mark.parametrize(
    "names",
    [
        (),
        (uri(NAME.uri), uri(NAME.uri)),
        (uri(NAME.uri), x509.DNSName("localhost")),
        (x509.DNSName(NAME.uri),),
        (x509.IPAddress(ip_address("127.0.0.1")),),
        (uri(NAME.uri + " "),),
        (uri(NAME.uri + "\n"),),
        (uri("x" + NAME.uri),),
        (uri(NAME.uri.upper()),),
        (uri(NAME.uri.replace(":12:", ":012:")),),
        (uri(NAME.uri.replace(":12:", ":-1:")),),
        (uri(NAME.uri.replace(":12:", ":1048576:")),),
        (uri(NAME.uri.replace(":12:", "::")),),
        (uri(NAME.uri[:-1]),),
    ],
)
def test_a_name_has_one_form(names: tuple[x509.GeneralName, ...]) -> None:
    with pytest.raises(TrustError, match="not that of a device"):
        DeviceName.of(certificate_with(*names))


@pytest.mark.parametrize("data", [b"", b"\x30\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_bytes_that_are_no_certificate_are_no_device(data: bytes) -> None:
    with pytest.raises(TrustError, match="not that of a device"):
        DeviceName.of(data)


# One's own.


def test_the_files_come_back(tmp_path: Path) -> None:
    save_private_key(tmp_path / KEY_FILE, KEY, b"secret")
    (tmp_path / CERTIFICATE_FILE).write_bytes(to_pem(DEVICE))
    (tmp_path / AUTHORITY_FILE).write_bytes(AUTHORITY.pem)
    tls = load_tls(tmp_path, b"secret")
    assert tls == tls_of()
    assert "PRIVATE" not in repr(tls)
    for damage, line in ((b"no certificate", "holds no certificate"), (None, "cannot read")):
        path = tmp_path / CERTIFICATE_FILE
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(UsageError, match=line):
            load_tls(tmp_path, b"secret")


def test_what_is_wrong_with_ones_own_certificate_is_said_in_words() -> None:
    assert fault_of(tls_of(), NOW) is None
    assert fault_of(tls_of(SERVER), NOW) is None
    assert "expired on 20" in str(fault_of(tls_of(SERVER), NOW + 91 * DAY_S))
    assert "is this machine's clock right?" in str(fault_of(tls_of(), NOW - 2 * DAY_S))
    assert "authority's certificate expired" in str(fault_of(tls_of(old_leaf()), NOW + (AUTHORITY_DAYS + 1) * DAY_S))
    assert "was not issued by" in str(fault_of(tls_of(authority=Authority.create(bytes(32), NOW)), NOW))
    assert "is not for the key" in str(fault_of(replace(tls_of(), private_key=encode_private_key(new_tls_key())), NOW))


def old_leaf() -> x509.Certificate:
    """A leaf that outlives its authority, as ours never do."""
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(ISSUER.subject)
    builder = builder.public_key(KEY.public_key()).serial_number(5).not_valid_before(datetime.fromtimestamp(NOW, UTC))
    until = datetime.fromtimestamp(NOW, UTC) + timedelta(days=3 * AUTHORITY_DAYS)
    return builder.not_valid_after(until).sign(AUTHORITY._key, hashes.SHA256())


def test_a_look_alike_authority_did_not_issue_it() -> None:
    """Same name, another key."""
    impostor = Authority.create(NAME.federation, NOW)
    assert parse_certificate(impostor.pem).subject == ISSUER.subject
    assert not is_issued_by(DEVICE, parse_certificate(impostor.pem))


def test_an_authoritys_key_belongs_to_its_certificate(tmp_path: Path) -> None:
    AUTHORITY.save(tmp_path)
    assert Authority.load(tmp_path).pem == AUTHORITY.pem
    (tmp_path / AUTHORITY_FILE).write_bytes(Authority.create(bytes(32), NOW).pem)
    with pytest.raises(UsageError, match="is not the key of the certificate"):
        Authority.load(tmp_path)
