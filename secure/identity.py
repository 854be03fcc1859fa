"""Who belongs to a federation, and how a device convinces itself of that without trusting the server.

The root signs invitations and the roster of them. A device makes its own keys and signs its descriptor with the
key of its invitation. So root -> roster -> invitation -> descriptor -> prekey, and nobody but the root can add a
member, nobody but the device can choose its keys. Every signature is Ed25519 (RFC 8032) over a label, a context that
both ends know and that does not travel, and the exact bytes that travel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from google.protobuf.message import Message

from propolis.protos import identity_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import PeerError, Refusal, TrustError, UsageError
from propolis.secure.wire import between, decode, decode_exactly, encode, many, sized, version_field

T = TypeVar("T")

KEY_BYTES = DIGEST_BYTES = 32
SIGNATURE_BYTES = 64
LARGEST_INDEX = 2**20 - 1
_LARGEST_ROSTER = 2**26
# Every other signed payload: a few keys and a name.
_LARGEST_STATEMENT = 2048
_LONGEST_NAME = 200
_MOST_REVOKED_RELEASES = 4096


@dataclass(frozen=True, slots=True)
class Signed:
    """Bytes and a signature over them."""

    payload: bytes = sized(1, _LARGEST_ROSTER)
    signature: bytes = sized(SIGNATURE_BYTES)


@dataclass(frozen=True, slots=True)
class Invitation:
    """A place in the federation, signed by the root.

    Attributes:
        not_after: seconds since 1970, the last moment to enrol; 0 is never.
        root_online: the federation keeps its root key on the server.
    """

    federation: bytes = sized(DIGEST_BYTES)
    index: int = between(0, LARGEST_INDEX)
    name: str = sized(1, _LONGEST_NAME)
    public_key: bytes = sized(KEY_BYTES)
    version: int = version_field()
    not_after: int = between(0, 2**62, default=0)
    root_online: bool = False

    def expired(self, now: float) -> bool:
        """Whether it is too late to enrol; `now` is in seconds since 1970."""
        return 0 < self.not_after < now


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A device's public keys, signed with the key of its invitation."""

    federation: bytes = sized(DIGEST_BYTES)
    index: int = between(0, LARGEST_INDEX)
    signing_key: bytes = sized(KEY_BYTES)
    hpke_key: bytes = sized(KEY_BYTES)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class Prekey:
    """A key that the shares of one round are sealed to, signed in the context of federation and index."""

    number: int = between(0, 2**62)
    public_key: bytes = sized(KEY_BYTES)


@dataclass(frozen=True, slots=True)
class RosterEntry:
    """One invitation in the roster."""

    name: str = sized(1, _LONGEST_NAME)
    public_key: bytes = sized(KEY_BYTES)
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Roster:
    """All the invitations by index, and by serial the revoked keys that the root delegated to, signed by the root.

    `number` rises with every change.
    """

    federation: bytes = sized(DIGEST_BYTES)
    number: int = between(1, 2**62)
    not_after: int = between(0, 2**62)
    entries: tuple[RosterEntry, ...] = many(LARGEST_INDEX + 1)
    revoked_releases: tuple[int, ...] = between(1, 2**62, count=_MOST_REVOKED_RELEASES, default=())
    version: int = version_field()

    def with_entry(self, entry: RosterEntry) -> Roster:
        """The next roster, with one invitation more."""
        return replace(self, number=self.number + 1, entries=(*self.entries, entry))

    def revoking(self, index: int) -> Roster:
        """The next roster, with a device revoked; raises UsageError when there is no such device."""
        if not 0 <= index < len(self.entries):
            raise UsageError(f"there is no device {index} among {len(self.entries)}")
        revoked = replace(self.entries[index], revoked=True)
        entries = (*self.entries[:index], revoked, *self.entries[index + 1 :])
        return replace(self, number=self.number + 1, entries=entries)

    def revoking_release(self, serial: int) -> Roster:
        """The next roster, with a release key, or a holder of keys of homomorphic encryption, revoked."""
        return replace(self, number=self.number + 1, revoked_releases=(*self.revoked_releases, serial))

    def lasting(self, not_after: int) -> Roster:
        """The next roster, valid until `not_after`, in seconds since 1970."""
        return replace(self, number=self.number + 1, not_after=not_after)


def sign(label: bytes, private_key: bytes, message: object, proto: type[Message], *context: bytes) -> Signed:
    """Encode and sign a message; `context` is signed too, but does not travel."""
    payload = encode(message, proto)
    key = Ed25519PrivateKey.from_private_bytes(private_key)
    return Signed(payload, key.sign(labels.joined(label, *context, payload)))


def verify(
    label: bytes,
    public_key: bytes,
    signed: Signed,
    cls: type[T],
    proto: Any,
    refusal: Refusal,
    *context: bytes,
    limit: int = _LARGEST_STATEMENT,
) -> T:
    """The short message, of at most `limit` bytes, under a signature.

    Raises:
        TrustError: with `refusal`, when the signature is not this key's under this label and context.
        PeerError: the signed bytes are not such a message, or longer than any.
    """
    if len(signed.payload) > limit:
        raise PeerError(Refusal.MALFORMED, f"{_one(cls)} of {len(signed.payload)} bytes")
    try:
        _verify_signature(public_key, labels.joined(label, *context, signed.payload), signed.signature)
    except (InvalidSignature, ValueError):
        raise TrustError(refusal, f"the signature on {_one(cls)} does not hold") from None
    return decode_exactly(cls, signed.payload, proto)


