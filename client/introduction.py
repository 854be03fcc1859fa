"""The first contact with a server that the device does not know yet: its authority is pinned before anything is asked.

The token has the fingerprint of the federation's TLS authority. The device reads the server's certificate, opens a
channel that trusts that one alone, fetches the authority's, compares the fingerprint, and opens a second channel that
trusts the authority. Whoever is in between learns, before that, that somebody connects.
"""

from __future__ import annotations

import hmac
import ssl
import time
from collections.abc import Callable
from ipaddress import ip_address
from types import TracebackType
from typing import Any, Self

import grpc
from cryptography import x509

from propolis.link.address import Address
from propolis.link.authority import fingerprint_of, names_of
from propolis.link.certificates import out_of_date, parse_certificate, to_pem
from propolis.link.enrolment import UNCOMPRESSED, EnrollReply, EnrollRequest
from propolis.protos import link_pb2 as pb
from propolis.protos import link_pb2_grpc
from propolis.secure.errors import PeerError, UsageError
from propolis.secure.wire import FORMAT_VERSION, fill, read

# Before the pin is checked anybody may answer: one certificate. After it the roster: at most a million devices.
_LARGEST_AUTHORITY, _LARGEST_REPLY = 2**14, 2**27
_LONGEST_REASON = 300
# The first connection reads the certificate without a proxy; what follows must reach the same server.
_OPTIONS = [UNCOMPRESSED, ("grpc.enable_http_proxy", 0)]


class Introduction:
    """A connection to the server of a token, for one request; a context manager.

    Args:
        server: where enrolment is.
        fingerprint: of the TLS authority, from the token.
        timeout: seconds, for all of it.

    Raises:
        UsageError: it cannot be reached, its certificate is for another name, or its authority is not the token's.
    """

    def __init__(self, server: Address, fingerprint: bytes, timeout: float) -> None:
        self._server = server
        self._deadline = time.monotonic() + timeout
        self._timeout = timeout
        self.authority = self._pinned_authority(self._certificate(), fingerprint)
        self._channel = self._open(self.authority, _LARGEST_REPLY)

    def enroll(self, request: EnrollRequest) -> EnrollReply:
        """Ask for the device's place; raises UsageError with the server's reason when it refuses."""
        asked = pb.EnrollRequest()
        fill(request, asked)
        reply = self._call(link_pb2_grpc.EnrolmentStub(self._channel).Enroll, asked)
        if reply.version != FORMAT_VERSION:
            raise UsageError(f"the server enrols by version {reply.version}, this device by {FORMAT_VERSION}")
        try:
            return read(EnrollReply, reply)
        except PeerError as error:
            raise UsageError(f"the server's answer is malformed: {error}") from None

    def __enter__(self) -> Self:
        """The introduction."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._channel.close()

    def _certificate(self) -> x509.Certificate:
        """What the server shows to everybody; it must be for the name that the device uses."""
        try:
            pem = ssl.get_server_certificate((self._server.host, self._server.port), timeout=self._left())
            certificate = parse_certificate(pem.encode())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot connect to {self._server}: {_in_words(error)}") from None
        if fault := out_of_date(certificate, time.time(), "the server's certificate"):
            raise UsageError(fault)
        names = names_of(certificate)
        if _canonical(self._server.host) not in {_canonical(name) for name in names}:
            known = ", ".join(_printable(name) for name in names[:10]) or "none"
            raise UsageError(
                f"the server's certificate is not for {self._server.host} but for {known}: connect by such a name, or "
                "add this one on the server: propolis federation renew DIR --server-cert --name HOST,..."
            )
        return certificate

    def _pinned_authority(self, certificate: x509.Certificate, fingerprint: bytes) -> bytes:
        """The authority's certificate, PEM."""
        channel = self._open(to_pem(certificate), _LARGEST_AUTHORITY)
        try:
            found = self._call(link_pb2_grpc.EnrolmentStub(channel).GetAuthority, pb.AuthorityRequest()).certificate
        finally:
            channel.close()
        if not hmac.compare_digest(fingerprint_of(found), fingerprint):
            raise UsageError(
                f"{self._server} is not the server of this token: its authority's fingerprint differs. This may be an "
                "attack, or the address or the token is another federation's; nothing was sent"
            )
        try:
            return to_pem(parse_certificate(found))
        except ValueError:
            raise UsageError("the token's authority is no certificate") from None

    def _open(self, trusted: bytes, largest: int) -> grpc.Channel:
        options = [*_OPTIONS, ("grpc.max_receive_message_length", largest)]
        return grpc.secure_channel(str(self._server), grpc.ssl_channel_credentials(trusted), options=options)

    def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=self._left())
        except grpc.RpcError as error:
            raise UsageError(self._reason(error)) from None

    def _reason(self, error: Any) -> str:
        """Why a call failed, for a person."""
        code, details = error.code(), _printable(error.details() or "")
        if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT):
            return f"{self._server} refused: {details}"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"{self._server} did not answer within {self._timeout:g} s: try again, or with a longer --timeout"
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return f"{self._server} is not where devices enrol: is this the port for enrolment?"
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return (
                f"{self._server} has no certificate of the token's authority: this may be an attack; nothing was sent"
            )
        return f"cannot talk to {self._server}: {details or code.name.lower()}"

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise UsageError(f"{self._server} did not answer within {self._timeout:g} s")
        return left


def _canonical(host: str) -> str:
    try:
        return str(ip_address(host))
    except ValueError:
        return host.lower()


def _in_words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it does not answer"
    if isinstance(error, ssl.SSLError):
        return "it does not speak TLS: is this the port for enrolment?"
    return getattr(error, "strerror", None) or "it shows no certificate"


def _printable(text: str) -> str:
    """A stranger's text, safe to show on a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST_REASON])
