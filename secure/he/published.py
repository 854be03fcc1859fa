"""A key as the server hands it out: what the root says of its holder, what the holder says of it, and its material."""

from __future__ import annotations

from dataclasses import dataclass

from propolis.protos import he_key_pb2 as pb
from propolis.secure.he.keys import LARGEST_MATERIAL, PublicKey, read_material, verify_holder, verify_key
from propolis.secure.identity import Signed
from propolis.secure.manifest import Trust
from propolis.secure.wire import decode, encode, sized, version_field

# The material, and two short statements.
LARGEST_PUBLISHED = LARGEST_MATERIAL + 2**13


@dataclass(frozen=True, slots=True)
class Published:
    """See the module.

    Attributes:
        holder: what `propolis.secure.he.keys.delegate_holder` gave.
        statement: what `propolis.secure.he.keys.state_key` gave.
        material: of the key.
    """

    holder: Signed
    statement: Signed
    material: bytes = sized(1, LARGEST_MATERIAL)
    version: int = version_field()

    def to_bytes(self) -> bytes:
        """As it travels, and as the file of a server."""
        return encode(self, pb.Published)

    @classmethod
    def from_bytes(cls, data: bytes) -> Published:
        """From a peer's bytes; raises PeerError when they are none."""
        return decode(cls, data, pb.Published, LARGEST_PUBLISHED)


@dataclass(frozen=True, slots=True)
class AcceptedKey:
    """A key that is the federation's.

    Attributes:
        key: its public part.
        number: that its holder gave it.
        serial: of the holder.
    """

    key: PublicKey
    number: int
    serial: int


def accept_key(published: Published, trust: Trust, now: float) -> AcceptedKey:
    """Believe that a key is the federation's, because the root says who makes keys.

    Args:
        published: what a server hands out.
        trust: root, and the newest roster that is known.
        now: seconds since 1970.

    Raises:
        TrustError: the root delegated to no such holder, or not now, or took it back, or the holder did not make it; or
            the roster has expired, so that who is revoked is not known.
        PeerError: something in it is malformed.
    """
    trust.roster.require_current(now)
    holder = verify_holder(trust.root_key, trust.roster, published.holder, now)
    key = read_material(holder.federation, published.material)
    return AcceptedKey(key, verify_key(holder, published.statement, key), holder.serial)
