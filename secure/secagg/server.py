"""The server's role in one round, without I/O: it sees masked vectors and learns their sum.

    prepare   gather mask keys and sealed shares
    upload    fold each masked vector into one running sum as it comes
    confirm   gather signatures on who is alive (against a lying server only)
    unmask    gather shares, reconstruct the masks that are left, take them away

Memory is one vector, one lane vector and the sealed shares, whatever the number of devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, Generic, TypeVar

from propolis.protos import secagg_pb2 as pb
from propolis.secure import labels
from propolis.secure.codec.lanes import LANES
from propolis.secure.errors import PeerError, Refusal, RefusedError, StorageError, TooFewPeersError, TrustError
from propolis.secure.identity import TrustedRoster, require_contributory, verify
from propolis.secure.prg import LANE_STREAM, Mask, apply_masks
from propolis.secure.ring import Vector
from propolis.secure.secagg.addition import Total
from propolis.secure.secagg.confirmation import require_confirmation
from propolis.secure.secagg.masks import (
    mask_private,
    pairwise_masks,
    public_half,
    seed_commitment,
    self_mask,
    share_hash,
)
from propolis.secure.secagg.member import Member
from propolis.secure.secagg.messages import (
    LARGEST_METRICS,
    RECORD_BYTES,
    Confirmation,
    ConfirmReply,
    ConfirmRequest,
    Head,
    NeighbourKeys,
    PrepareReply,
    PrepareRequest,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    UploadRequest,
    marked,
    marks,
    to_bitmap,
    to_bytes,
)
from propolis.secure.secagg.plan import Terms, of_ring, terms_of
from propolis.secure.secagg.preparation import head_context, preparation_tree, server_record
from propolis.secure.shamir import SHARE_BYTES, combine
from propolis.secure.wire import STATE_VERSION, parse, serialized

T = TypeVar("T")


class SecAggServer(Generic[T]):
    """See the module.

    Args:
        terms: of the round's plan.
        roster: that the plan refers to.
        keys: descriptor and prekey of each device of the cohort, by index.
        total: what the devices' updates are added to, empty.
        fixed_lanes: lanes of every upload before those of the metrics.
        metrics: what the last lanes are called; None takes the first upload's word for it.

    Raises:
        TrustError: a descriptor or prekey does not hold.
    """

    def __init__(
        self,
        terms: Terms,
        roster: TrustedRoster,
        keys: Mapping[int, NeighbourKeys],
        total: Total[T],
        fixed_lanes: int = 0,
        metrics: tuple[str, ...] | None = None,
    ) -> None:
        self.terms = terms
        self._members = {index: Member.of(roster, index, keys[index]) for index in terms.cohort}
        self._fixed_lanes = fixed_lanes
        self._total = total
        self._lanes: Vector | None = None
        self._metrics = metrics
        self._offered_metrics: dict[int, tuple[str, ...]] = {}
        self._unopened: Counter[int] = Counter()  # by dealer, who sent shares but none of it
        self._preparing, self._uploading = True, True
        self._mask_keys: set[bytes] = set()

    # prepare

    def prepare_request(self, index: int, told_of: Container[int] = ()) -> PrepareRequest:
        """What to ask of a device first; it has been `told_of` these devices' descriptors, and remembers them."""
        neighbours = {other: self._members[other].keys for other in self.terms.neighbours(index)}
        prekeys = tuple(keys.prekey for keys in neighbours.values())
        descriptors = tuple(keys.descriptor for other, keys in neighbours.items() if other not in told_of)
        return PrepareRequest(self.terms.bytes, self._members[index].prekey_number, prekeys, descriptors)

    def receive_prepare(self, index: int, reply: PrepareReply) -> None:
        """Take a device's preparation; raises PeerError or TrustError when the others would refuse it."""
        member = self._members[index]
        if not self._preparing:
            raise PeerError(Refusal.PHASE, f"the preparation of device {index} is too late")
        if member.head is not None:
            raise PeerError(Refusal.REPEATED, f"device {index} has prepared already")
        head = self._verified_head(index, reply)
        if len(reply.deliveries) != RECORD_BYTES * len(self.terms.neighbours(index)):
            raise PeerError(Refusal.SHARES, f"device {index} sent records for other neighbours than its own")
        last = server_record(reply.seed_commitment, reply.next_prekey)
        tree = preparation_tree(index, self.terms.digest, reply.deliveries, last)
        if tree.root != head.root:
            raise TrustError(Refusal.SHARES, f"what device {index} sent is not what it signed")
        self._mask_keys.add(head.mask_key)
        member.take_preparation(reply.head, head, reply.deliveries, last, tree)

    def _verified_head(self, index: int, reply: PrepareReply) -> Head:
        key, context = self._members[index].descriptor.signing_key, head_context(index, self.terms.digest)
        head = verify(labels.HEAD, key, reply.head, Head, pb.Head, Refusal.KEYS, *context)
        require_contributory(head.mask_key, index)
        if head.mask_key in self._mask_keys:
            raise TrustError(Refusal.KEYS, f"the mask key of device {index} is another device's")
        return head

    def keys_of(self, index: int) -> NeighbourKeys:
        """Descriptor and prekey of a device of the cohort."""
        return self._members[index].keys

    @property
    def prepared(self) -> tuple[int, ...]:
        """Devices that prepared."""
        return tuple(index for index, member in self._members.items() if member.head)

    @property
    def ready(self) -> tuple[int, ...]:
        """Devices that prepared and of whose neighbours enough did: the others would refuse to upload."""
        threshold = self.terms.sharing.threshold
        return tuple(index for index in self.prepared if len(self._masking(index)) >= threshold)

    # upload

    def upload_request(self, index: int) -> UploadRequest:
        """What to ask of a device that prepared, once no more preparations are taken."""
        self._preparing = False
        heads = {other: self._members[other].signed_head for other in self.terms.neighbours(index)}
        silent = marks([other for other, head in heads.items() if not head], list(heads))
        request = UploadRequest(self.terms.tag, silent, tuple(head for head in heads.values() if head))
        self._members[index].upload_request = labels.digest(labels.REQUEST, to_bytes(request))
        return request

    @property
    def largest_upload(self) -> int:
        """Bytes that a reply to an upload request may have."""
        return self._total.largest_addend + 8 * self._fixed_lanes + LARGEST_METRICS

    def receive_upload(self, index: int, reply: UploadReply) -> None:
        """Fold a masked vector into the sum; raises PeerError when it cannot be, or comes too late."""
        member = self._members[index]
        if not self._uploading or not member.upload_request or member.uploaded:
            raise PeerError(Refusal.PHASE, f"the upload of device {index} is too late, or its second one")
        if reply.round_tag != self.terms.tag:
            raise PeerError(Refusal.PHASE, f"the upload of device {index} is of another round")
        self._offered_metrics[index] = reply.metrics
        if self._metrics is not None and reply.metrics != self._metrics:
            raise PeerError(Refusal.MODEL, f"the metrics of device {index} are not the other devices'")
        lanes = LANES.unpack(reply.lanes, self._fixed_lanes + len(reply.metrics) + 1)
        self._total.add(reply.vector)
        if self._lanes is None:
            self._lanes, self._metrics = LANES.zeros(len(lanes)), reply.metrics
        self._lanes += lanes
        member.uploaded = True

    def close_uploads(self) -> None:
        """From here on an upload is too late.

        Raises:
            TooFewPeersError: some device's secrets could not be reconstructed by those that are left.
        """
        self._uploading = False
        alive = set(self.alive)
        threshold = self.terms.sharing.threshold
        if not alive:
            raise TooFewPeersError("no device sent a masked update")
        for index in self._owing():
            left = sum(other in alive for other in self._masking(index))
            if left < threshold:
                raise TooFewPeersError(
                    f"{len(alive)} of {len(self.terms.cohort)} devices are left: device {index} has {left} "
                    f"neighbours among them, {threshold} are needed"
                )

    @property
    def offered_metrics(self) -> list[tuple[str, ...]]:
        """What each device that uploaded something called its metrics, whether it was taken or not."""
        return list(self._offered_metrics.values())

    @property
    def metrics(self) -> tuple[str, ...]:
        """What the last lanes are called."""
        return self._metrics or ()

    @property
    def alive(self) -> tuple[int, ...]:
        """Devices whose masked vector is in the sum."""
        return tuple(index for index, member in self._members.items() if member.uploaded)

    # confirm

    def confirm_request(self) -> ConfirmRequest:
        """What to ask of every device that is alive, in malicious mode."""
        size = 8 * len(self.terms.plan.cohort)
        return ConfirmRequest(self.terms.tag, to_bitmap(self.alive, size))

    def receive_confirm(self, index: int, reply: ConfirmReply) -> None:
        """Take a signature on the alive set; raises TrustError when it does not hold."""
        member, alive = self._members[index], self.confirm_request().alive
        if self._uploading or not member.uploaded:
            raise PeerError(Refusal.PHASE, f"device {index} was not asked who is alive")
        require_confirmation(member.descriptor.signing_key, reply.signature, self.terms.digest, alive)
        member.confirmation = reply.signature

    # unmask

    def unmask_request(self, index: int) -> UnmaskRequest:
        """What to ask of a device that is alive, once no more uploads are taken."""
        masking = self._masking(index)
        dropped = [other for other in masking if not self._members[other].uploaded]
        confirmations = tuple(
            Confirmation(other, self._members[other].confirmation)
            for other in masking
            if self._members[other].confirmation
        )
        deliveries = b"".join(self._delivery(other, index) for other in masking)
        return UnmaskRequest(self.terms.tag, marks(dropped, masking), deliveries, confirmations)

    def receive_unmask(self, index: int, reply: UnmaskReply) -> None:
        """Keep the shares whose hash is the one that their dealer signed, and drop the others.

        Raises:
            PeerError: nobody asked for these, or they are not one for each record that opened.
        """
        if reply.round_tag != self.terms.tag:
            raise PeerError(Refusal.PHASE, f"the shares of device {index} are of another round")
        member = self._members[index]
        if not member.uploaded:
            raise PeerError(Refusal.PHASE, f"device {index} was not asked for shares")
        masking = self._masking(index)
        unopened = marked(reply.unopened, masking)
        dealers = [other for other in masking if other not in unopened]
        if len(reply.shares) != SHARE_BYTES * len(dealers):
            raise PeerError(Refusal.SHARES, f"device {index} sent {len(reply.shares)} bytes for {len(dealers)} shares")
        self._unopened.update(unopened)
        for place, dealer in enumerate(dealers):
            share = reply.shares[SHARE_BYTES * place : SHARE_BYTES * (place + 1)]
            if self._is_genuine(share, dealer, index):
                member.shares[dealer] = share

    def sum(self, shared_input: bytes, threads: int = 0) -> tuple[T, Vector]:
        """The sum of the updates and of the lanes of the devices that are alive.

        Args:
            shared_input: digest of the model, configuration and encoding that the devices were given.
            threads: see `propolis.secure.prg.apply_masks`.

        Raises:
            TooFewPeersError: fewer than t shares of some secret came.
            PeerError: a device shared another secret than the one that it signed, and is named as the culprit; or
                some device masked for other words than it was sent, and what comes out is noise.
        """
        if self._lanes is None:
            raise TooFewPeersError("no device sent a masked update")
        masks = list(self._masks_left(shared_input))
        lanes = self._lanes.copy()
        apply_masks(lanes, masks, LANES, LANE_STREAM)
        if int(lanes[-1]) != len(self.alive):
            raise PeerError(Refusal.MODEL, "the sum is noise: some device saw another model, configuration or plan")
        return self._total.without(masks, threads), lanes[:-1]

    def _masks_left(self, shared_input: bytes) -> Iterable[Mask]:
        """What the sum must be rid of: own masks of the alive, and theirs with those that dropped."""
        plan, alive = self.terms.digest, set(self.alive)
        for index in self._owing():
            member = self._members[index]
            secret = self._reconstruct(index)
            if index in alive:
                own = self_mask(secret, index, plan, shared_input, member.upload_request)
                yield Mask(own.seed, -own.sign)
                continue
            heads = {other: self._members[other].head for other in self._masking(index) if other in alive}
            others = [(other, head.mask_key) for other, head in heads.items() if head is not None]
            # What the alive ones added is the inverse of what the dropped one would have.
            yield from pairwise_masks(index, mask_private(secret, index, plan), others, plan, shared_input)

    def _owing(self) -> Iterable[int]:
        """Devices whose secret is needed: the alive, and those that others masked for but that dropped."""
        return [index for index in self.prepared if self._members[index].uploaded or self._is_masked_for(index)]

    def _is_masked_for(self, index: int) -> bool:
        return any(self._members[other].uploaded for other in self._masking(index))

    def _reconstruct(self, index: int) -> bytes:
        """The seed of a device that is alive, or what the mask key of one that dropped derives from."""
        threshold = self.terms.sharing.threshold
        holders = [other for other in self._masking(index) if index in self._members[other].shares]
        if len(holders) < threshold:
            if self._unopened[index] > len(self._masking(index)) - threshold:
                raise PeerError(Refusal.SHARES, f"what device {index} sealed does not open", index)
            raise TooFewPeersError(f"{len(holders)} shares of device {index} came, {threshold} are needed")
        try:
            secret = combine([(other + 1, self._members[other].shares[index]) for other in holders[:threshold]])
        except PeerError as error:  # each share is the one that the dealer signed
            raise PeerError(error.refusal, f"device {index}: {error}", index) from None
        if not self._is_signed(secret, index):
            raise PeerError(Refusal.SHARES, f"device {index} shared another secret than it signed", index)
        return secret

    def _is_signed(self, secret: bytes, index: int) -> bool:
        """Whether a secret is the one that its device committed to."""
        member, plan = self._members[index], self.terms.digest
        if member.uploaded:
            return seed_commitment(secret, index, plan) == member.seed_commitment
        return member.head is not None and public_half(mask_private(secret, index, plan)) == member.head.mask_key

    def _masking(self, index: int) -> list[int]:
        """The neighbours of a device that prepared, as it does: the ones that it masks for."""
        return [other for other in self.terms.neighbours(index) if self._members[other].head]

    def _delivery(self, dealer: int, holder: int) -> bytes:
        member, place = self._members[dealer], self._place(dealer, holder)
        return member.record(place) + (member.tree.path(place) if member.tree else b"")

    def _is_genuine(self, share: bytes, dealer: int, holder: int) -> bool:
        member = self._members[dealer]
        kind = b"seed" if member.uploaded else b"key"
        expected = member.share_hash(self._place(dealer, holder))
        return share_hash(share, dealer, holder, kind, self.terms.digest) == expected

    def _place(self, dealer: int, holder: int) -> int:
        """The place of a holder among the dealer's neighbours."""
        return self.terms.neighbours(dealer).index(holder)

    def to_bytes(self) -> bytes:
        """The role's state; it holds no device's values, but the shares that devices revealed."""
        state = pb.ServerState(
            version=STATE_VERSION,
            plan=self.terms.bytes,
            uploading=self._uploading,
            fixed_lanes=self._fixed_lanes,
            total=self._total.to_bytes(),
            lanes=b"" if self._lanes is None else self._lanes.tobytes(),
            metrics=self.metrics,
        )
        for member in self._members.values():
            member.write(state.members.add())
        return serialized(state)

    @classmethod
    def from_bytes(
        cls, data: bytes, roster: TrustedRoster, total_of: Callable[[Terms], Total[Any]] = of_ring
    ) -> SecAggServer[Any]:
        """The role from its state.

        Args:
            data: what `to_bytes` gave.
            roster: that the round's devices are in.
            total_of: an empty sum of the round of these terms.

        Raises:
            StorageError: the bytes are no such state, or not of this roster.
        """
        try:
            return cls._restored(parse(pb.ServerState, data, len(data)), roster, total_of)
        except (RefusedError, ValueError) as error:
            raise StorageError(f"the state of the server's round is damaged: {error}") from None

    @classmethod
    def _restored(
        cls, state: pb.ServerState, roster: TrustedRoster, total_of: Callable[[Terms], Total[Any]]
    ) -> SecAggServer[Any]:
        if state.version != STATE_VERSION:
            raise ValueError(f"format {state.version}")
        terms = terms_of(state.plan)
        total = total_of(terms)
        total.restore(state.total)
        members = [Member.restore(roster, each, terms.digest) for each in state.members]
        if tuple(member.descriptor.index for member in members) != terms.cohort:
            raise ValueError("its members are not the round's cohort")
        keys = {member.descriptor.index: member.keys for member in members}
        server = SecAggServer(terms, roster, keys, total, state.fixed_lanes)
        server._members = {member.descriptor.index: member for member in members}
        server._mask_keys = {member.head.mask_key for member in members if member.head}
        server._uploading = state.uploading
        server._preparing = not any(member.upload_request for member in members)
        uploaded = any(member.uploaded for member in members)
        server._metrics = tuple(state.metrics) if uploaded or state.metrics else None
        if uploaded:
            server._lanes = LANES.from_memory(state.lanes, state.fixed_lanes + len(state.metrics) + 1)
        return server
