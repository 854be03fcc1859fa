"""Hash trees: one root commits to many records, and each can be checked alone (Merkle, 1987; RFC 6962 shape)."""

from __future__ import annotations

from collections.abc import Sequence

from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError

HASH_BYTES = 32


class MerkleTree:
    """The tree over records, of which there is at least one; a node without a sibling moves up as it is."""

    def __init__(self, records: Sequence[bytes]) -> None:
        level = [labels.digest(labels.LEAF, record) for record in records]
        self._levels = [b"".join(level)]  # one string a level takes a third of the memory of a list
        while len(level) > 1:
            pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
            level = [labels.digest(labels.NODE, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
            self._levels.append(b"".join(level))

    @property
    def root(self) -> bytes:
        """32 bytes that commit to all the records and their order."""
        return self._levels[-1]

    def path(self, position: int) -> bytes:
        """The siblings from the record at `position` up to the root, 32 bytes each."""
        siblings = []
        for level in self._levels[:-1]:
            start = HASH_BYTES * (position ^ 1)
            siblings.append(level[start : start + HASH_BYTES])  # empty where there is none
            position //= 2
        return b"".join(siblings)


def verify_path(root: bytes, record: bytes, position: int, count: int, path: bytes) -> None:
    """Check that `record` is the one at `position` of `count` under `root`.

    Raises:
        TrustError: it is not.
    """
    if not 0 <= position < count:
        raise TrustError(Refusal.SHARES, f"there is no record {position} of {count}")
    node, rest = labels.digest(labels.LEAF, record), path
    while count > 1:
        if position ^ 1 < count:
            sibling, rest = rest[:HASH_BYTES], rest[HASH_BYTES:]
            pair = (sibling, node) if position % 2 else (node, sibling)
            node = labels.digest(labels.NODE, *pair)
        position, count = position // 2, (count + 1) // 2
    if rest or node != root:
        raise TrustError(Refusal.SHARES, "a record is not under the root that its sender signed")
