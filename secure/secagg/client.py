"""One device's role in one round, without I/O: messages in, messages out.

    prepare   make a mask key and a seed, share both among the neighbours
    upload    mask the update for the neighbours that prepared too
    confirm   sign who is alive (against a lying server only)
    unmask    give one share of each neighbour

What the role keeps between exchanges goes through `to_bytes` and `from_bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from propolis.protos import secagg_pb2 as pb
from propolis.secure import labels
from propolis.secure.codec.lanes import LANES
from propolis.secure.envelope import open_sealed, seal
from propolis.secure.errors import PeerError, Refusal, RefusedError, StorageError, TrustError
from propolis.secure.identity import Signed, agreement_key, require_contributory, sign, verify
from propolis.secure.merkle import MerkleTree, verify_path
from propolis.secure.prg import LANE_STREAM, SEED_BYTES, VECTOR_STREAM, apply_masks
from propolis.secure.ring import Vector
from propolis.secure.secagg.confirmation import confirm_alive, require_confirmation
from propolis.secure.secagg.masks import box_info, pairwise_masks, public_half, seed_commitment, self_mask, share_hash
from propolis.secure.secagg.messages import (
    BOX_BYTES,
    ConfirmReply,
    ConfirmRequest,
    Delivery,
    Head,
    PrepareReply,
    Share,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
    from_bitmap,
    to_bytes,
)
from propolis.secure.secagg.plan import Terms, terms_of
from propolis.secure.secagg.states import Exchange, Phase, following
from propolis.secure.shamir import SHARE_BYTES, RandomBytes, split
from propolis.secure.wire import FORMAT_VERSION, fill, parse, read, serialized


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A neighbour as this device has verified it."""

    index: int
    descriptor_digest: bytes
    signing_key: bytes
    prekey: bytes = b""
    prekey_number: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class Own:
    """What this device brings into a round: who it is, and the prekey that others seal to."""

    index: int
    descriptor_digest: bytes
    signing_private: bytes
    prekey_private: bytes
    roster_number: int


