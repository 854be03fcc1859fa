"""Bytes from a peer become a dataclass within its bounds, or a PeerError, and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message
from hypothesis import example, given, settings
from hypothesis import strategies as st

from propolis.protos import identity_pb2
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.identity import Invitation, Prekey, Roster, RosterEntry
from propolis.secure.wire import LARGEST_MESSAGE, between, decode, decode_exactly, encode, many, sized

# A format of this test's own with a field of every kind, so that it does not change with the protocol.
SCHEMA = """
name: "letter.proto" package: "test" syntax: "proto3"
message_type {
  name: "Entry"
  field { name: "index" number: 1 label: LABEL_OPTIONAL type: TYPE_UINT32 }
  field { name: "key" number: 2 label: LABEL_OPTIONAL type: TYPE_BYTES }
}
message_type {
  name: "Names"
  field { name: "names" number: 1 label: LABEL_REPEATED type: TYPE_STRING }
}
message_type {
  name: "Letter"
  field { name: "entry" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".test.Entry" }
  field { name: "names" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".test.Names" }
  field { name: "real" number: 3 label: LABEL_OPTIONAL type: TYPE_DOUBLE }
  field { name: "counter" number: 4 label: LABEL_OPTIONAL type: TYPE_UINT64 }
  field { name: "numbers" number: 5 label: LABEL_REPEATED type: TYPE_UINT32 }
  field { name: "entries" number: 6 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".test.Entry" }
  field { name: "extra" number: 7 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".test.Entry" }
  field { name: "kind" number: 8 label: LABEL_OPTIONAL type: TYPE_UINT32 proto3_optional: true oneof_index: 0 }
  oneof_decl { name: "_kind" }
}
"""


def letter_proto() -> type[Message]:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Letter"))


@dataclass(frozen=True, slots=True)
class Entry:
    index: int = between(0, 9)
    key: bytes = sized(4)


@dataclass(frozen=True, slots=True)
class Names:
    names: tuple[str, ...] = sized(1, 4, count=3)


@dataclass(frozen=True, slots=True)
class Letter:
    entry: Entry
    names: Names
    real: float = between(-1.5, 1.5)
    counter: int  # without a bound of its own
    numbers: tuple[int, ...] = between(2, 9, count=2)
    entries: tuple[Entry, ...] = many(2)
    extra: Entry | None = None
    kind: int = between(1, 2, default=1, implied=True)


LETTER_PROTO = letter_proto()
ENTRY = Entry(9, b"four")
LETTER = Letter(ENTRY, Names(("a", "four", "\u00fc" * 4)), -1.5, 2**63 - 1, (2, 9), (ENTRY, ENTRY))
INVITATION = Invitation(bytes(32), 7, "clinic", bytes(32))
EXAMPLES: list[tuple[Any, type[Message]]] = [
    (LETTER, LETTER_PROTO),
    (Letter(ENTRY, Names(()), 0.0, 0, (), ()), LETTER_PROTO),  # `names` is there, though nothing is in it
    (replace(LETTER, extra=ENTRY, kind=2), LETTER_PROTO),
    (INVITATION, identity_pb2.Invitation),
    (Prekey(2**62, bytes(32)), identity_pb2.Prekey),
    (Roster(bytes(32), 1, 0, ()), identity_pb2.Roster),
    (Roster(bytes(32), 1, 9, (RosterEntry("\u00e9" * 200, bytes(32), True),) * 3), identity_pb2.Roster),
]


def assert_refused(cls: type, data: bytes, proto: type[Message], because: str) -> None:
    with pytest.raises(PeerError, match=because) as caught:
        decode(cls, data, proto)
    assert caught.value.refusal is Refusal.MALFORMED


@pytest.mark.parametrize(("message", "proto"), EXAMPLES)
def test_what_is_encoded_is_decoded(message: Any, proto: type[Message]) -> None:
    assert decode(type(message), encode(message, proto), proto) == message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("federation", b""),
        ("federation", bytes(31)),
        ("federation", bytes(33)),
        ("index", 2**20),
        ("name", ""),
        ("name", "x" * 201),
        ("public_key", bytes(31)),
        ("version", 0),
        ("version", 2),
    ],
)
def test_a_field_out_of_its_bounds_is_refused(field: str, value: object) -> None:
    data = encode(replace(INVITATION, **{field: value}), identity_pb2.Invitation)
    assert_refused(Invitation, data, identity_pb2.Invitation, f"Invitation.{field}: expected")


@pytest.mark.parametrize(
    ("change", "because"),
    [
        *(
            ({"real": value}, "Letter.real: expected")
            for value in (math.nan, math.inf, -math.inf, 1.5000001, -1.5000001)
        ),
        ({"counter": 2**63}, "Letter.counter: expected 0 to"),
        ({"numbers": (2, 3, 4)}, "Letter.numbers: 3 entries, at most 2"),
        ({"numbers": (2, 10)}, "Letter.numbers: expected 2 to 9, got 10"),
        ({"numbers": (1, 2)}, "Letter.numbers: expected 2 to 9, got 1"),
        ({"names": Names(("ab", ""))}, "Names.names: expected 1 to 4, got 0"),
        ({"names": Names(("five!",))}, "Names.names: expected 1 to 4, got 5"),
        ({"names": Names(("a",) * 4)}, "Names.names: 4 entries, at most 3"),
        ({"entry": Entry(9, b"five!")}, "Entry.key: expected 4 to 4, got 5"),
        ({"entries": (ENTRY,) * 3}, "Letter.entries: 3 entries, at most 2"),
        ({"entries": (ENTRY, Entry(10, b"four"))}, "Entry.index: expected 0 to 9, got 10"),
        ({"entries": (ENTRY, Entry(9, b""))}, "Entry.key: expected 4 to 4, got 0"),
        ({"extra": Entry(9, b"")}, "Entry.key: expected 4 to 4, got 0"),
        ({"kind": 0}, "Letter.kind: expected 1 to 2, got 0"),
        ({"kind": 3}, "Letter.kind: expected 1 to 2, got 3"),
    ],
)
def test_every_kind_of_field_is_bounded(change: dict[str, Any], because: str) -> None:
    assert_refused(Letter, encode(replace(LETTER, **change), LETTER_PROTO), LETTER_PROTO, because)


@pytest.mark.parametrize("name", ["entry", "names"])
def test_a_missing_message_is_refused(name: str) -> None:
    proto = LETTER_PROTO.FromString(encode(LETTER, LETTER_PROTO))
    proto.ClearField(name)
    assert_refused(Letter, proto.SerializeToString(), LETTER_PROTO, f"Letter.{name} is missing")


def test_what_is_implied_does_not_travel_and_has_one_form() -> None:
    plain = encode(LETTER, LETTER_PROTO)
    proto = LETTER_PROTO.FromString(plain)
    assert not proto.HasField("kind")
    assert not proto.HasField("extra")
    proto.kind = 1  # type: ignore[attr-defined]
    said = proto.SerializeToString(deterministic=True)
    assert said != plain
    assert decode(Letter, said, LETTER_PROTO) == decode_exactly(Letter, plain, LETTER_PROTO) == LETTER
    with pytest.raises(PeerError, match="canonical"):
        decode_exactly(Letter, said, LETTER_PROTO)


def test_long_data_is_refused_before_it_is_parsed() -> None:
    data = encode(INVITATION, identity_pb2.Invitation)
    assert decode(Invitation, data, identity_pb2.Invitation, limit=len(data)) == INVITATION
    with pytest.raises(PeerError, match=f"{len(data)} bytes are more than {len(data) - 1}"):
        decode(Invitation, data, identity_pb2.Invitation, limit=len(data) - 1)
    assert_refused(Invitation, b"\xff" * (LARGEST_MESSAGE + 1), identity_pb2.Invitation, "bytes are more than")


def test_text_that_is_no_utf_8_is_refused() -> None:
    data = encode(INVITATION, identity_pb2.Invitation).replace(b"clinic", b"\xff\xfe\xfd\xfc\xfb\xfa")
    assert_refused(Invitation, data, identity_pb2.Invitation, "no such message")


def decodes_or_refuses(data: bytes, cls: type, proto: type[Message]) -> None:
    try:
        message = decode(cls, data, proto)
    except PeerError:
        return
    assert decode(cls, encode(message, proto), proto) == message


@given(st.binary(max_size=200))
@example(b"")
@example(b"\xff" * 20)
@settings(max_examples=200)
def test_random_bytes_are_a_message_or_refused(data: bytes) -> None:
    for message, proto in EXAMPLES:
        decodes_or_refuses(data, type(message), proto)


@given(st.sampled_from(EXAMPLES), st.data())
@settings(max_examples=500)
def test_a_damaged_message_is_a_message_or_refused(valid: tuple[Any, type[Message]], data: st.DataObject) -> None:
    message, proto = valid
    damaged = bytearray(encode(message, proto))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(damaged))] * 2)))
    decodes_or_refuses(bytes(damaged), type(message), proto)
    decodes_or_refuses(bytes(damaged[start:end]), type(message), proto)
