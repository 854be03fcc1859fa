"""The federation's TLS authority: says whose TLS key is whose, to the server and to devices."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from propolis.link.certificates import (
    AUTHORITY_FILE,
    NOT_X509,
    DeviceName,
    load_pem,
    new_tls_key,
    parse_certificate,
    to_der,
    to_pem,
)
from propolis.link.keys import load_tls_key, save_private_key
from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.storage import write_atomically

AUTHORITY_KEY_FILE = "ca.key"
AUTHORITY_DAYS = 10 * 365
# A device whose clock is behind accepts what was issued a moment ago.
_BACKDATED = timedelta(days=1)
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.IGNORECASE)


class Authority:
    """An ECDSA P-256 key and its self-signed certificate."""

    def __init__(self, key: EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @classmethod
    def create(cls, federation: bytes, now: float) -> Self:
        """A new authority, for `AUTHORITY_DAYS`.

        Args:
            federation: fingerprint of the root, for the authority's name.
            now: seconds since 1970.
        """
        key, name = new_tls_key(), _common_name(f"Propolis authority {federation.hex()[:16]}")
        until = datetime.fromtimestamp(now, UTC) + timedelta(days=AUTHORITY_DAYS)
        builder = _certificate(name, name, key.public_key(), now, until)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        return cls(key, builder.sign(key, hashes.SHA256()))

    def save(self, folder: Path, passphrase: bytes | None = None) -> None:
        """Write `ca.key` and `ca.pem`; raises StorageError."""
        save_private_key(folder / AUTHORITY_KEY_FILE, self._key, passphrase)
        write_atomically(folder / AUTHORITY_FILE, self.pem)

    @classmethod
    def load(cls, folder: Path, passphrase: bytes | None = None) -> Self:
        """The authority that `save` wrote; raises UsageError."""
        path = folder / AUTHORITY_KEY_FILE
        key = load_tls_key(path, passphrase)
        certificate = parse_certificate(load_pem(folder / AUTHORITY_FILE))
        if key.public_key() != certificate.public_key():
            raise UsageError(f"{path} is not the key of the certificate in {AUTHORITY_FILE}")
        return cls(key, certificate)

    @property
    def pem(self) -> bytes:
        """The authority's certificate."""
        return to_pem(self._certificate)

    @property
    def der(self) -> bytes:
        """The same in the form that is hashed."""
        return to_der(self._certificate)

    def issue_for_server(
        self, public_key: EllipticCurvePublicKey, names: Sequence[str], days: int, now: float
    ) -> x509.Certificate:
        """The server's certificate.

        Args:
            public_key: the server's.
            names: DNS names and IP addresses that devices connect to.
            days: how long it is valid.
            now: seconds since 1970.

        Raises:
            UsageError: no name, or one that is neither.
        """
        if not names:
            raise UsageError("the server needs a name that devices connect to")
        alternatives = [_host_name(name) for name in names]
        until = datetime.fromtimestamp(now, UTC) + timedelta(days=days)
        builder = self._leaf("Propolis server", public_key, now, until)
        return self._sign(builder, alternatives, ExtendedKeyUsageOID.SERVER_AUTH)

    def issue_for_device(self, request: bytes, name: DeviceName, now: float) -> x509.Certificate:
        """A device's certificate, for as long as the authority's: it is the roster that ends a membership.

        Args:
            request: PKCS #10, DER; of it only the key is taken, and the proof that the device has it.
            name: the device's.
            now: seconds since 1970.

        Raises:
            PeerError: the request is malformed, its signature does not hold, or the key is not ECDSA P-256.
        """
        public_key = _requested_key(request)
        builder = self._leaf(f"Propolis device {name.index}", public_key, now, self._certificate.not_valid_after_utc)
        return self._sign(builder, [x509.UniformResourceIdentifier(name.uri)], ExtendedKeyUsageOID.CLIENT_AUTH)

    def _leaf(
        self, name: str, public_key: EllipticCurvePublicKey, now: float, until: datetime
    ) -> x509.CertificateBuilder:
        until = min(until, self._certificate.not_valid_after_utc)
        builder = _certificate(_common_name(name), self._certificate.subject, public_key, now, until)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        return builder.add_extension(_key_usage(signs_certificates=False), critical=True)

    def _sign(
        self, builder: x509.CertificateBuilder, names: Sequence[x509.GeneralName], use: x509.ObjectIdentifier
    ) -> x509.Certificate:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        return builder.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())


def fingerprint_of(authority: bytes) -> bytes:
    """SHA-256 of an authority's certificate, DER: what a token pins."""
    return hashlib.sha256(authority).digest()


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The DNS names and IP addresses that a server's certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )


def _requested_key(request: bytes) -> EllipticCurvePublicKey:
    try:
        parsed = x509.load_der_x509_csr(request)
        holds, key = parsed.is_signature_valid, parsed.public_key()
    except NOT_X509:
        raise PeerError(Refusal.MALFORMED, "the request for a certificate is malformed") from None
    if not holds:
        raise PeerError(Refusal.KEYS, "the signature on the request for a certificate does not hold")
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise PeerError(Refusal.KEYS, "the key in the request for a certificate is not ECDSA P-256")
    return key


def _certificate(
    subject: x509.Name, issuer: x509.Name, public_key: EllipticCurvePublicKey, now: float, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now, UTC) - _BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if len(name) > 253 or not _HOST.fullmatch(name):
            raise UsageError(f"{name!r} is neither a DNS name nor an IP address") from None
        return x509.DNSName(name)
