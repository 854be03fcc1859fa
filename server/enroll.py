"""Enrolment at the server: a device with an invitation becomes a member, once.

The server needs no secret of the root for it: what it checks, the root has signed before.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import grpc
import grpc.aio

from propolis.link.authority import Authority
from propolis.link.certificates import DeviceName, Tls, to_der
from propolis.link.clock import clock_fault
from propolis.link.enrolment import (
    LARGEST_REQUEST,
    UNCOMPRESSED,
    EnrollReply,
    EnrollRequest,
    require_proof,
)
from propolis.link.options import listen
from propolis.protos import link_pb2 as pb
from propolis.secure.announcement import verify_announcement
from propolis.secure.errors import PeerError, PropolisError, Refusal, RefusedError, TrustError
from propolis.secure.identity import (
    Descriptor,
    Invitation,
    Signed,
    descriptor_digest,
    verify_descriptor,
    verify_invitation,
)
from propolis.secure.kem import has_hybrid
from propolis.secure.wire import FORMAT_VERSION, encode, parse, read, serialized
from propolis.server.membership import Membership

_SERVICE = "propolis.link.v1.Enrolment"
_MOST_AT_ONCE, _MOST_CONNECTIONS = 64, 256
_HANDSHAKE_MS = 10_000
_REFUSALS_S = 1.0
_log = logging.getLogger("propolis.server")


class Enrolment:
    """What is asked of a device before it is let in; no I/O but what `membership` keeps.

    Args:
        membership: who may enrol, and who has.
        authority: issues devices' certificates.
        link_address: HOST:PORT of the service Link, or ":PORT" on the host that a device enrols with.
    """

    def __init__(self, membership: Membership, authority: Authority, link_address: str) -> None:
        self._membership = membership
        self._authority = authority
        self._link_address = link_address

    @property
    def authority(self) -> bytes:
        """The authority's certificate, DER."""
        return self._authority.der

    def answer(self, asked: pb.EnrollRequest, now: float) -> EnrollReply:
        """Let a device in; asked again with the same keys, give the same place again.

        Args:
            asked: what came.
            now: seconds since 1970.

        Raises:
            PeerError: the request is malformed, or of another version.
            TrustError: the device is not the one that was invited, or not in time.
            StorageError: the member could not be kept.
        """
        if asked.version != FORMAT_VERSION:
            raise PeerError(
                Refusal.MALFORMED, f"the device enrols by version {asked.version}, the server by {FORMAT_VERSION}"
            )
        request = read(EnrollRequest, asked)
        if (fault := clock_fault(request.clock, now)) is not None:
            raise TrustError(Refusal.STALE, fault)
        invitation = self._invitation(request, now)
        descriptor = verify_descriptor(invitation, request.descriptor)
        require_proof(descriptor, request)
        self._require_in_time(invitation, request, now)
        announced = _announced(descriptor, request)
        certificate = to_der(self._authority.issue_for_device(request.signing_request, _name(descriptor, request), now))
        self._membership.admit(invitation.index, request.descriptor)
        if announced is not None:
            self._membership.announce(invitation.index, announced)
        return EnrollReply(self._membership.roster.signed, certificate, self._link_address)

    def _invitation(self, request: EnrollRequest, now: float) -> Invitation:
        """The invitation, which the root made and has not taken back."""
        self._membership.look()
        roster = self._membership.roster
        roster.require_current(now)
        try:
            invitation = verify_invitation(self._membership.root_key, request.invitation)
        except TrustError:
            raise TrustError(Refusal.IDENTITY, "the invitation is not one of this federation") from None
        entry = roster.require_member(invitation.index)
        if entry.public_key != invitation.public_key:
            raise TrustError(Refusal.IDENTITY, f"place {invitation.index} of the roster has another invitation")
        return invitation

    def _require_in_time(self, invitation: Invitation, request: EnrollRequest, now: float) -> None:
        """Refuse an expired invitation; a device that is in, and did not hear so, may ask again."""
        if invitation.expired(now) and self._membership.enrolled(invitation.index) != request.descriptor:
            raise TrustError(Refusal.IDENTITY, f"the invitation of {invitation.name} has expired: ask for a new one")


def _announced(descriptor: Descriptor, request: EnrollRequest) -> Signed | None:
    """The announcement of a hybrid key, which must hold before its device is let in, where this machine can tell."""
    if request.announcement is None or not has_hybrid():
        return None
    verify_announcement(descriptor, descriptor_digest(request.descriptor), request.announcement)
    return request.announcement


