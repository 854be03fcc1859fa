"""Every record verifies at its position, and at no other, under no other root, with no other path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from propolis.secure import labels
from propolis.secure.errors import Refusal, TrustError
from propolis.secure.merkle import HASH_BYTES, MerkleTree, verify_path

every_count = pytest.mark.parametrize("count", range(1, 21))


def records(count: int) -> list[bytes]:
    return [bytes([i]) * (i + 1) for i in range(count)]


def refused(root: bytes, record: bytes, position: int, count: int, path: bytes) -> bool:
    try:
        verify_path(root, record, position, count, path)
    except TrustError as error:
        return error.refusal is Refusal.SHARES
    return False


@every_count
def test_every_record_verifies_at_its_position_only(count: int) -> None:
    tree = MerkleTree(records(count))
    for position, record in enumerate(records(count)):
        path = tree.path(position)
        verify_path(tree.root, record, position, count, path)
        for wrong in range(count):
            assert wrong == position or refused(tree.root, record, wrong, count, path)
            assert wrong == position or refused(tree.root, record, wrong, count, tree.path(wrong))


@every_count
def test_anything_else_is_refused(count: int) -> None:
    tree, other = MerkleTree(records(count)), MerkleTree([b"other", *records(count)[1:]])
    for position, record in enumerate(records(count)):
        path = tree.path(position)
        assert refused(tree.root, record + b"\0", position, count, path)
        assert refused(other.root, record, position, count, path)
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
    roots = [MerkleTree(each).root for each in ([b"a", b"b"], [b"b", b"a"], [b"a"], [b"a", b"b", b"b"], [b"ab"])]
    assert len(set(roots)) == len(roots)


def test_an_inner_node_is_no_record() -> None:
    """A path that stops one level early would show a hash of two leaves as if it were a leaf (RFC 6962, 2.1)."""
    tree = MerkleTree([b"a", b"b", b"c", b"d"])
    leaves = [labels.digest(labels.LEAF, each) for each in (b"a", b"b")]
    inside = labels.joined(labels.NODE, *leaves)
    for record in (b"".join(leaves), inside):
        assert refused(tree.root, record, 0, 2, tree.path(0)[HASH_BYTES:])


def test_the_shape_is_that_of_three_leaves_written_out() -> None:
    a, b, c = (labels.digest(labels.LEAF, each) for each in (b"a", b"b", b"c"))
    tree = MerkleTree([b"a", b"b", b"c"])
    assert tree.root == labels.digest(labels.NODE, labels.digest(labels.NODE, a, b), c)
    assert tree.path(0) == b + c
    assert tree.path(2) == labels.digest(labels.NODE, a, b)


@given(st.binary(max_size=200), st.integers(0, 6), st.integers(2, 7))
def test_a_made_up_path_is_refused(path: bytes, position: int, count: int) -> None:
    assert refused(MerkleTree(records(7)).root, b"made up", position, count, path)
