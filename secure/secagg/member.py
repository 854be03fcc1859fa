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
from propolis.secure.secagg.preparation import commitment_in, head_context, preparation_tree
from propolis.secure.wire import fill, read


@dataclass(slots=True, repr=False)
class Member:
    """One device of the cohort, and what it has sent so far.

    Attributes:
        descriptor, keys, prekey_number: who it is, verified.
        head, signed_head, deliveries, server_record, tree: its preparation, once it has come.
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
    server_record: bytes = b""
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
        prekey = verify_prekey(keys.prekey, descriptor.federation, index, descriptor.signing_key)
        return cls(descriptor, keys, prekey.number)

    def take_preparation(
        self, signed: Signed, head: Head, deliveries: bytes, server_record: bytes, tree: MerkleTree
    ) -> None:
        """Keep a verified preparation."""
        self.head, self.signed_head, self.tree = head, signed, tree
        self.deliveries, self.server_record = deliveries, server_record

    @property
    def seed_commitment(self) -> bytes:
        """What it signed of its seed."""
        return commitment_in(self.server_record)

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
        state.deliveries, state.server_record = self.deliveries, self.server_record
        state.upload_request = self.upload_request
        state.uploaded, state.confirmation = self.uploaded, self.confirmation
        for dealer, value in self.shares.items():
            state.shares.add(dealer=dealer, value=value)

    @classmethod
    def restore(cls, roster: TrustedRoster, state: pb.ServerState.Member, plan: bytes) -> Self:
        """The member that `write` saved, verified again; `plan` is the digest of the round's plan."""
        keys = NeighbourKeys(read(Signed, state.descriptor), read(Signed, state.prekey))
        member = cls.of(roster, state.index, keys)
        if state.HasField("head"):
            signed = read(Signed, state.head)
            key, context = member.descriptor.signing_key, head_context(state.index, plan)
            head = verify(labels.HEAD, key, signed, Head, pb.Head, Refusal.KEYS, *context)
            tree = preparation_tree(state.index, plan, state.deliveries, state.server_record)
            member.take_preparation(signed, head, state.deliveries, state.server_record, tree)
        member.upload_request, member.uploaded = state.upload_request, state.uploaded
        member.confirmation = state.confirmation
        member.shares = {share.dealer: share.value for share in state.shares}
        return member
