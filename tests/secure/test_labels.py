"""No two contexts share a label, and no two lists of parts share an encoding."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from propolis.secure import labels

parts = st.lists(st.binary(max_size=6), min_size=1, max_size=5)


def test_labels_are_distinct() -> None:
    values = [value for value in vars(labels).values() if isinstance(value, bytes)]
    assert len(values) >= 20
    assert len(set(values)) == len(values)


@given(parts, parts)
def test_only_equal_parts_are_joined_alike(one: list[bytes], other: list[bytes]) -> None:
    assert (labels.joined(*one) == labels.joined(*other)) == (one == other)
    assert (labels.digest(*one) == labels.digest(*other)) == (one == other)


def test_where_one_part_ends_and_the_next_begins_counts() -> None:
    assert labels.joined(b"l", b"ab", b"c") != labels.joined(b"l", b"a", b"bc")
    assert labels.joined(b"la", b"b") != labels.joined(b"l", b"ab")
    assert labels.joined(b"l") != labels.joined(b"l", b"")
