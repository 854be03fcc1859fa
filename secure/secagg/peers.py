"""Who the neighbours in a prepare request are: told of by the request, or remembered from one before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from propolis.secure.errors import PeerError, Refusal, TrustError
from propolis.secure.identity import Signed, TrustedRoster, descriptor_digest, verify_prekey
from propolis.secure.secagg.client import Neighbour
from propolis.secure.secagg.device_state import Peer
from propolis.secure.secagg.messages import PrepareRequest


class Acquaintances:
    """What a device believes about the others.

    Args:
        roster: that the device trusts.
        known: the peers that it has prepared with before, by index.
    """

    def __init__(self, roster: TrustedRoster, known: Mapping[int, Peer]) -> None:
        self._roster, self._known = roster, known

    def peers(self, neighbours: Sequence[int], asked: PrepareRequest) -> dict[int, Peer]:
        """The neighbours of the round's graph, in rising order.

        Raises:
            PeerError: a neighbour is neither introduced nor known, or somebody else is introduced; or the prekeys are
                not one of each.
            TrustError: a descriptor is no member's, or the second one of its index.
        """
        introduced = dict(self._introduced(signed) for signed in asked.descriptors)
        if len(introduced) < len(asked.descriptors) or not introduced.keys() <= set(neighbours):
            raise PeerError(Refusal.SETS, "the descriptors are not one each of some of the neighbours")
        if len(asked.prekeys) != len(neighbours):
            raise PeerError(Refusal.SETS, f"expected {len(neighbours)} prekeys, got {len(asked.prekeys)}")
        return {index: introduced.get(index) or self._remembered(index) for index in neighbours}

    def neighbour(self, index: int, peer: Peer, signed: Signed) -> Neighbour:
        """A peer with the prekey for this round; raises TrustError when that is not its own, or not fresh."""
        prekey = verify_prekey(signed, self._roster.roster.federation, index, peer.signing_key)
        if prekey.number < peer.next_prekey:
            raise TrustError(Refusal.KEYS, f"the prekey {prekey.number} of device {index} was used before")
        return Neighbour(index, peer.descriptor_digest, peer.signing_key, prekey.public_key, prekey.number)

    def _introduced(self, signed: Signed) -> tuple[int, Peer]:
        """Index and keys of a device whose descriptor is a member's, and the only one of its index."""
        descriptor, digest = self._roster.descriptor(signed), descriptor_digest(signed)
        index = descriptor.index
        known = self._known.get(index)
        if known is not None and known.descriptor_digest != digest:
            raise TrustError(Refusal.IDENTITY, f"device {index} comes with a second descriptor")
        next_prekey = known.next_prekey if known is not None else 0
        return index, Peer(digest, descriptor.signing_key, self._roster.require_member(index).public_key, next_prekey)

    def _remembered(self, index: int) -> Peer:
        """The keys of a device that this one was told of, and that is still a member by the same invitation."""
        entry, peer = self._roster.require_member(index), self._known.get(index)
        if peer is None or peer.invitation_key != entry.public_key:
            raise PeerError(Refusal.UNKNOWN_PEER, f"this device was given no descriptor of device {index}")
        return peer