def _one(cls: type) -> str:
    name = cls.__name__.lower()
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


@lru_cache(maxsize=8192)
def _verify_signature(public_key: bytes, signed: bytes, signature: bytes) -> None:
    """Raise when a signature does not hold; success is remembered, because many devices may share a process."""
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signed)


def forget_signatures() -> None:
    """Forget which signatures have been checked: for benchmarks, where many devices share a process."""
    _verify_signature.cache_clear()


@dataclass(frozen=True, slots=True, repr=False)
class SigningKey:
    """An Ed25519 private key, 32 bytes."""

    private: bytes

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    @property
    def public(self) -> bytes:
        """Its public half, 32 bytes."""
        return Ed25519PrivateKey.from_private_bytes(self.private).public_key().public_bytes_raw()


def agreement_key() -> tuple[bytes, bytes]:
    """A new X25519 key: private and public half, 32 bytes each."""
    key = X25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def fingerprint(root_key: bytes) -> bytes:
    """What names a federation: a hash of its root's public key."""
    return labels.digest(labels.ROOT_FINGERPRINT, root_key)


class Root:
    """The federation's root: makes invitations and signs the roster. Normally kept off the server.

    Args:
        key: its private key, which whoever keeps it writes down.
    """

    def __init__(self, key: SigningKey) -> None:
        self.key = key
        self.public_key = key.public
        self.federation = fingerprint(key.public)

    def invite(
        self, roster: Roster, name: str, *, not_after: int = 0, root_online: bool = False
    ) -> tuple[Roster, Signed, SigningKey]:
        """A new place: the next roster, the signed invitation, and the invitation's private key for its token.

        Args:
            roster: the last one.
            name: the device's, for people.
            not_after: seconds since 1970, the last moment to enrol; 0 is never.
            root_online: whether this key is kept on the server, which the device is told.

        Raises:
            UsageError: the name is empty or too long.
        """
        if not 1 <= len(name) <= _LONGEST_NAME:
            raise UsageError(f"a device's name has 1 to {_LONGEST_NAME} characters, got {len(name)}")
        key = SigningKey.generate()
        invitation = Invitation(
            self.federation, len(roster.entries), name, key.public, not_after=not_after, root_online=root_online
        )
        signed = sign(labels.INVITATION, self.key.private, invitation, pb.Invitation)
        return roster.with_entry(RosterEntry(name, key.public)), signed, key

    def sign(self, label: bytes, message: object, proto: type[Message]) -> Signed:
        """A statement of the root that another module defines."""
        return sign(label, self.key.private, message, proto)

    def sign_roster(self, roster: Roster) -> Signed:
        """The roster as devices accept it."""
        return self.sign(labels.ROSTER, roster, pb.Roster)


def verify_invitation(root_key: bytes, signed: Signed) -> Invitation:
    """An invitation of this root; raises TrustError otherwise."""
    invitation = verify(labels.INVITATION, root_key, signed, Invitation, pb.Invitation, Refusal.IDENTITY)
    if invitation.federation != fingerprint(root_key):
        raise TrustError(Refusal.IDENTITY, "the invitation is for another federation")
    return invitation


def describe(invitation: Invitation, invitation_key: SigningKey, signing_key: bytes, hpke_key: bytes) -> Signed:
    """A device's descriptor; both keys are public halves.

    Raises:
        UsageError: the private key is not the invitation's.
    """
    if invitation_key.public != invitation.public_key:
        raise UsageError("the key is not that of the invitation")
    descriptor = Descriptor(invitation.federation, invitation.index, signing_key, hpke_key)
    return sign(labels.DESCRIPTOR, invitation_key.private, descriptor, pb.Descriptor)


def verify_descriptor(invitation: Invitation, signed: Signed) -> Descriptor:
    """The descriptor that was made with this invitation; raises TrustError otherwise."""
    key = invitation.public_key
    descriptor = verify(labels.DESCRIPTOR, key, signed, Descriptor, pb.Descriptor, Refusal.IDENTITY)
    if (descriptor.federation, descriptor.index) != (invitation.federation, invitation.index):
        raise TrustError(Refusal.IDENTITY, "the descriptor is for another place than the invitation")
    return descriptor


def announce_prekey(signing_key: SigningKey, descriptor: Descriptor, number: int, public_key: bytes) -> Signed:
    """A prekey that other devices may seal to, once."""
    context = prekey_context(descriptor.federation, descriptor.index)
    return sign(labels.PREKEY, signing_key.private, Prekey(number, public_key), pb.Prekey, *context)


def prekey_context(federation: bytes, index: int) -> tuple[bytes, bytes]:
    """What is signed with a prekey and does not travel: whose it is."""
    return federation, index.to_bytes(8, "big")


