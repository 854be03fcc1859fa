"""What a device signs of its preparation: one root over what it sealed, and over what the server alone needs.

The last leaf holds the seed commitment and a hash of the next prekey. The neighbours know that there is one, and get no
more of it than a hash on the path of their own records.
"""

from __future__ import annotations

from propolis.secure import labels
from propolis.secure.identity import Signed
from propolis.secure.merkle import HASH_BYTES, MerkleTree, path_size, verify_path
from propolis.secure.secagg.masks import index_bytes
from propolis.secure.secagg.messages import RECORD_BYTES


def records_of(deliveries: bytes) -> list[bytes]:
    """The records of a prepare reply, one by one."""
    return [deliveries[start : start + RECORD_BYTES] for start in range(0, len(deliveries), RECORD_BYTES)]


def server_record(commitment: bytes, next_prekey: Signed) -> bytes:
    """The last leaf: seed commitment (see `commitment_in`) and a hash of the prekey for the round after this one."""
    return commitment + labels.digest(labels.PREKEY, next_prekey.payload)


def commitment_in(record: bytes) -> bytes:
    """The seed commitment in a `server_record`."""
    return record[:HASH_BYTES]


def preparation_tree(dealer: int, plan: bytes, deliveries: bytes, last: bytes) -> MerkleTree:
    """The tree whose root the dealer signs.

    Args:
        dealer: who prepares.
        plan: digest of the round's plan.
        deliveries: a record for each neighbour in rising order.
        last: from `server_record`.
    """
    return MerkleTree([*records_of(deliveries), last], _context(dealer, plan))


def delivery_path_size(place: int, holders: int) -> int:
    """Bytes of the path of the record for the neighbour at `place` of `holders`."""
    return path_size(place, holders + 1)


def require_record(root: bytes, dealer: int, plan: bytes, place: int, holders: int, record: bytes, path: bytes) -> None:
    """Check that a record is what the dealer signed for its neighbour at `place` of `holders`; raises TrustError."""
    verify_path(root, record, place, holders + 1, path, _context(dealer, plan))


def head_context(dealer: int, plan: bytes) -> tuple[bytes, bytes]:
    """What is signed with a head and does not travel: the digest of the round's plan, and whose head it is."""
    return plan, index_bytes(dealer)


def _context(dealer: int, plan: bytes) -> bytes:
    return labels.joined(*head_context(dealer, plan))
