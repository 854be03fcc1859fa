"""Every record verifies at its position, and at no other, under no other root, with no other path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError
from propolis.secure.merkle import HASH_BYTES, MerkleTree, path_size, verify_path

CONTEXT = b"context"
every_count = pytest.mark.parametrize("count", range(1, 21))


def records(count: int) -> list[bytes]:
    return [bytes([i]) * (i + 1) for i in range(count)]


def refused(root: bytes, record: bytes, position: int, count: int, path: bytes, context: bytes = CONTEXT) -> bool:
    try:
        verify_path(root, record, position, count, path, context)
    except TrustError as error:
        return error.refusal is Refusal.SHARES
    return False


@every_count
def test_every_record_verifies_at_its_position_only(count: int) -> None:
    tree = MerkleTree(records(count), CONTEXT)
    for position, record in enumerate(records(count)):
        path = tree.path(position)
        verify_path(tree.root, record, position, count, path, CONTEXT)
        assert len(path) == path_size(position, count)
        for wrong in range(count):
            assert wrong == position or refused(tree.root, record, wrong, count, path)
            assert wrong == position or refused(tree.root, record, wrong, count, tree.path(wrong))


@every_count
def test_anything_else_is_refused(count: int) -> None:
    tree, other = MerkleTree(records(count), CONTEXT), MerkleTree([b"other", *records(count)[1:]], CONTEXT)
    for position, record in enumerate(records(count)):
        path = tree.path(position)
        assert refused(tree.root, record + b"\0", position, count, path)
        assert refused(other.root, record, position, count, path)
        assert refused(tree.root, record, position, count, path, b"another context")
        assert refused(tree.root, record, position, count, path + bytes(HASH_BYTES))
        assert refused(tree.root, record, position, count, path + b"\0")
        for cut in (1, HASH_BYTES):
            assert not path or refused(tree.root, record, position, count, path[:-cut])
            assert not path or refused(tree.root, record, position, count, path[cut:])
        for place in range(len(path)):
            forged = bytearray(path)
            forged[place] ^= 1
            assert refused(tree.root, record, position, count, bytes(forged))


def test_the_root_commits_to_the_order_and_the_number_of_records() -> None:
    lists = ([b"a", b"b"], [b"b", b"a"], [b"a"], [b"a", b"b", b"b"], [b"ab"])
    roots = [MerkleTree(each, CONTEXT).root for each in lists]
    assert len(set(roots)) == len(roots)


def test_an_inner_node_is_no_record() -> None:
    """A path that stops one level early would show a hash of two leaves as if it were a leaf (RFC 6962, 2.1)."""
    tree = MerkleTree([b"a", b"b", b"c", b"d"], CONTEXT)
    leaves = [leaf(place, each) for place, each in enumerate((b"a", b"b"))]
    inside = labels.joined(labels.NODE, CONTEXT, numbers(1, 0), *leaves)
    for record in (b"".join(leaves), inside):
        assert refused(tree.root, record, 0, 2, tree.path(0)[HASH_BYTES:])


def numbers(*each: int) -> bytes:
    return b"".join(number.to_bytes(8, "big") for number in each)


def leaf(place: int, record: bytes) -> bytes:
    return labels.digest(labels.LEAF, CONTEXT, numbers(place), record)[:16]


def node(height: int, place: int, left: bytes, right: bytes) -> bytes:
    return labels.digest(labels.NODE, CONTEXT, numbers(height, place), left, right)[:16]


def test_the_shape_is_that_of_three_leaves_written_out() -> None:
    """Sixteen bytes each, and every hash names its tree and its place: what is found for one fits no other."""
    a, b, c = (leaf(place, each) for place, each in enumerate((b"a", b"b", b"c")))
    tree = MerkleTree([b"a", b"b", b"c"], CONTEXT)
    assert tree.root == node(2, 0, node(1, 0, a, b), c)
    assert tree.path(0) == b + c
    assert tree.path(2) == node(1, 0, a, b)


def test_equal_records_have_a_hash_of_their_own_at_every_place() -> None:
    paths = MerkleTree([b"a"] * 8, CONTEXT).path(0) + MerkleTree([b"a"] * 8, b"another").path(0)
    assert len({paths[at : at + HASH_BYTES] for at in range(0, len(paths), HASH_BYTES)}) == 6


@given(st.binary(max_size=200), st.integers(0, 6), st.integers(2, 7))
def test_a_made_up_path_is_refused(path: bytes, position: int, count: int) -> None:
    assert refused(MerkleTree(records(7), CONTEXT).root, b"made up", position, count, path)
