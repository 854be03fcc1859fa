"""What travels when a device enrols: public keys and proofs, and nothing secret."""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError
from propolis.secure.identity import SIGNATURE_BYTES, Descriptor, Signed, SigningKey
from propolis.secure.wire import between, sized, version_field

# Of one request: keys, signatures and a name.
LARGEST_REQUEST = 2**16
# gRPC compares the compressed size with its limits, and then a message may grow a thousand times: inflate nothing.
# Its list of algorithms does not help: a client inflates before it looks there, a server writes a line for each call.
UNCOMPRESSED = ("grpc.per_message_decompression", 0)
_LARGEST_CERTIFICATE = 2**14
_LONGEST_ADDRESS = 300


@dataclass(frozen=True, slots=True)
class EnrollRequest:
    """A device asks for its place.

    Attributes:
        invitation: signed by the root.
        descriptor: signed with the invitation's key.
        signing_request: PKCS #10, DER, with the device's TLS key.
        clock: the device's, seconds since 1970.
        proof: see `prove`.
        announcement: of the device's hybrid key, where it has one.
    """

    invitation: Signed
    descriptor: Signed
    signing_request: bytes = sized(1, _LARGEST_CERTIFICATE)
    clock: int = between(0, 2**62)
    proof: bytes = sized(SIGNATURE_BYTES)
    version: int = version_field()
    announcement: Signed | None = None


@dataclass(frozen=True, slots=True)
class EnrollReply:
    """The place is the device's.

    Attributes:
        roster: signed by the root.
        certificate: the device's, DER.
        link_address: HOST:PORT of the service Link; ":PORT" where the host is the one that the device enrolled with.
    """

    roster: Signed
    certificate: bytes = sized(1, _LARGEST_CERTIFICATE)
    link_address: str = sized(1, _LONGEST_ADDRESS)
    version: int = version_field()


def prove(key: SigningKey, descriptor: Descriptor, signing_request: bytes, clock: int) -> bytes:
    """A signature that ties a TLS key to a descriptor.

    Everybody in the federation sees a device's descriptor, and the server its invitation: without this, who has both
    would get a certificate with that device's name for a TLS key of his own.
    """
    private = Ed25519PrivateKey.from_private_bytes(key.private)
    return private.sign(_statement(descriptor, signing_request, clock))


def require_proof(descriptor: Descriptor, request: EnrollRequest) -> None:
    """Check what `prove` made; raises TrustError."""
    try:
        key = Ed25519PublicKey.from_public_bytes(descriptor.signing_key)
        key.verify(request.proof, _statement(descriptor, request.signing_request, request.clock))
    except (InvalidSignature, ValueError):
        raise TrustError(Refusal.IDENTITY, "the request was not made by the device of its descriptor") from None


def _statement(descriptor: Descriptor, signing_request: bytes, clock: int) -> bytes:
    index, seconds = descriptor.index.to_bytes(8, "big"), clock.to_bytes(8, "big")
    return labels.joined(labels.ENROLMENT, descriptor.federation, index, seconds, signing_request)