def verify_prekey(signed: Signed, federation: bytes, index: int, signing_key: bytes) -> Prekey:
    """A prekey of this device of this federation; raises TrustError otherwise."""
    context = prekey_context(federation, index)
    prekey = verify(labels.PREKEY, signing_key, signed, Prekey, pb.Prekey, Refusal.KEYS, *context)
    require_contributory(prekey.public_key, index)
    return prekey


class TrustedRoster:
    """A roster that was verified under a root: all that a device, or the server, believes about the others.

    Args:
        root_key: the root's public key, 32 bytes.
        signed: the roster.

    Raises:
        TrustError: it is not this root's.
    """

    def __init__(self, root_key: bytes, signed: Signed) -> None:
        self.signed = signed
        try:
            key = Ed25519PublicKey.from_public_bytes(root_key)
            key.verify(signed.signature, labels.joined(labels.ROSTER, signed.payload))
        except (InvalidSignature, ValueError):
            raise TrustError(Refusal.ROSTER, "the signature on a roster does not hold") from None
        self.roster = decode_exactly(Roster, signed.payload, pb.Roster)
        if self.roster.federation != fingerprint(root_key):
            raise TrustError(Refusal.ROSTER, "the roster is another federation's")

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for this very roster."""
        return labels.digest(labels.ROSTER, self.signed.payload)

    @property
    def number(self) -> int:
        """The roster's number, which rises with every change."""
        return self.roster.number

    def require_current(self, now: float) -> None:
        """Refuse an expired roster; `now` is in seconds since 1970."""
        if now > self.roster.not_after:
            raise TrustError(Refusal.ROSTER, f"the roster {self.number} has expired")

    def require_member(self, index: int) -> RosterEntry:
        """The entry of a device that was invited and not revoked; raises TrustError otherwise."""
        if index >= len(self.roster.entries):
            raise TrustError(Refusal.IDENTITY, f"device {index} is not in the roster {self.number}")
        entry = self.roster.entries[index]
        if entry.revoked:
            raise TrustError(Refusal.IDENTITY, f"device {index} ({entry.name}) is revoked")
        return entry

    def descriptor(self, signed: Signed) -> Descriptor:
        """A member's descriptor; raises TrustError when it is not signed by a member's invitation."""
        claimed = decode(Descriptor, signed.payload, pb.Descriptor, _LARGEST_STATEMENT)
        key = self.require_member(claimed.index).public_key
        descriptor = verify(labels.DESCRIPTOR, key, signed, Descriptor, pb.Descriptor, Refusal.IDENTITY)
        if descriptor.federation != self.roster.federation:
            raise TrustError(Refusal.IDENTITY, f"the descriptor of device {descriptor.index} is of another federation")
        return descriptor


@lru_cache(maxsize=4)
def trusted_roster(root_key: bytes, signed: Signed) -> TrustedRoster:
    """`TrustedRoster`, remembered: a roster stays the same for many rounds."""
    return TrustedRoster(root_key, signed)


def prove_presence(signing_key: SigningKey, descriptor: Descriptor, challenge: bytes, prekey: Signed) -> bytes:
    """A signature that says: I am this device, I am here now, and this is my prekey."""
    key = Ed25519PrivateKey.from_private_bytes(signing_key.private)
    return key.sign(_presence(descriptor, challenge, prekey))


def require_presence(descriptor: Descriptor, challenge: bytes, prekey: Signed, proof: bytes) -> None:
    """Check what `prove_presence` made; raises TrustError, as when somebody repeats another device's words."""
    try:
        key = Ed25519PublicKey.from_public_bytes(descriptor.signing_key)
        key.verify(proof, _presence(descriptor, challenge, prekey))
    except (InvalidSignature, ValueError):
        raise TrustError(Refusal.IDENTITY, f"who says to be device {descriptor.index} is not") from None


def _presence(descriptor: Descriptor, challenge: bytes, prekey: Signed) -> bytes:
    index = descriptor.index.to_bytes(8, "big")
    return labels.joined(labels.HELLO, descriptor.federation, index, challenge, prekey.payload)


# The u-coordinates of X25519 that give the same secret with every private key (cr.yp.to/ecdh.html, "validate").
_FIELD = 2**255 - 19
_LOW_ORDER = frozenset(
    {
        *(0, 1, _FIELD - 1),
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
    }
)


def require_contributory(public_key: bytes, owner: int) -> None:
    """Refuse an X25519 key of low order, or one of the several strings for a key but the shortest (RFC 7748).

    Raises:
        TrustError: it is one of these.
    """
    coordinate = int.from_bytes(public_key, "little")
    if coordinate >= _FIELD or coordinate in _LOW_ORDER:
        raise TrustError(Refusal.KEYS, f"a key of device {owner} is of low order or not canonical", owner)


def node_id_of(digest: bytes) -> int:
    """The number that a device has on a link that knows its descriptor: 63 bits of `descriptor_digest`."""
    return int.from_bytes(digest[:8], "big") >> 1


def descriptor_digest(signed: Signed) -> bytes:
    """32 bytes that stand for this very descriptor."""
    return labels.digest(labels.DESCRIPTOR, signed.payload)
