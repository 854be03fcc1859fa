"""Which device of the roster is behind which Flower node, and which prekey it may be reached by next."""

from __future__ import annotations

from collections.abc import Iterable
from sys import getsizeof

from propolis.secure.errors import Refusal, TrustError
from propolis.secure.identity import (
    Signed,
    TrustedRoster,
    descriptor_digest,
    node_id_of,
    require_presence,
    verify_prekey,
)
from propolis.secure.secagg.messages import HelloReply, NeighbourKeys

# Memory for who was told of whom. A device of the largest federation takes up to 140,000 bytes, one of a thousand
# devices 160. Who was told longest ago is dropped, and told everything again: devices take that at any time.
_MOST_TOLD_BYTES = 2**26


class Directory:
    """What `hello` told, while it is good: a prekey is given to neighbours once.

    What the neighbours would refuse a whole round for is refused here: then it costs one device the round.

    Args:
        roster: the members.
        bound: whether a node's id is that of its descriptor, see `node_id_of`, and nobody else can have it.
    """

    def __init__(self, roster: TrustedRoster, *, bound: bool = False) -> None:
        self._roster, self._bound = roster, bound
        self._index: dict[int, int] = {}
        self._keys: dict[int, NeighbourKeys] = {}
        self._descriptors: dict[int, bytes] = {}
        self._numbers: dict[int, int] = {}
        self._banned: set[int] = set()
        # By device, told last at the end: a bitmap of the roster, as long as the highest index that it was told of.
        self._told_of: dict[int, int] = {}
        self._told_bytes = 0

    def renew(self, roster: TrustedRoster) -> None:
        """Go by a newer roster: every node must say hello again, which also tells it of the roster."""
        self._roster = roster
        self._keys.clear()

    def strangers(self, node_ids: Iterable[int]) -> list[int]:
        """The nodes that must say hello before they can take part in a round."""
        return [node_id for node_id in node_ids if node_id not in self._keys]

    def take_hello(self, node_id: int, challenge: bytes, reply: HelloReply) -> None:
        """Take a node's word on who it is, as far as its signatures hold.

        Raises:
            TrustError: its descriptor is no member's or the second one of its index, it is not there itself, or its
                prekey is not its own, not fresh, or weak.
        """
        descriptor = self._roster.descriptor(reply.descriptor)
        require_presence(descriptor, challenge, reply.prekey, reply.proof)
        if descriptor.index in self._banned:
            raise TrustError(Refusal.IDENTITY, f"device {descriptor.index} has cheated in this run")
        digest = descriptor_digest(reply.descriptor)
        if self._bound and node_id_of(digest) != node_id:
            raise TrustError(Refusal.IDENTITY, f"who says to be device {descriptor.index} connects as another one")
        if self._descriptors.setdefault(descriptor.index, digest) != digest:
            raise TrustError(Refusal.IDENTITY, f"device {descriptor.index} comes with a second descriptor")
        self._take(node_id, NeighbourKeys(reply.descriptor, reply.prekey))

    def take_next(self, node_id: int, keys: NeighbourKeys, prekey: Signed) -> None:
        """The prekey that a node announced for the round after this one; raises TrustError as `take_hello` does."""
        self._take(node_id, NeighbourKeys(keys.descriptor, prekey))

    def members(self, node_ids: Iterable[int]) -> dict[int, int]:
        """Node ids by index, of those who said hello; of two nodes with one index, only the first."""
        found: dict[int, int] = {}
        for node_id in node_ids:
            if node_id in self._keys:
                found.setdefault(self._index[node_id], node_id)
        return found

    def spend(self, node_id: int) -> NeighbourKeys:
        """A node's keys, to give to its neighbours: until it announces another prekey it must say hello again."""
        return self._keys.pop(node_id)

    def told_of(self, index: int, others: Iterable[int]) -> frozenset[int]:
        """Those of the others whose descriptors a device has accepted in this run, and remembers."""
        known = self._told_of.get(index, 0)
        return frozenset(other for other in others if known >> other & 1)

    def note_told(self, index: int, others: Iterable[int]) -> None:
        """Note that a device has accepted the descriptors of these others."""
        told = self._told_of.get(index, 0) | sum(1 << other for other in others)
        self.forget_told(index)
        self._told_of[index] = told
        self._told_bytes += getsizeof(told)
        while self._told_bytes > _MOST_TOLD_BYTES:
            self.forget_told(next(iter(self._told_of)))

    def forget_told(self, index: int) -> None:
        """Forget what a device was told, as when it has lost it: the next request has everything."""
        if index in self._told_of:
            self._told_bytes -= getsizeof(self._told_of.pop(index))

    def ban(self, index: int) -> None:
        """Leave out a device that was seen to cheat, for the rest of the run."""
        self._banned.add(index)
        for node_id in [node_id for node_id in self._keys if self._index[node_id] == index]:
            del self._keys[node_id]

    def _take(self, node_id: int, keys: NeighbourKeys) -> None:
        descriptor = self._roster.descriptor(keys.descriptor)
        number = verify_prekey(keys.prekey, descriptor.federation, descriptor.index, descriptor.signing_key).number
        if number <= self._numbers.get(descriptor.index, -1):
            raise TrustError(Refusal.KEYS, f"device {descriptor.index} announced an old prekey")
        self._numbers[descriptor.index] = number
        self._index[node_id] = descriptor.index
        self._keys[node_id] = keys
