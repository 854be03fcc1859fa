"""A message arrives as it was sent, wherever its way is cut."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.link import frames, transfers
from propolis.link.frames import Begin, Chunk
from propolis.link.spool import Spools
from propolis.link.transfers import Body, Incoming
from propolis.secure.errors import PeerError

ID = b"0123456789abcdef"


def received(incoming: Incoming) -> tuple[bytes, tuple[bytes, ...]]:
    return incoming.header(), tuple(incoming.parts())


@settings(deadline=None, max_examples=60)
@given(
    header=st.binary(min_size=1, max_size=40),
    sizes=st.lists(st.integers(0, 90), max_size=12),
    chunk=st.integers(1, 64),
    seed=st.integers(0, 2**32),
)
def test_a_message_that_is_cut_again_and_again_arrives_whole(
    header: bytes, sizes: list[int], chunk: int, seed: int
) -> None:
    rng = random.Random(seed)
    body = Body(header, [rng.randbytes(size) for size in sizes])
    original = transfers.CHUNK_BYTES
    transfers.CHUNK_BYTES = chunk
    try:
        incoming: Incoming | None = None
        while incoming is None or not incoming.is_whole:
            for frame in body.frames(ID, incoming.received if incoming else 0):
                if rng.random() < 0.3 and (incoming is None or incoming.received < body.total):
                    break  # the connection is gone, and this frame with it
                if isinstance(frame, Chunk):
                    assert incoming is not None
                elif incoming is None:
                    incoming = Incoming(frame, 10_000, Spools())
                else:
                    incoming.go_on(frame)
                incoming.append(frame.data)
                assert len(frame.data) <= chunk
    finally:
        transfers.CHUNK_BYTES = original
    assert received(incoming) == (header, tuple(body.parts))


def test_a_large_message_is_spooled_and_a_small_one_is_not() -> None:
    spools = Spools(memory=100, largest=60)
    with_files = [not spools.open(size).in_memory for size in (60, 61, 40, 1)]
    assert with_files == [False, True, False, True]  # the last one finds the budget used up


def test_a_closed_spool_gives_its_memory_back_once() -> None:
    spools = Spools(memory=100, largest=100)
    first = spools.open(100)
    assert not spools.open(1).in_memory
    first.close()
    first.close()
    assert spools.open(100).in_memory
    assert not spools.open(1).in_memory


@pytest.mark.parametrize("large", [False, True])
def test_bytes_come_back_from_memory_and_from_a_file(large: bool) -> None:
    spools = Spools(largest=10**6 if not large else 1)
    body = Body(b"head", [b"a" * 500_000, b"", b"b" * 300_000])
    begin, *chunks = body.frames(ID)
    assert isinstance(begin, Begin)
    incoming = Incoming(begin, 10**7, spools)
    for frame in (begin, *chunks):
        incoming.append(frame.data)
        assert len(frames.encode_frame(frame)) <= frames.LARGEST_FRAME
    assert received(incoming) == (b"head", tuple(body.parts))


def test_what_does_not_fit_together_is_refused() -> None:
    begin = Begin(ID, 4, (6,), 0, b"head")
    with pytest.raises(PeerError, match="at most 9"):
        Incoming(begin, 9, Spools())
    with pytest.raises(PeerError, match="of which nothing came"):
        Incoming(Begin(ID, 4, (6,), 4, b"x"), 100, Spools())
    incoming = Incoming(begin, 100, Spools())
    incoming.append(b"head")
    for wrong in (Begin(ID, 4, (6,), 3, b""), Begin(ID, 4, (7,), 4, b""), Begin(ID, 4, (6,), 0, b"")):
        with pytest.raises(PeerError, match="goes on at byte"):
            incoming.go_on(wrong)
    with pytest.raises(PeerError, match="1 bytes more"):
        incoming.append(b"1234567")
    incoming.append(b"123456")
    with pytest.raises(PeerError, match="goes on at byte"):
        incoming.go_on(Begin(ID, 4, (6,), 10, b""))