@dataclass(slots=True, repr=False)
class SecAggClient:
    """See the module. Made by `prepare`, or from bytes."""

    terms: Terms
    own: Own
    neighbours: dict[int, Neighbour]
    mask_private: bytes
    seed: bytes
    phase: Phase = Phase.PREPARED
    heads: dict[int, Head] = field(default_factory=dict)
    alive: bytes = b""

    @classmethod
    def prepare(
        cls, terms: Terms, own: Own, neighbours: Sequence[Neighbour], next_prekey: Signed, random_bytes: RandomBytes
    ) -> tuple[Self, PrepareReply]:
        """Begin a round.

        Args:
            terms: of a plan that this device has accepted.
            own: this device.
            neighbours: exactly those of the round's graph, verified, with their prekeys.
            next_prekey: announced for the round after this one.
            random_bytes: such as `os.urandom`.

        Raises:
            PeerError: the neighbours are not those of the graph.
        """
        by_index = {neighbour.index: neighbour for neighbour in neighbours}
        if tuple(sorted(by_index)) != terms.neighbours(own.index) or len(by_index) != len(neighbours):
            raise PeerError(Refusal.SETS, f"the neighbours of device {own.index} are not those of the round's graph")
        client = cls(terms, own, by_index, agreement_key()[0], random_bytes(SEED_BYTES))
        records = client._seal_shares(random_bytes)
        head = Head(
            plan_digest=terms.digest,
            index=own.index,
            mask_key=public_half(client.mask_private),
            seed_commitment=seed_commitment(client.seed, own.index, terms.digest),
            deliveries_root=MerkleTree(records).root,
            roster_number=own.roster_number,
            next_prekey=labels.digest(labels.PREKEY, next_prekey.payload),
        )
        signed = sign(labels.HEAD, own.signing_private, head, pb.Head)
        return client, PrepareReply(signed, next_prekey, b"".join(records))

    def check_upload(self, request: UploadRequest) -> None:
        """Accept the heads of the neighbours that prepared too, before any training.

        Raises:
            PeerError, TrustError: a head is not a neighbour's of this round, or there are fewer than t.
        """
        following(self.phase, Exchange.UPLOAD, self.terms.plan.malicious)
        self._require_this_round(request.plan_digest)
        heads = [self._verified_head(signed) for signed in request.heads]
        if len({head.index for head in heads}) < len(heads):
            raise PeerError(Refusal.SETS, "a neighbour's head came twice")
        if len(heads) < self.terms.sharing.threshold:
            raise PeerError(
                Refusal.SETS, f"{len(heads)} neighbours prepared, {self.terms.sharing.threshold} are needed"
            )
        mask_keys = {public_half(self.mask_private), *(head.mask_key for head in heads)}
        if len(mask_keys) <= len(heads):
            raise TrustError(Refusal.KEYS, "two devices have one mask key")
        self.heads = {head.index: head for head in heads}

    def upload(
        self, request: UploadRequest, shared_input: bytes, vector: Vector, lanes: Vector, metrics: tuple[str, ...]
    ) -> UploadReply:
        """Mask an update for the neighbours that `check_upload` accepted.

        Args:
            request: the same one.
            shared_input: digest of the model, configuration and encoding that the server sent.
            vector: (d,) in the plan's ring; masked in place.
            lanes: (m,) in Z_2^64; one more is added that counts the devices, so that the server sees a wrong sum.
            metrics: names of the last lanes.
        """
        self.check_upload(request)
        request_digest = labels.digest(labels.REQUEST, to_bytes(request))
        masks = [self_mask(self.seed, self.own.index, self.terms.digest, shared_input, request_digest)]
        others = [(head.index, head.mask_key) for head in self.heads.values()]
        masks += pairwise_masks(self.own.index, self.mask_private, others, self.terms.digest, shared_input)
        ring = self.terms.grid.ring
        apply_masks(vector, masks, ring, VECTOR_STREAM)
        witnessed = np.append(lanes, LANES.embed(np.array([1])))
        apply_masks(witnessed, masks, LANES, LANE_STREAM)
        self.phase = Phase.UPLOADED
        self.seed = self.mask_private = b""  # what is left of them is with the neighbours
        return UploadReply(self.terms.digest, ring.pack(vector), LANES.pack(witnessed), metrics)

    def confirm(self, request: ConfirmRequest) -> ConfirmReply:
        """Sign who is alive, once; raises PeerError when the set is impossible."""
        after = following(self.phase, Exchange.CONFIRM, self.terms.plan.malicious)
        self._require_this_round(request.plan_digest)
        if len(request.alive) != len(self.terms.plan.cohort):
            raise PeerError(Refusal.SETS, "the alive set is no bitmap over the roster")
        self._require_alive(from_bitmap(request.alive))
        self.alive, self.phase = request.alive, after
        signature = confirm_alive(self.own.signing_private, self.terms.digest, request.alive)
        return ConfirmReply(self.terms.digest, signature)

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """Give one share of each neighbour that prepared: of its seed or of its mask key, never both.

        Raises:
            PeerError, TrustError: the sets are impossible, too few are alive, or a record is not its dealer's.
        """
        after = following(self.phase, Exchange.UNMASK, self.terms.plan.malicious)
        self._require_this_round(request.plan_digest)
        alive, dropped = set(request.alive), set(request.dropped)
        if len(alive) + len(dropped) < len(request.alive) + len(request.dropped) or alive & dropped:
            raise PeerError(Refusal.SETS, "a device is named twice among the alive and the dropped")
        if (alive | dropped) != self.heads.keys() | {self.own.index}:
            raise PeerError(Refusal.SETS, "alive and dropped are not the neighbours that this device masked for")
        self._require_alive(request.alive)
        self._require_confirmations(request, alive)
        reply = UnmaskReply(self.terms.digest, tuple(self._reveal(request.deliveries, alive)))
        self.phase = after
        self.own = replace(self.own, prekey_private=b"")  # nothing is left to open
        return reply

    def _require_alive(self, alive: Sequence[int]) -> None:
        """That this device and t neighbours are among the alive, and nobody who did not prepare."""
        members = self.heads.keys() | {self.own.index}
        if self.own.index not in alive:
            raise PeerError(Refusal.SETS, "this device's own update is called dropped")
        if not set(alive) <= members:
            raise PeerError(Refusal.SETS, "a device that did not prepare is called alive")
        if len(alive) - 1 < self.terms.sharing.threshold:
            raise PeerError(
                Refusal.SETS, f"{len(alive) - 1} neighbours are alive, {self.terms.sharing.threshold} are needed"
            )

    def _require_confirmations(self, request: UnmaskRequest, alive: set[int]) -> None:
        """Against a lying server: t neighbours have signed the very set that this device signed."""
        if not self.terms.plan.malicious:
            return
        if set(from_bitmap(self.alive)) != alive:
            raise PeerError(Refusal.SETS, "the alive set is not the one that this device confirmed")
        confirming = {each.index: each.signature for each in request.confirmations}
        for index in confirming:
            if index not in alive or index == self.own.index:
                raise PeerError(Refusal.SETS, f"device {index} confirms, but is no neighbour that is alive")
            require_confirmation(self.neighbours[index].signing_key, confirming[index], self.terms.digest, self.alive)
        if len(confirming) < self.terms.sharing.threshold:
            raise PeerError(Refusal.SETS, f"{len(confirming)} confirm, {self.terms.sharing.threshold} are needed")

    def _reveal(self, deliveries: Sequence[Delivery], alive: set[int]) -> list[Share]:
        shares = []
        if sorted(delivery.dealer for delivery in deliveries) != sorted(self.heads):
            raise PeerError(Refusal.SETS, "the records are not one of each neighbour that this device masked for")
        for delivery in deliveries:
            seed_share, key_share = self._open(delivery)
            share = seed_share if delivery.dealer in alive else key_share
            if share:
                shares.append(Share(delivery.dealer, share))
        return shares

    def _open(self, delivery: Delivery) -> tuple[bytes, bytes]:
        """The two shares in a record; empty when the dealer did not seal them to this device."""
        dealer = delivery.dealer
        holders = self.terms.neighbours(dealer)
        position = holders.index(self.own.index)
        verify_path(self.heads[dealer].deliveries_root, delivery.record, position, len(holders), delivery.path)
        info = box_info(
            *(dealer, self.neighbours[dealer].descriptor_digest),
            *(self.own.index, self.own.descriptor_digest),
            self.terms.digest,
        )
        try:
            pair = open_sealed(delivery.record[:BOX_BYTES], self.own.prekey_private, info)
        except RefusedError:
            return b"", b""  # the dealer's fault, and it signed the record: the others' shares are enough
        return pair[:SHARE_BYTES], pair[SHARE_BYTES:]

    def _seal_shares(self, random_bytes: RandomBytes) -> list[bytes]:
        """One record for each neighbour in rising order: the sealed pair of shares, and a hash of each."""
        own, plan = self.own, self.terms.digest
        holders = sorted(self.neighbours)
        points = [holder + 1 for holder in holders]
        seeds = split(self.seed, self.terms.sharing.threshold, points, random_bytes)
        keys = split(self.mask_private, self.terms.sharing.threshold, points, random_bytes)
        records = []
        for holder, seed_share, key_share in zip(holders, seeds, keys, strict=True):
            neighbour = self.neighbours[holder]
            info = box_info(own.index, own.descriptor_digest, holder, neighbour.descriptor_digest, plan)
            box = seal(seed_share + key_share, neighbour.prekey, info)
            hashes = (
                share_hash(share, own.index, holder, kind, plan)
                for share, kind in ((seed_share, b"seed"), (key_share, b"key"))
            )
            records.append(box + b"".join(hashes))
        return records

    def _verified_head(self, signed: Signed) -> Head:
        claimed = parse(pb.Head, signed.payload)
        neighbour = self.neighbours.get(claimed.index)
        if neighbour is None:
            raise PeerError(Refusal.SETS, "a head is not from a neighbour")
        head = verify(labels.HEAD, neighbour.signing_key, signed, Head, pb.Head, Refusal.KEYS)
        if head.plan_digest != self.terms.digest:
            raise TrustError(Refusal.KEYS, f"the head of device {head.index} is of another round or plan")
        if head.roster_number > self.own.roster_number:
            raise TrustError(
                Refusal.ROSTER,
                f"device {head.index} has seen roster {head.roster_number}, this one {self.own.roster_number}",
            )
        require_contributory(head.mask_key, head.index)
        return head

    def _require_this_round(self, plan_digest: bytes) -> None:
        if plan_digest != self.terms.digest:
            raise PeerError(Refusal.PHASE, "the request is of another round than the one under way")

    def to_bytes(self) -> bytes:
        """The role's state; it holds secrets."""
        state = pb.ClientState(
            version=FORMAT_VERSION,
            plan=self.terms.bytes,
            index=self.own.index,
            descriptor_digest=self.own.descriptor_digest,
            phase=self.phase,
            mask_private=self.mask_private,
            seed=self.seed,
            prekey_private=self.own.prekey_private,
            roster_number=self.own.roster_number,
            alive=self.alive,
        )
        for neighbour in self.neighbours.values():
            kept = state.neighbours.add(
                index=neighbour.index,
                descriptor_digest=neighbour.descriptor_digest,
                signing_key=neighbour.signing_key,
            )
            if neighbour.index in self.heads:
                fill(self.heads[neighbour.index], kept.head)
        return serialized(state)

    @classmethod
    def from_bytes(cls, data: bytes, signing_private: bytes) -> Self:
        """The role from its state and this device's signing key, which is kept elsewhere.

        Raises:
            StorageError: the bytes are no such state.
        """
        try:
            return cls._restored(parse(pb.ClientState, data), signing_private)
        except (RefusedError, ValueError):
            raise StorageError("the state of the device's round is damaged") from None

    @classmethod
    def _restored(cls, state: pb.ClientState, signing_private: bytes) -> Self:
        if state.version != FORMAT_VERSION:
            raise ValueError(f"format {state.version}")
        own = Own(state.index, state.descriptor_digest, signing_private, state.prekey_private, state.roster_number)
        neighbours = {n.index: Neighbour(n.index, n.descriptor_digest, n.signing_key) for n in state.neighbours}
        heads = {n.index: read(Head, n.head) for n in state.neighbours if n.HasField("head")}
        terms, phase = terms_of(state.plan), Phase(state.phase)
        return cls(terms, own, neighbours, state.mask_private, state.seed, phase, heads, state.alive)