def _name(descriptor: Descriptor, request: EnrollRequest) -> DeviceName:
    return DeviceName(descriptor.federation, descriptor.index, descriptor_digest(request.descriptor))


class _Service:
    """The service over `Enrolment`: decode, call, map errors.

    Requests come as bytes: gRPC would write a stack trace for each one that is no message.
    """

    def __init__(self, enrolment: Enrolment) -> None:
        self._enrolment = enrolment
        self._refusals = _Refusals()

    def handler(self) -> grpc.GenericRpcHandler:
        """Its methods, for a server."""
        methods = {
            "GetAuthority": grpc.unary_unary_rpc_method_handler(self._get_authority),
            "Enroll": grpc.unary_unary_rpc_method_handler(self._enroll),
        }
        return grpc.method_handlers_generic_handler(_SERVICE, methods)

    async def _get_authority(self, _: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The authority's certificate, for a device that knows its fingerprint."""
        return serialized(pb.AuthorityReply(certificate=self._enrolment.authority))

    async def _enroll(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """See `Enrolment.answer`; a refusal has its reason as details."""
        try:
            reply = self._enrolment.answer(parse(pb.EnrollRequest, data), time.time())
        except PropolisError as error:
            self._refusals.tell(context.peer(), error, time.monotonic())
            context.set_code(_status(error))  # not abort, whose exception keeps the stream until garbage is collected
            context.set_details(_reason(error))
            return b""
        return encode(reply, pb.EnrollReply)


class _Refusals:
    """The log of refusals: strangers can ask as often as they like, but not fill the disk."""

    def __init__(self) -> None:
        self._next = 0.0
        self._left_out = 0

    def tell(self, peer: str, error: PropolisError, now: float) -> None:
        """A line at most every second; the server's own troubles always have one."""
        if not isinstance(error, RefusedError):
            _log.error("enrolment failed for %s: %s", peer, error)
        elif now < self._next:
            self._left_out += 1
        else:
            more = f" (and {self._left_out} more before)" if self._left_out else ""
            _log.warning("enrolment refused to %s: %s%s", peer, error, more)
            self._next, self._left_out = now + _REFUSALS_S, 0


def _status(error: PropolisError) -> grpc.StatusCode:
    if isinstance(error, TrustError):
        return grpc.StatusCode.PERMISSION_DENIED
    return grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, PeerError) else grpc.StatusCode.UNAVAILABLE


def _reason(error: PropolisError) -> str:
    return str(error) if isinstance(error, RefusedError) else "the server cannot keep new members at the moment"


@dataclass(frozen=True, slots=True)
class Hospitality:
    """How long a stranger may stay, in seconds: whoever it is, a device enrols in less than one.

    Attributes:
        idle: a connection without a request.
        age: a connection, before it is told to end.
        grace: what is under way then; a request that is sent slowly has no other limit.
    """

    idle: float = 10.0
    age: float = 30.0
    grace: float = 10.0


def make_enrolment_server(
    enrolment: Enrolment, address: str, tls: Tls, hospitality: Hospitality | None = None
) -> tuple[grpc.aio.Server, int]:
    """The enrolment service, not yet started, on a port of its own: devices have no certificate yet.

    Args:
        enrolment: what answers.
        address: HOST:PORT to listen on; port 0 takes a free one.
        tls: the server's certificate and key.
        hospitality: how long connections may stay.

    Returns:
        The server, and the port that it listens on.

    Raises:
        UsageError: the address cannot be listened on.
    """
    options = _options(hospitality or Hospitality())
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=_MOST_AT_ONCE)
    server.add_generic_rpc_handlers((_Service(enrolment).handler(),))
    credentials = grpc.ssl_server_credentials([(tls.private_key, tls.certificate)])
    return server, listen(server, address, credentials)


def _options(hospitality: Hospitality) -> list[tuple[str, int]]:
    return [
        UNCOMPRESSED,
        ("grpc.max_receive_message_length", LARGEST_REQUEST),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", int(hospitality.idle * 1000)),
        ("grpc.max_connection_age_ms", int(hospitality.age * 1000)),
        ("grpc.max_connection_age_grace_ms", int(hospitality.grace * 1000)),
        ("grpc.max_concurrent_streams", 2),
        # Who opens more shuts enrolment for a while, but takes no files from the run.
        ("grpc.max_allowed_incoming_connections", _MOST_CONNECTIONS),
        ("grpc.so_reuseport", 0),
    ]
