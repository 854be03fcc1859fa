"""One device's role in one round, without I/O: messages in, messages out.

    prepare   make a mask key and a seed, share both among the neighbours
    upload    mask the update for the neighbours that prepared too
    confirm   sign who is alive (against a lying server only)
    unmask    give one share of each neighbour

What the role keeps between exchanges goes through `to_bytes` and `from_bytes`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from propolis.protos import secagg_pb2 as pb
from propolis.secure import labels
from propolis.secure.codec.lanes import LANES
from propolis.secure.envelope import open_sealed, seal
from propolis.secure.errors import PeerError, Refusal, RefusedError, StorageError, TrustError
from propolis.secure.identity import Signed, require_contributory, sign, verify
from propolis.secure.prg import LANE_STREAM, apply_masks
from propolis.secure.ring import Vector
from propolis.secure.secagg.addition import Addend
from propolis.secure.secagg.confirmation import confirm_alive, require_confirmation
from propolis.secure.secagg.masks import (
    box_info,
    mask_private,
    pairwise_masks,
    public_half,
    seed_commitment,
    self_mask,
    share_hash,
)
from propolis.secure.secagg.messages import (
    BOX_BYTES,
    RECORD_BYTES,
    ConfirmReply,
    ConfirmRequest,
    Head,
    PrepareReply,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
    from_bitmap,
    marked,
    marks,
    to_bytes,
)
from propolis.secure.secagg.plan import Terms, terms_of
from propolis.secure.secagg.preparation import (
    delivery_path_size,
    head_context,
    preparation_tree,
    require_record,
    server_record,
)
from propolis.secure.secagg.states import Exchange, Phase, following
from propolis.secure.shamir import SHARE_BYTES, RandomBytes, draw_secret, split
from propolis.secure.wire import STATE_VERSION, fill, parse, read, serialized


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


@dataclass(slots=True, repr=False)
class SecAggClient:
    """See the module. Made by `prepare`, or from bytes."""

    terms: Terms
    own: Own
    neighbours: dict[int, Neighbour]
    mask_secret: bytes
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
        client = cls(terms, own, by_index, draw_secret(random_bytes), draw_secret(random_bytes))
        deliveries = b"".join(client._seal_shares(random_bytes))
        commitment = seed_commitment(client.seed, own.index, terms.digest)
        tree = preparation_tree(own.index, terms.digest, deliveries, server_record(commitment, next_prekey))
        head = Head(public_half(client.mask_private), tree.root)
        context = head_context(own.index, terms.digest)
        signed = sign(labels.HEAD, own.signing_private, head, pb.Head, *context)
        return client, PrepareReply(signed, next_prekey, deliveries, commitment)

    @property
    def mask_private(self) -> bytes:
        """The X25519 private mask key; its secret is shared in its place, for it is half as long."""
        return mask_private(self.mask_secret, self.own.index, self.terms.digest)

    @property
    def masking(self) -> list[int]:
        """The neighbours that this device masks for, rising."""
        return sorted(self.heads)

    def check_upload(self, request: UploadRequest) -> None:
        """Accept the heads of the neighbours that prepared too, before any training.

        Raises:
            PeerError, TrustError: a head is not a neighbour's of this round, or there are fewer than t.
        """
        following(self.phase, Exchange.UPLOAD, self.terms.plan.malicious)
        self._require_this_round(request.round_tag)
        neighbours = self.terms.neighbours(self.own.index)
        silent = marked(request.silent, neighbours)
        prepared = [index for index in neighbours if index not in silent]
        if len(prepared) != len(request.heads):
            raise PeerError(Refusal.SETS, f"expected {len(prepared)} heads, got {len(request.heads)}")
        if len(prepared) < self.terms.sharing.threshold:
            raise PeerError(
                Refusal.SETS, f"{len(prepared)} neighbours prepared, {self.terms.sharing.threshold} are needed"
            )
        heads = {index: self._verified_head(index, head) for index, head in zip(prepared, request.heads, strict=True)}
        mask_keys = {public_half(self.mask_private), *(head.mask_key for head in heads.values())}
        if len(mask_keys) <= len(heads):
            raise TrustError(Refusal.KEYS, "two devices have one mask key")
        self.heads = heads

    def upload(
        self, request: UploadRequest, shared_input: bytes, update: Addend, lanes: Vector, metrics: tuple[str, ...]
    ) -> UploadReply:
        """Mask an update for the neighbours that `check_upload` accepted.

        Args:
            request: the same one.
            shared_input: digest of the model, configuration and encoding that the server sent.
            update: what it adds to the sum.
            lanes: (m,) in Z_2^64; one more is added that counts the devices, so that the server sees a wrong sum.
            metrics: names of the last lanes.
        """
        self.check_upload(request)
        request_digest = labels.digest(labels.REQUEST, to_bytes(request))
        masks = [self_mask(self.seed, self.own.index, self.terms.digest, shared_input, request_digest)]
        others = [(index, head.mask_key) for index, head in self.heads.items()]
        masks += pairwise_masks(self.own.index, self.mask_private, others, self.terms.digest, shared_input)
        masked = update.masked(masks)
        witnessed = np.append(lanes, LANES.embed(np.array([1])))
        apply_masks(witnessed, masks, LANES, LANE_STREAM)
        self.phase = Phase.UPLOADED
        self.seed = self.mask_secret = b""  # what is left of them is with the neighbours
        return UploadReply(self.terms.tag, masked, LANES.pack(witnessed), metrics)

    def confirm(self, request: ConfirmRequest) -> ConfirmReply:
        """Sign who is alive, once; raises PeerError when the set is impossible."""
        after = following(self.phase, Exchange.CONFIRM, self.terms.plan.malicious)
        self._require_this_round(request.round_tag)
        if len(request.alive) != len(self.terms.plan.cohort):
            raise PeerError(Refusal.SETS, "the alive set is no bitmap over the roster")
        self._require_alive(from_bitmap(request.alive))
        self.alive, self.phase = request.alive, after
        signature = confirm_alive(self.own.signing_private, self.terms.digest, request.alive)
        return ConfirmReply(self.terms.tag, signature)

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """Give one share of each neighbour that prepared: of its seed or of its mask key, never both.

        Raises:
            PeerError, TrustError: the sets are impossible, too few are alive, or a record is not its dealer's.
        """
        after = following(self.phase, Exchange.UNMASK, self.terms.plan.malicious)
        self._require_this_round(request.round_tag)
        alive = self.alive_in(request)
        self._require_alive(alive)
        self._require_confirmations(request, alive)
        reply = self._reveal(request.deliveries, alive)
        self.phase = after
        self.own = replace(self.own, prekey_private=b"")  # nothing is left to open
        return reply

    def alive_in(self, request: UnmaskRequest) -> set[int]:
        """Who is alive, as far as this device sees: itself, and those that it masked for and that did not drop.

        Raises:
            PeerError: it is not the time to unmask, or what dropped is no bitmap over these.
        """
        following(self.phase, Exchange.UNMASK, self.terms.plan.malicious)
        return {self.own.index, *self.heads} - marked(request.dropped, self.masking)

    def _require_alive(self, alive: Collection[int]) -> None:
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

    def _reveal(self, deliveries: bytes, alive: set[int]) -> UnmaskReply:
        pairs = self._open_all(deliveries)
        shares = (seed_share if dealer in alive else key_share for dealer, (seed_share, key_share) in pairs.items())
        unopened = [dealer for dealer, (seed_share, _) in pairs.items() if not seed_share]
        return UnmaskReply(self.terms.tag, b"".join(shares), marks(unopened, self.masking))

    def _open_all(self, deliveries: bytes) -> dict[int, tuple[bytes, bytes]]:
        """The two shares in each record, by dealer; raises as `unmask` does."""
        pairs, start = {}, 0
        for dealer in self.masking:
            holders = self.terms.neighbours(dealer)
            place = holders.index(self.own.index)
            end = start + RECORD_BYTES + delivery_path_size(place, len(holders))
            pairs[dealer] = self._open(dealer, place, len(holders), deliveries[start:end])
            start = end
        if start != len(deliveries):
            raise PeerError(Refusal.SHARES, f"expected {start} bytes of records and paths, got {len(deliveries)}")
        return pairs

    def _open(self, dealer: int, place: int, holders: int, delivery: bytes) -> tuple[bytes, bytes]:
        """The two shares in a record; empty when the dealer did not seal them to this device."""
        record, path = delivery[:RECORD_BYTES], delivery[RECORD_BYTES:]
        require_record(self.heads[dealer].root, dealer, self.terms.digest, place, holders, record, path)
        info = box_info(
            *(dealer, self.neighbours[dealer].descriptor_digest),
            *(self.own.index, self.own.descriptor_digest),
            self.terms.digest,
        )
        try:
            pair = open_sealed(record[:BOX_BYTES], self.own.prekey_private, info)
        except RefusedError:
            return b"", b""  # the dealer's fault, and it signed the record: the others' shares are enough
        return pair[:SHARE_BYTES], pair[SHARE_BYTES:]

    def _seal_shares(self, random_bytes: RandomBytes) -> list[bytes]:
        """One record for each neighbour in rising order: the sealed pair of shares, and a hash of each."""
        own, plan = self.own, self.terms.digest
        holders = sorted(self.neighbours)
        points = [holder + 1 for holder in holders]
        seeds = split(self.seed, self.terms.sharing.threshold, points, random_bytes)
        keys = split(self.mask_secret, self.terms.sharing.threshold, points, random_bytes)
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

    def _verified_head(self, index: int, signed: Signed) -> Head:
        key, context = self.neighbours[index].signing_key, head_context(index, self.terms.digest)
        head = verify(labels.HEAD, key, signed, Head, pb.Head, Refusal.KEYS, *context)
        require_contributory(head.mask_key, index)
        return head

    def _require_this_round(self, round_tag: bytes) -> None:
        if round_tag != self.terms.tag:
            raise PeerError(Refusal.PHASE, "the request is of another round than the one under way")

    def to_bytes(self) -> bytes:
        """The role's state; it holds secrets."""
        state = pb.ClientState(
            version=STATE_VERSION,
            plan=self.terms.bytes,
            index=self.own.index,
            descriptor_digest=self.own.descriptor_digest,
            phase=self.phase,
            mask_secret=self.mask_secret,
            seed=self.seed,
            prekey_private=self.own.prekey_private,
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
        if state.version != STATE_VERSION:
            raise ValueError(f"format {state.version}")
        own = Own(state.index, state.descriptor_digest, signing_private, state.prekey_private)
        neighbours = {n.index: Neighbour(n.index, n.descriptor_digest, n.signing_key) for n in state.neighbours}
        heads = {n.index: read(Head, n.head) for n in state.neighbours if n.HasField("head")}
        terms, phase = terms_of(state.plan), Phase(state.phase)
        return cls(terms, own, neighbours, state.mask_secret, state.seed, phase, heads, state.alive)
