"""What the server keeps of one device of the cohort."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from propolis.protos import secagg_pb2 as pb
from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError
from propolis.secure.identity import Descriptor, Signed, TrustedRoster, verify, verify_prekey
from propolis.secure.merkle import HASH_BYTES, MerkleTree
from propolis.secure.secagg.messages import BOX_BYTES, RECORD_BYTES, Head, NeighbourKeys
from propolis.secure.wire import fill, read


@dataclass(slots=True, repr=False)
class Member:
    """One device of the cohort, and what it has sent so far.

    Attributes:
        descriptor, keys, prekey_number: who it is, verified.
        head, signed_head, deliveries, tree: its preparation, once it has come.
        upload_request: digest of what it was asked to mask for.
        uploaded: whether its masked vector is in the sum.
        confirmation: its signature on the alive set.
        shares: genuine shares that it revealed, by dealer.
    """

    descriptor: Descriptor
    keys: NeighbourKeys
    prekey_number: int
    head: Head | None = None
    signed_head: Signed | None = None
    deliveries: bytes = b""
    tree: MerkleTree | None = None
    upload_request: bytes = b""
    uploaded: bool = False
    confirmation: bytes = b""
    shares: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, roster: TrustedRoster, index: int, keys: NeighbourKeys) -> Self:
        """The member `index`, whose keys hold; raises TrustError otherwise."""
        descriptor = roster.descriptor(keys.descriptor)
        if descriptor.index != index:
            raise TrustError(
                Refusal.IDENTITY, f"device {index} comes with the keys of device {descriptor.index}", index
            )
        return cls(descriptor, keys, verify_prekey(keys.prekey, descriptor).number)

    def take_preparation(self, signed: Signed, head: Head, deliveries: bytes) -> None:
        """Keep a verified preparation."""
        self.head, self.signed_head, self.deliveries = head, signed, deliveries
        self.tree = MerkleTree(records_of(deliveries))

    def record(self, place: int) -> bytes:
        """The record for the neighbour at `place` in rising order."""
        return self.deliveries[place * RECORD_BYTES : (place + 1) * RECORD_BYTES]

    def share_hash(self, place: int) -> bytes:
        """The signed hash of the share that the neighbour at `place` is to reveal."""
        start = BOX_BYTES + (0 if self.uploaded else HASH_BYTES)
        return self.record(place)[start : start + HASH_BYTES]

    def write(self, state: pb.ServerState.Member) -> None:
        """Copy into the server's saved state."""
        state.index = self.descriptor.index
        fill(self.keys.descriptor, state.descriptor)
        fill(self.keys.prekey, state.prekey)
        if self.signed_head:
            fill(self.signed_head, state.head)
        state.deliveries, state.upload_request = self.deliveries, self.upload_request
        state.uploaded, state.confirmation = self.uploaded, self.confirmation
        for dealer, value in self.shares.items():
            state.shares.add(dealer=dealer, value=value)

    @classmethod
    def restore(cls, roster: TrustedRoster, state: pb.ServerState.Member) -> Self:
        """The member that `write` saved, verified again."""
        keys = NeighbourKeys(read(Signed, state.descriptor), read(Signed, state.prekey))
        member = cls.of(roster, state.index, keys)
        if state.HasField("head"):
            signed = read(Signed, state.head)
            head = verify(labels.HEAD, member.descriptor.signing_key, signed, Head, pb.Head, Refusal.KEYS)
            member.take_preparation(signed, head, state.deliveries)
        member.upload_request, member.uploaded = state.upload_request, state.uploaded
        member.confirmation = state.confirmation
        member.shares = {share.dealer: share.value for share in state.shares}
        return member


def records_of(deliveries: bytes) -> list[bytes]:
    """The records of a prepare reply, one by one."""
    return [deliveries[start : start + RECORD_BYTES] for start in range(0, len(deliveries), RECORD_BYTES)]
