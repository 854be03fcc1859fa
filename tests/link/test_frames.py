"""Frames survive the wire, and nothing else passes for one."""

from __future__ import annotations

import pytest

from propolis.link.frames import (
    LARGEST_FRAME,
    Beat,
    Begin,
    Cancel,
    Chunk,
    Farewell,
    Frame,
    Free,
    Hello,
    News,
    Progress,
    Reason,
    Received,
    Welcome,
    decode_frame,
    encode_frame,
    farewell,
)
from propolis.protos import link_pb2 as pb
from propolis.secure.errors import PeerError

ID = bytes(range(16))
FRAMES: list[Frame] = [
    News(5000),
    Hello(ID, 12345, 1_700_000_000, b"", (Progress(ID, 7), Progress(ID, 0, True)), 1),
    Welcome(ID, 10, 2**32, 77, b'{"a": 1}', ()),
    Begin(ID, 12, (3, 0, 2**40), 5, b"abc"),
    Chunk(b"x" * 1000),
    Received(ID),
    Beat(),
    Cancel(ID),
    Free(ID),
    farewell(Reason.REPLACED, "another one"),
]


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_a_frame_survives_the_wire(frame: Frame) -> None:
    assert decode_frame(encode_frame(frame)) == frame


def test_every_kind_of_the_proto_is_one_of_ours() -> None:
    assert {type(frame).__name__.lower() for frame in FRAMES} == {field.name for field in pb.Frame.DESCRIPTOR.fields}
    assert {reason.name for reason in Reason} == set(pb.Farewell.Reason.keys())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "none of this version's"),
        (b"\xff" * 40, "no such message"),
        (b"\xa2\x06\x03abc", "none of this version's"),  # field 100, of a later version
        (b"\x00" * (LARGEST_FRAME + 1), "more than"),
        (pb.Frame(begin=pb.Begin(id=b"short", header=1)).SerializeToString(), "Begin.id"),
        (pb.Frame(begin=pb.Begin(id=ID, header=2**30)).SerializeToString(), "Begin.header"),
        (pb.Frame(begin=pb.Begin(id=ID, header=1, parts=[2**60])).SerializeToString(), "Begin.parts"),
        (pb.Frame(chunk=pb.Chunk()).SerializeToString(), "Chunk.data"),
        (pb.Frame(hello=pb.Hello(process=ID, node_id=1)).SerializeToString(), "Hello.node_id"),
    ],
)
def test_what_is_no_frame_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(PeerError, match=said):
        decode_frame(data)


def test_a_farewell_of_a_later_version_has_a_name() -> None:
    assert Farewell(3, "").name == "REPLACED"
    assert Farewell(999, "").name == "reason 999"


def test_a_long_reason_is_cut() -> None:
    frame = farewell(Reason.PROTOCOL, "x" * 10_000)
    assert decode_frame(encode_frame(frame)) == frame
