"""Hash trees: one root commits to many records, and each can be checked alone (Merkle, 1987; RFC 6962 shape).

Hashes have 16 bytes. To show another record under a root that somebody else signed takes a second preimage, 2^128 work:
every hash names its tree and its place there, so one try cannot hit many trees at once. Two sets of records with one
root take 2^64 work, and only their own author can look for them: it harms only what it shares itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError

HASH_BYTES = 16


class MerkleTree:
    """The tree over records, of which there is at least one; a node without a sibling moves up as it is.

    Args:
        records: what the root commits to, in this order.
        context: names this tree among all others.
    """

    def __init__(self, records: Sequence[bytes], context: bytes) -> None:
        level = [_leaf(context, place, record) for place, record in enumerate(records)]
        self._levels = [b"".join(level)]  # one string a level takes a third of the memory of a list
        while len(level) > 1:
            pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
            height = len(self._levels)
            level = [
                _node(context, height, place, pair) if len(pair) == 2 else pair[0] for place, pair in enumerate(pairs)
            ]
            self._levels.append(b"".join(level))

    @property
    def root(self) -> bytes:
        """16 bytes that commit to all the records and their order."""
        return self._levels[-1]

    def path(self, position: int) -> bytes:
        """The siblings from the record at `position` up to the root, 16 bytes each."""
        siblings = []
        for level in self._levels[:-1]:
            start = HASH_BYTES * (position ^ 1)
            siblings.append(level[start : start + HASH_BYTES])  # empty where there is none
            position //= 2
        return b"".join(siblings)


def path_size(position: int, count: int) -> int:
    """Bytes of the path of the record at `position` of `count`."""
    siblings = 0
    while count > 1:
        siblings += position ^ 1 < count
        position, count = position // 2, (count + 1) // 2
    return HASH_BYTES * siblings


def verify_path(root: bytes, record: bytes, position: int, count: int, path: bytes, context: bytes) -> None:
    """Check that `record` is the one at `position` of `count` under `root`, in the tree named `context`.

    Raises:
        TrustError: it is not.
    """
    if not 0 <= position < count:
        raise TrustError(Refusal.SHARES, f"there is no record {position} of {count}")
    node, rest, height = _leaf(context, position, record), path, 1
    while count > 1:
        if position ^ 1 < count:
            sibling, rest = rest[:HASH_BYTES], rest[HASH_BYTES:]
            pair = (sibling, node) if position % 2 else (node, sibling)
            node = _node(context, height, position // 2, pair)
        position, count, height = position // 2, (count + 1) // 2, height + 1
    if rest or node != root:
        raise TrustError(Refusal.SHARES, "a record is not under the root that its sender signed")


def _leaf(context: bytes, place: int, record: bytes) -> bytes:
    return labels.digest(labels.LEAF, context, place.to_bytes(8, "big"), record)[:HASH_BYTES]


def _node(context: bytes, height: int, place: int, pair: Sequence[bytes]) -> bytes:
    where = height.to_bytes(8, "big") + place.to_bytes(8, "big")
    return labels.digest(labels.NODE, context, where, *pair)[:HASH_BYTES]
