"""Certificates as both ends see them: a device's name in its own, and what a process shows to its peer.

A certificate says who is at the other end of a connection. It makes nobody a member of the federation: that the root
does, in the roster.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from propolis.link.keys import encode_private_key, load_tls_key
from propolis.secure.errors import Refusal, TrustError, UsageError
from propolis.secure.identity import LARGEST_INDEX, node_id_of

KEY_FILE, CERTIFICATE_FILE, AUTHORITY_FILE = "tls.key", "tls.pem", "ca.pem"
# What the library raises besides ValueError for bytes that are none.
NOT_X509 = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_URI = re.compile(r"propolis:([0-9a-f]{64}):(0|[1-9][0-9]{0,6}):([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class DeviceName:
    """Who a device is, as its certificate says it.

    Attributes:
        federation: fingerprint of its root, 32 bytes.
        index: its place in the roster.
        descriptor: `secure.identity.descriptor_digest` of its descriptor, 32 bytes.
    """

    federation: bytes
    index: int
    descriptor: bytes

    @property
    def uri(self) -> str:
        """The one alternative name of a device's certificate."""
        return f"propolis:{self.federation.hex()}:{self.index}:{self.descriptor.hex()}"

    @property
    def node_id(self) -> int:
        """The device's node id on the link: 63 bits of its descriptor's digest."""
        return node_id_of(self.descriptor)

    @classmethod
    def of(cls, certificate: bytes) -> Self:
        """The name in a certificate, PEM or DER; that the authority issued it, TLS has checked.

        Raises:
            TrustError: it is no certificate of a device.
        """
        try:
            names = parse_certificate(certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName)
            (only,) = names.value
            matched = isinstance(only, x509.UniformResourceIdentifier) and _URI.fullmatch(only.value)
        except (ValueError, x509.ExtensionNotFound):
            matched = None
        if not matched or int(matched[2]) > LARGEST_INDEX:
            raise TrustError(Refusal.IDENTITY, "the certificate is not that of a device of a federation")
        return cls(bytes.fromhex(matched[1]), int(matched[2]), bytes.fromhex(matched[3]))


@dataclass(frozen=True, slots=True)
class Tls:
    """What a process shows to its peer, and whom it trusts; all PEM, the key not encrypted."""

    private_key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


def load_tls(folder: Path, passphrase: bytes | None = None) -> Tls:
    """The files `tls.key`, `tls.pem` and `ca.pem` of a server's or a device's folder.

    Raises:
        UsageError: one is missing or damaged, others may read the key, or the passphrase is wrong.
    """
    key = load_tls_key(folder / KEY_FILE, passphrase)
    return Tls(encode_private_key(key), load_pem(folder / CERTIFICATE_FILE), load_pem(folder / AUTHORITY_FILE))


def load_pem(path: Path) -> bytes:
    """A certificate in a file, as PEM; raises UsageError when there is none."""
    try:
        return to_pem(parse_certificate(path.read_bytes()))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path} holds no certificate") from None


def fault_of(tls: Tls, now: float) -> str | None:
    """What is wrong with one's own certificate, in words, before a peer refuses it without any; None where all is well.

    Args:
        tls: one's own.
        now: seconds since 1970.
    """
    certificate, authority = parse_certificate(tls.certificate), parse_certificate(tls.authority)
    key = serialization.load_pem_private_key(tls.private_key, None)
    if key.public_key() != certificate.public_key():
        return f"the certificate in {CERTIFICATE_FILE} is not for the key in {KEY_FILE}"
    if not is_issued_by(certificate, authority):
        return f"the certificate in {CERTIFICATE_FILE} was not issued by the authority in {AUTHORITY_FILE}"
    fault = out_of_date(certificate, now, "the certificate")
    return fault or out_of_date(authority, now, "the authority's certificate")


def not_for_a_server(tls: Tls) -> str | None:
    """Why no caller would accept this certificate from a server, in words; None where it may."""
    try:
        uses = parse_certificate(tls.certificate).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return None
    if {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(uses):
        return None
    return (
        f"the certificate in {CERTIFICATE_FILE} is a client's, such as a device's, which no caller accepts from a "
        "server: give a folder with a server's"
    )


def out_of_date(certificate: x509.Certificate, now: float, what: str) -> str | None:
    """Why a certificate, called `what`, is not valid at this time, in words; None where it is."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    here = f"and here it is {datetime.fromtimestamp(now, UTC):%Y-%m-%d %H:%M}: is this machine's clock right?"
    if now > end.timestamp():
        return f"{what} expired on {end:%Y-%m-%d}, {here}"
    if now < start.timestamp():
        return f"{what} is not valid before {start:%Y-%m-%d %H:%M} UTC, {here}"
    return None


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except NOT_X509:
        return False
    return True


def parse_certificate(data: bytes) -> x509.Certificate:
    """A certificate from PEM or DER, whose key and extensions can be read; raises ValueError."""
    is_pem = data.lstrip().startswith(b"-----BEGIN")
    try:
        certificate = x509.load_pem_x509_certificate(data) if is_pem else x509.load_der_x509_certificate(data)
        certificate.public_key(), certificate.extensions
    except NOT_X509 as error:
        raise ValueError(f"no certificate: {error}") from None
    return certificate


def to_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def to_der(certificate: x509.Certificate) -> bytes:
    """A certificate as bytes: what its fingerprint is of."""
    return certificate.public_bytes(serialization.Encoding.DER)


def new_tls_key() -> EllipticCurvePrivateKey:
    """A new key for TLS (ECDSA, P-256)."""
    return generate_private_key(SECP256R1())


def signing_request(key: EllipticCurvePrivateKey) -> bytes:
    """A request (PKCS #10, DER) for a certificate: the key and a proof of having it; who asks is said elsewhere."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)
